// Element types and sizes of tensors as they lie in a file. TensorBytes is the one place where a
// shape becomes a size.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/core/dtype.h"

namespace sluice::checkpoint {

using Shape = std::vector<uint64_t>;

// Elements come in blocks: block_elements take block_bytes (1 element, but 32 for GGUF's Q types).
struct SourceDType {
  std::string name;  // "F16", "I32", "Q4_1", ...
  uint64_t block_elements = 1;
  uint64_t block_bytes = 0;
};

// By safetensors name. UNIMPLEMENTED for types of less than a byte or unknown ones.
absl::StatusOr<SourceDType> SafetensorsDType(const std::string& name);

// By GGUF number. UNIMPLEMENTED, with the type's name where known, for anything but F32, F16, BF16,
// Q4_0, Q4_1, Q8_0.
absl::StatusOr<SourceDType> GgufDType(uint32_t number);

// The canonical dtype of a floating type that can be served as it is ("F32", "F16", "BF16");
// nullopt for any other.
std::optional<DType> FloatDType(const SourceDType& dtype);

// Bytes of a tensor; shape[last] is the fastest dimension. INVALID_ARGUMENT when the product
// overflows 63 bits or the fastest dimension is no multiple of the block. `what` starts the
// message.
absl::StatusOr<uint64_t> TensorBytes(const SourceDType& dtype, const Shape& shape,
                                     const std::string& what);

// "[3, 4]".
std::string ShapeText(const Shape& shape);

}  // namespace sluice::checkpoint
