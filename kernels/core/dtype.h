// Element types of plain tensors, their sizes, and conversion of half-precision values.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sluice {

enum class DType : uint8_t { kF32, kF16, kBF16, kI32, kI8, kU8 };

// Bytes of one element.
size_t SizeOf(DType dtype);

// "float32", "float16", "bfloat16", "int32", "int8", "uint8": the names Hugging Face configs use.
const char* NameOf(DType dtype);

// IEEE 754 binary16 and bfloat16 bit patterns to float (exact), and back (round to nearest even;
// NaN stays NaN, overflow becomes infinity).
float HalfToFloat(uint16_t bits);
uint16_t FloatToHalf(float value);
float BFloat16ToFloat(uint16_t bits);
uint16_t FloatToBFloat16(float value);

// Reads `count` elements of kF32, kF16 or kBF16 at `source` (any alignment) as float.
void ToFloat(DType dtype, const void* source, size_t count, float* out);

}  // namespace sluice
