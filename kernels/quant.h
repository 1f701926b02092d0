// The canonical form of a weight matrix: what the loader makes from every source format, what
// travels to the workers, and what a backend packs when it uploads it (Backend::Upload). No kernel
// layout appears here.
//
// A matrix W has shape [n, k]: n output features, k input features; y = x * W^T. With group g =
// column / group_size (the last group may be shorter) and code c of an element:
//
//   kPlain       w = element                             elements [n, k] of plain_dtype
//   kInt4Zero    w = scale[row][g] * (c - zero[row][g])  c 0..15, zero 0..16 (AWQ, GPTQ, Q4_0)
//   kInt4Offset  w = scale[row][g] * c + offset[row][g]  c 0..15, a real offset (GGUF Q4_1)
//   kTable4      w = table[c] * scale[row][g]            c 0..15, one table (NF4, FP4)
//   kInt8        w = scale[row][g] * c                   c -128..127 (GGUF Q8_0; LLM.int8)
//
// A matrix is a sequence of planes, each row-major by output row, in this order and without gaps:
//
//   codes    4-bit: [n, ceil(k/2)] bytes; byte j of a row holds column 2j in bits 0..3 and column
//            2j+1 in bits 4..7; kInt8: [n, k] int8; kPlain: [n, k] of plain_dtype, little-endian
//   scales   [n, groups] of scale_dtype (kF16, kBF16 or kF32)             not for kPlain
//   zeros    [n, groups] uint8                                            kInt4Zero only
//   offsets  [n, groups] of scale_dtype                                   kInt4Offset only
//   table    [16] float32                                                 kTable4 only
//   perm     [k] int32: column i of the planes is input feature perm[i]   only has_perm (act-order)
//
// Example: n = 1, k = 4, group_size = 2, kInt4Zero, codes 1 2 3 4, scales 0.5 2, zeros 0 3:
//   codes 0x21 0x43; scales 0x3800 0x4000 (float16); zeros 0x00 0x03; W = 0.5 1 0 2.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "kernels/core/buffer.h"
#include "kernels/core/dtype.h"

namespace sluice {

enum class QuantFormat : uint8_t { kPlain, kInt4Zero, kInt4Offset, kTable4, kInt8 };

// "plain", "int4_zero", "int4_offset", "table4", "int8".
const char* NameOf(QuantFormat format);

// Shape and format of a matrix: all that is needed to compute the size of its planes.
struct QuantSpec {
  QuantFormat format = QuantFormat::kPlain;
  DType plain_dtype = DType::kF16;  // kPlain only
  DType scale_dtype = DType::kF16;  // quantized formats only
  int64_t n = 0;
  int64_t k = 0;
  int64_t group_size = 0;  // Columns that share a scale, 1..k; quantized formats only
  bool has_perm = false;

  int64_t groups() const { return group_size > 0 ? (k + group_size - 1) / group_size : 0; }
  bool operator==(const QuantSpec&) const = default;
};

// Byte sizes of the planes in the order above; 0 for a plane the format has not.
struct PlaneSizes {
  uint64_t codes = 0, scales = 0, zeros = 0, offsets = 0, table = 0, perm = 0;
  uint64_t total() const { return codes + scales + zeros + offsets + table + perm; }
};

// INVALID_ARGUMENT when n, k or group_size are out of range (1 <= n, k < 2^31, 1 <= group_size <=
// k), a dtype does not suit the format, or the total would pass 2^48 bytes.
absl::Status CheckSpec(const QuantSpec& spec);

// REQUIRES: CheckSpec(spec) is OK.
PlaneSizes SizesOf(const QuantSpec& spec);

// Owns the planes of one matrix in one buffer. A vector (bias, norm weight) is kPlain with n = 1.
struct QuantizedMatrix {
  QuantSpec spec;
  Buffer planes;  // SizesOf(spec).total() bytes

  QuantizedMatrix() = default;
  // Allocates zeroed planes. REQUIRES: CheckSpec(spec) is OK.
  explicit QuantizedMatrix(const QuantSpec& spec);

  uint8_t* codes() { return planes.data(); }
  const uint8_t* codes() const { return planes.data(); }
  uint8_t* scales();
  const uint8_t* scales() const;
  uint8_t* zeros();
  const uint8_t* zeros() const;
  uint8_t* offsets();
  const uint8_t* offsets() const;
  float* table();
  const float* table() const;
  int32_t* perm();
  const int32_t* perm() const;
};

// Rejects values that no later code may trust from a peer: perm is a permutation of 0..k-1, zeros
// <= 16, scales, offsets and table finite. INVALID_ARGUMENT says which plane and where.
absl::Status CheckValues(const QuantizedMatrix& matrix);

// Row `row` of W as float in input-feature order (perm undone). The definition that every kernel is
// tested against.
void DequantizeRow(const QuantizedMatrix& matrix, int64_t row, float* out);

}  // namespace sluice
