// The packed layout of a weight matrix on the card: one for each quantized form, the same for every
// number of rows of x, made for mma.m16n8k16 with the weights as the 16-row operand.
//
// A TILE is 16 rows of W; its records follow each other along k, its successor follows it. A RECORD
// holds all that the product of 16 rows and RecordColumns() columns needs, about 1 KiB, and is read
// in one piece:
//
//   codes | for each granule of columns: scales [8][2], then zeros [8][2] (bytes) or offsets [8][2]
//
// entry [g][h] belonging to row g + 8h of the tile. A granule is 32, 64 or 128 columns that share a
// scale. Scales and offsets have the activations' dtype.
//
// Columns are visited in blocks of 32, in which lane t = lane % 4 of a warp owns columns 8t .. 8t+7
// (16 bytes of an activation row); step j = 0, 1 of the block gives the tensor cores its columns c =
// 8t + 4j .. c + 3 as k = 2t, 2t+1, 2t+8, 2t+9. Which column is called which k does not matter to a
// product, so the activations are read as they lie. For lane (g, t) and step s:
//
//   4-bit  one word a step, words of steps 0..3 at lane * 16, of 4..7 at 512 + lane * 16.
//          int4: nibbles 0, 4, 2, 6 = row g, columns c .. c+3; nibbles 1, 5, 3, 7 = row g + 8
//          table4: bytes 0, 2 = row g, columns (c, c+1), (c+2, c+3); bytes 1, 3 = row g + 8
//   int8   two words a step, steps 0, 1 at lane * 16, steps 2, 3 at 512 + lane * 16:
//          row g, columns c .. c+3; then row g + 8
//   plain  not packed: row-major, rows of PlainStride(k) elements, zeros behind column k
//
// Rows. With pair distance P > 0 the matrix is cut into sections of 2P rows, and rows i and i + P of a
// section (the halves of a rotated head; gate and up) lie in one tile as rows g and g + 8, so that
// one thread of an epilogue sees both. P = 0: natural order.
#pragma once

#include <cstdint>

#include "kernels/quant.h"

namespace sluice {

inline constexpr int kTileRows = 16;
inline constexpr int kRecordCodeBytes = 1024;

// Columns of a record.
constexpr int RecordColumns(QuantFormat format) {
  switch (format) {
    case QuantFormat::kInt8:
      return 64;
    case QuantFormat::kPlain:
      return 32;
    default:
      return 128;
  }
}

// Bytes of a granule's scales and zeros or offsets.
constexpr int GranuleBytes(QuantFormat format) {
  switch (format) {
    case QuantFormat::kInt4Zero:
      return 32 + 16;
    case QuantFormat::kInt4Offset:
      return 32 + 32;
    case QuantFormat::kPlain:
      return 0;
    default:
      return 32;
  }
}

constexpr int64_t PlainStride(int64_t k) { return (k + 63) / 64 * 64; }

// Where the rows of W lie in tiles.
struct RowOrder {
  int32_t n = 0;
  int32_t pair_distance = 0;  // Multiple of 8, and n a multiple of twice it; or 0

#ifdef __CUDACC__
  __host__ __device__
#endif
      int32_t
      LowRow(int32_t tile, int32_t g) const {  // Row g of a tile; may be >= n (padding)
    if (pair_distance == 0) return tile * kTileRows + g;
    const int32_t pair = tile * 8 + g;
    const int32_t section = pair / pair_distance;
    return section * 2 * pair_distance + (pair - section * pair_distance);
  }
#ifdef __CUDACC__
  __host__ __device__
#endif
      int32_t
      HighRow(int32_t low_row) const {  // Row g + 8 of the tile whose row g is low_row
    return low_row + (pair_distance == 0 ? 8 : pair_distance);
  }
};

}  // namespace sluice
