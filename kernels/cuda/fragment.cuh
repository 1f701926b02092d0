// From a record of the packed layout (packed_layout.h) to the A operand of mma.m16n8k16: what the
// codes of one step mean, as pairs of T. Scaled: each weight is the product of scale and code (or
// their fused multiply-add) rounded to T, as the libraries that wrote the checkpoint dequantize it.
// Unscaled: table values or codes, the latter of int4_zero still with the constant that made them
// numbers (RawOffset); what is missing is made good in float32 on the sum over a granule: fewer
// instructions where a weight meets few rows of x, and one rounding less.
#pragma once

#include "kernels/cuda/numeric.cuh"
#include "kernels/cuda/packed_layout.h"

namespace sluice {

// Scales of rows g and g + 8 of the granule in work, each twice; and the format's second number.
struct GranuleState {
  uint32_t scale_low, scale_high;
  uint32_t second_low, second_high;  // Offsets; or zero points: in the form the codes come in
                                     // (scaled), as numbers (unscaled)
};

// The 16 values of table4 as pairs, for each byte of two codes. In shared memory.
template <typename T>
__device__ void FillPairTable(const float* values, uint32_t* pairs) {
  for (int byte = threadIdx.x; byte < 256; byte += blockDim.x) {
    pairs[byte] = Numeric<T>::FromFloats(values[byte & 15], values[byte >> 4]);
  }
}

template <typename T, QuantFormat kFormat, bool kScaled>
__device__ __forceinline__ GranuleState LoadGranule(const uint8_t* granule, int g) {
  GranuleState state{};
  const uint32_t scales = *reinterpret_cast<const uint32_t*>(granule + 4 * g);
  state.scale_low = TwiceLow(scales);
  state.scale_high = TwiceHigh(scales);
  if constexpr (kFormat == QuantFormat::kInt4Zero) {
    const uint32_t zeros = *reinterpret_cast<const uint16_t*>(granule + 32 + 2 * g);
    const uint32_t low = zeros & 0xff, high = zeros >> 8;
    if constexpr (!kScaled) {
      state.second_low = low;
      state.second_high = high;
      return state;
    }
    if constexpr (sizeof(T) == 2 && std::is_same_v<T, __half>) {
      state.second_low = (0x6400u | low) * 0x10001u;           // 1024 + zero
      state.second_high = (0xd400u + (high << 4)) * 0x10001u;  // -(64 + zero)
    } else {
      state.second_low = (0x4300u + low) * 0x10001u;  // 128 + zero
      state.second_high = (0x4300u + high) * 0x10001u;
    }
  } else if constexpr (kFormat == QuantFormat::kInt4Offset) {
    const uint32_t offsets = *reinterpret_cast<const uint32_t*>(granule + 32 + 4 * g);
    state.second_low = TwiceLow(offsets);
    state.second_high = TwiceHigh(offsets);
  }
  return state;
}

// (word & mask) | magic in one instruction; `magic` must come from a register, so that the compiler
// does not make two instructions with a constant each.
template <uint32_t kMask>
__device__ __forceinline__ uint32_t Insert(uint32_t word, uint32_t magic) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(word), "n"(kMask), "r"(magic));
  return result;
}
__device__ __forceinline__ uint32_t InRegister(uint32_t constant) {
  asm volatile("" : "+r"(constant));
  return constant;
}

// Four pairs of codes of one word as exact integers of T, minus the zero point in `state`
// (int4_zero) or as they are (int4_offset).
template <typename T>
inline constexpr uint32_t kInt4Magic = std::is_same_v<T, __half> ? 0x64006400u : 0x43004300u;

template <typename T, bool kSubtractZero>
__device__ __forceinline__ void Int4Codes(uint32_t word, uint32_t magic, const GranuleState& state,
                                          uint32_t (&a)[4]) {
  if constexpr (std::is_same_v<T, __half>) {
    // 1024 + code for the low nibbles, 1024 + 16 code for the others: exact in float16.
    const uint32_t low = kSubtractZero ? state.second_low : 0x64006400u;
    const uint32_t high = kSubtractZero ? state.second_high : 0xd400d400u;
    constexpr uint32_t kSixteenth = 0x2c002c00u;
    const uint32_t next = word >> 8;
    a[0] = PairSub<T>(Insert<0x000f000fu>(word, magic), low);
    a[1] = PairFma<T>(Insert<0x00f000f0u>(word, magic), kSixteenth, high);
    a[2] = PairSub<T>(Insert<0x000f000fu>(next, magic), low);
    a[3] = PairFma<T>(Insert<0x00f000f0u>(next, magic), kSixteenth, high);
  } else {
    // 128 + code: exact in bfloat16, which has no room for a nibble further up.
    const uint32_t low = kSubtractZero ? state.second_low : 0x43004300u;
    const uint32_t high = kSubtractZero ? state.second_high : 0x43004300u;
    a[0] = PairSub<T>(Insert<0x000f000fu>(word, magic), low);
    a[1] = PairSub<T>(Insert<0x000f000fu>(word >> 4, magic), high);
    a[2] = PairSub<T>(Insert<0x000f000fu>(word >> 8, magic), low);
    a[3] = PairSub<T>(Insert<0x000f000fu>(word >> 12, magic), high);
  }
}

