// The packed layout of a weight on the CPU, and the packing. Immutable once made.
//
// A PackedMatrix is a list of parts, one a stacked matrix. A part cuts its n output rows into tiles
// of 16 (lane = output row, so a product needs no horizontal sum and all rows share the broadcast
// input), and its k columns into the groups that share a scale. Tiles follow each other; a tile is
// a list of blocks, one a group, so that a product reads memory in order:
//
//   tile t:  | block of group 0 | block of group 1 | ... |   block_bytes each; the last may be less
//   block:   | header | codes |
//   header   4- and 8-bit: scale[16], then zero[16] for kInt4Zero or offset[16] for kInt4Offset;
//            float16 when that loses nothing (half_params), else float32; padded to 64 bytes.
//            kPlain has none, and one group of k columns.
//   codes    4-bit: ceil(columns / 8) words of 16 x uint32: bits 4j..4j+3 of lane i hold the code
//            of row i, column 8w + j
//            kInt8: columns x int8[16]      kPlain: columns x element[16] of plain_dtype
//
// Example: rows 0 and 1 of a kInt4Offset matrix with codes 1 2 3 ... 8 and 9 9 9 ... 9, group size
// 8, float16 scales: 16 halves of scales, 16 halves of offsets, then uint32 0x87654321 0x99999999
// and 14 zero lanes: 128 bytes.
//
// Rows beyond n have scale, offset and elements 0, so they give 0. Columns beyond a group are never
// read. With act-order (perm), column i of a part takes input perm[i].
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kernels/backend.h"
#include "kernels/cpu/memory.h"
#include "kernels/quant.h"

namespace sluice {

constexpr int64_t kTileRows = 16;

struct PackedPart {
  QuantFormat format = QuantFormat::kPlain;
  DType plain_dtype = DType::kF32;
  bool half_params = false;
  int64_t n_begin = 0;  // First row in the whole matrix
  int64_t n = 0;
  int64_t k = 0;
  int64_t group_size = 0;  // k for kPlain
  int64_t groups = 0;
  int64_t tiles = 0;
  int64_t header_bytes = 0;
  int64_t block_bytes = 0;  // Of a whole group
  int64_t tile_bytes = 0;   // From one tile to the next, a multiple of 64
  const uint8_t* data = nullptr;
  alignas(
      64) std::array<float, 16> table = {};  // Value of each 4-bit code: 0..15, or that of kTable4
  const int32_t* perm = nullptr;             // [k], or null

  const uint8_t* Block(int64_t tile, int64_t group) const {
    return data + tile * tile_bytes + group * block_bytes;
  }
  int64_t Columns(int64_t group) const { return std::min(group_size, k - group * group_size); }
};

class CpuPackedMatrix final : public PackedMatrix {
 public:
  CpuPackedMatrix(int64_t n, int64_t k, std::vector<PackedPart> parts, HostMemory memory)
      : PackedMatrix(n, k, memory.bytes()), parts_(std::move(parts)), memory_(std::move(memory)) {}

  absl::Span<const PackedPart> parts() const { return parts_; }

 private:
  std::vector<PackedPart> parts_;
  HostMemory memory_;
};

// Packs the matrices one under the other. INVALID_ARGUMENT: none given, a broken spec, planes of
// another size than the spec says, or different k. RESOURCE_EXHAUSTED: no memory. REQUIRES:
// CheckValues(matrix) is OK.
absl::StatusOr<std::unique_ptr<CpuPackedMatrix>> Pack(
    absl::Span<const QuantizedMatrix* const> stacked);

// Row `row` of the matrix as float in input-feature order: the same bits as DequantizeRow of the
// source.
void UnpackRow(const CpuPackedMatrix& matrix, int64_t row, float* out);

}  // namespace sluice