// Four int8 of a word as two pairs of T, exact.
template <typename T>
__device__ __forceinline__ void Int8Codes(uint32_t word, uint32_t& first, uint32_t& second) {
  const uint32_t biased = word ^ 0x80808080u;  // code + 128
  if constexpr (std::is_same_v<T, __half>) {
    first = PairSub<T>(__byte_perm(biased, 0x64646464u, 0x4140), 0x64806480u);  // 1024 + 128
    second = PairSub<T>(__byte_perm(biased, 0x64646464u, 0x4342), 0x64806480u);
  } else {
    float values[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t bits = __byte_perm(biased, 0x4b000000u, 0x7650 + i);  // 2^23 + code + 128
      values[i] = __uint_as_float(bits) - 8388736.0f;
    }
    first = Numeric<T>::FromFloats(values[0], values[1]);
    second = Numeric<T>::FromFloats(values[2], values[3]);
  }
}

// Unscaled codes of int4_zero are code * factor + offset; the sum over a granule of weight * x is
//   scale / factor * (sum of raw * x - (offset + factor * zero) * sum of x)
struct RawOffset {
  float inverse_factor, offset, factor;
};
template <typename T>
__device__ __forceinline__ RawOffset RawOffsetOf(bool high_row) {
  if constexpr (std::is_same_v<T, __half>) {
    return high_row ? RawOffset{0.0625f, 1024.0f, 16.0f} : RawOffset{1.0f, 1024.0f, 1.0f};
  } else {
    return {1.0f, 128.0f, 1.0f};
  }
}

// Four pairs of raw codes of one word.
template <typename T>
__device__ __forceinline__ void RawInt4Codes(uint32_t word, uint32_t magic, uint32_t (&a)[4]) {
  if constexpr (std::is_same_v<T, __half>) {
    const uint32_t next = word >> 8;
    a[0] = Insert<0x000f000fu>(word, magic);
    a[1] = Insert<0x00f000f0u>(word, magic);
    a[2] = Insert<0x000f000fu>(next, magic);
    a[3] = Insert<0x00f000f0u>(next, magic);
  } else {
    a[0] = Insert<0x000f000fu>(word, magic);
    a[1] = Insert<0x000f000fu>(word >> 4, magic);
    a[2] = Insert<0x000f000fu>(word >> 8, magic);
    a[3] = Insert<0x000f000fu>(word >> 12, magic);
  }
}

// A operand of step s of a record. `record` points to shared memory, `codes` holds what the lane
// has loaded of it.
template <typename T, QuantFormat kFormat, bool kScaled>
struct Fragment {
  static constexpr int kSteps = RecordColumns(kFormat) / 16;
  static constexpr int kWords = kRecordCodeBytes / 32 / 4;  // 8: 32 bytes of codes a lane
  uint32_t words[kWords];
  uint32_t magic = InRegister(kInt4Magic<T>);

  __device__ __forceinline__ void Load(const uint8_t* record, int lane) {
    const uint4 first = *reinterpret_cast<const uint4*>(record + lane * 16);
    const uint4 second = *reinterpret_cast<const uint4*>(record + 512 + lane * 16);
    words[0] = first.x, words[1] = first.y, words[2] = first.z, words[3] = first.w;
    words[4] = second.x, words[5] = second.y, words[6] = second.z, words[7] = second.w;
  }

  // The first or second half of the steps only; Step() then counts within it. Quantized formats.
  __device__ __forceinline__ void LoadHalf(const uint8_t* record, int lane, int half) {
    const uint4 part = *reinterpret_cast<const uint4*>(record + half * 512 + lane * 16);
    words[0] = part.x, words[1] = part.y, words[2] = part.z, words[3] = part.w;
  }

  __device__ __forceinline__ void Step(int s, const GranuleState& state, const uint32_t* pair_table,
                                       uint32_t (&a)[4]) const {
    if constexpr (kFormat == QuantFormat::kPlain) {
      // Words 0..3: row g, columns 8t .. 8t+7; words 4..7: row g + 8.
      a[0] = words[2 * s], a[1] = words[4 + 2 * s], a[2] = words[2 * s + 1];
      a[3] = words[4 + 2 * s + 1];
    } else if constexpr (kFormat == QuantFormat::kInt4Zero && !kScaled) {
      RawInt4Codes<T>(words[s], magic, a);
    } else if constexpr (kFormat == QuantFormat::kInt4Zero) {
      Int4Codes<T, true>(words[s], magic, state, a);
      Scale(state, a);
    } else if constexpr (kFormat == QuantFormat::kInt4Offset) {
      static_assert(kScaled, "an offset belongs to each weight");
      Int4Codes<T, false>(words[s], magic, state, a);
      a[0] = PairFma<T>(a[0], state.scale_low, state.second_low);
      a[1] = PairFma<T>(a[1], state.scale_high, state.second_high);
      a[2] = PairFma<T>(a[2], state.scale_low, state.second_low);
      a[3] = PairFma<T>(a[3], state.scale_high, state.second_high);
    } else if constexpr (kFormat == QuantFormat::kTable4) {
      const uint32_t word = words[s];
      a[0] = pair_table[word & 0xff], a[1] = pair_table[(word >> 8) & 0xff];
      a[2] = pair_table[(word >> 16) & 0xff], a[3] = pair_table[word >> 24];
      if constexpr (kScaled) Scale(state, a);
    } else {
      Int8Codes<T>(words[2 * s], a[0], a[2]);
      Int8Codes<T>(words[2 * s + 1], a[1], a[3]);
      if constexpr (kScaled) Scale(state, a);
    }
  }

 private:
  static __device__ __forceinline__ void Scale(const GranuleState& state, uint32_t (&a)[4]) {
    a[0] = PairMul<T>(a[0], state.scale_low);
    a[1] = PairMul<T>(a[1], state.scale_high);
    a[2] = PairMul<T>(a[2], state.scale_low);
    a[3] = PairMul<T>(a[3], state.scale_high);
  }
};

}  // namespace sluice
