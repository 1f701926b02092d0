// The inner loops of products, for one SIMD target at a time (Highway): included by matmul.cc
// within its foreach_target. FewRows keeps weights in registers; FillPanel and Block work through a
// panel of float weights. Both add the columns of an output one after the other, so they give the
// same bits.
#if defined(SLUICE_KERNELS_CPU_MATMUL_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SLUICE_KERNELS_CPU_MATMUL_INL_H_
#undef SLUICE_KERNELS_CPU_MATMUL_INL_H_
#else
#define SLUICE_KERNELS_CPU_MATMUL_INL_H_
#endif

#include <algorithm>
#include <array>
#include <utility>

#include "hwy/highway.h"
#include "kernels/cpu/dequantize-inl.h"
#include "kernels/cpu/matmul.h"

HWY_BEFORE_NAMESPACE();
namespace sluice {
namespace HWY_NAMESPACE {

// --- Few rows: weights go from codes to registers to the sums ---

// Rows that are worked on together are 1, 2, 4 or kMaxFewRows; a step with another number repeats
// its last row. Above, sums no longer fit in registers beside codes and parameters.
constexpr int kMaxFewRows = kLanes >= 16 ? 8 : 4;
constexpr int RoundUpRows(int64_t rows) {
  return rows <= 1 ? 1 : rows <= 2 ? 2 : rows <= 4 ? 4 : 8;
}

// Tiles side by side: as many chains of adds as hide the latency of one (4 cycles, 1 or 2 a cycle),
// and few enough that codes, parameters and sums of all of them stay in registers.
constexpr int TilesFor(int rows) {
  if (kLanes >= 16) return rows <= 2 ? 4 : 2;
  return rows == 1 ? 2 : 1;
}

// x: the inputs of one column, one a row.
template <Coding kCoding, int kRows, int kTiles>
HWY_INLINE void AddColumn(const CodeTable& table, Decoder<kCoding> (&tiles)[kTiles], const float* x,
                          VF (&sums)[kRows][kTiles][kVecs]) {
  const DF df;
  for (int t = 0; t < kTiles; ++t) {
    for (int v = 0; v < kVecs; ++v) {
      const VF weights = tiles[t].Weights(table, v);
      for (int r = 0; r < kRows; ++r)
        sums[r][t][v] = hn::MulAdd(weights, hn::Set(df, x[r]), sums[r][t][v]);
    }
    tiles[t].Advance();
  }
}

// sums_out[(r * kTiles + t) * 16 + i] = row i of tile first + t times row r of x, which is
// [k][kRows]. A tile beyond the last is the last again.
template <Coding kCoding, int kRows>
HWY_NOINLINE void FewRows(const PackedPart& part, int64_t first, const float* x, float* sums_out) {
  using Tile = Decoder<kCoding>;
  constexpr int kTiles = TilesFor(kRows);
  const DF df;
  const CodeTable table(part.table.data());
  VF sums[kRows][kTiles][kVecs];
  for (auto& row : sums) {
    for (auto& tile : row) {
      for (VF& sum : tile) sum = hn::Zero(df);
    }
  }
  for (int64_t group = 0; group < part.groups; ++group) {
    Tile tiles[kTiles];
    for (int t = 0; t < kTiles; ++t) {
      tiles[t].SetGroup(part, part.Block(std::min(first + t, part.tiles - 1), group));
    }
    const int64_t columns = part.Columns(group);
    int64_t column = 0;
    for (; column + Tile::kStep <= columns; column += Tile::kStep) {
      for (auto& tile : tiles) tile.Load(column / Tile::kStep);
      for (int j = 0; j < Tile::kStep; ++j, x += kRows) AddColumn(table, tiles, x, sums);
    }
    if (column == columns) continue;
    for (auto& tile : tiles) tile.Load(column / Tile::kStep);
    for (; column < columns; ++column, x += kRows) AddColumn(table, tiles, x, sums);
  }
  for (auto& row : sums) {
    for (auto& tile : row) {
      for (int v = 0; v < kVecs; ++v) hn::StoreU(tile[v], df, sums_out + v * kLanes);
      sums_out += kTileRows;
    }
  }
}

struct FewRowsOf {
  const PackedPart& part;
  int64_t first;
  int rows;
  const float* x;
  float* sums;
  template <Coding kCoding>
  void operator()() const {
    if (rows == 1) return FewRows<kCoding, 1>(part, first, x, sums);
    if (rows == 2) return FewRows<kCoding, 2>(part, first, x, sums);
    if (rows == 4) return FewRows<kCoding, 4>(part, first, x, sums);
    if constexpr (kMaxFewRows == 8) FewRows<kCoding, 8>(part, first, x, sums);
  }
};

// --- Many rows: weights become a panel of floats, read by register blocks ---

// A register block of kBlockRows x kBlockTiles tiles of sums, beside one row of the panel and one
// input: 24 + 3 of 32 registers with AVX-512, 12 + 3 of 16 below.
constexpr int kBlockTiles = kLanes >= 16 ? 2 : 1;
constexpr int kBlockRows = kLanes >= 16 ? 12 : (kLanes >= 8 ? 6 : 3);
constexpr int kBlockVecs = kBlockTiles * kVecs;
constexpr int64_t kBlockWidth = kBlockTiles * kTileRows;

// panel[(column - begin) * kBlockWidth + i] = weight of row i of the tile at `column`, begin <=
// column < end, all in one group or over whole groups.
template <Coding kCoding>
HWY_NOINLINE void FillPanel(const PackedPart& part, int64_t tile, int64_t begin, int64_t end,
                            float* panel) {
  const DF df;
  const CodeTable table(part.table.data());
  Decoder<kCoding> decoder;
  constexpr int kStep = Decoder<kCoding>::kStep;
  for (int64_t group = begin / part.group_size; begin < end; ++group) {
    const int64_t group_begin = group * part.group_size;
    const int64_t group_end = std::min(end, group_begin + part.Columns(group));
    decoder.SetGroup(part, part.Block(tile, group));
    for (; begin < group_end; begin += kStep) {
      decoder.Load((begin - group_begin) / kStep);
      const int count = static_cast<int>(std::min<int64_t>(kStep, group_end - begin));
      for (int j = 0; j < count; ++j) {
        for (int v = 0; v < kVecs; ++v)
          hn::StoreU(decoder.Weights(table, v), df, panel + v * kLanes);
        decoder.Advance();
        panel += kBlockWidth;
      }
    }
    begin = group_end;
  }
}

struct FillPanelOf {
  const PackedPart& part;
  int64_t tile, begin, end;
  float* panel;
  template <Coding kCoding>
  void operator()() const {
    FillPanel<kCoding>(part, tile, begin, end, panel);
  }
};

// sums[r][:] (+)= sum over `columns` of x[r][column] * panel[column][:]; starts from 0 when
// `first`.
template <int kRows>
HWY_NOINLINE void Block(const FloatRows& x, const float* panel, int64_t columns, bool first,
                        float* sums) {
  const DF df;
  VF acc[kRows][kBlockVecs];
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kBlockVecs; ++v) {
      acc[r][v] = first ? hn::Zero(df) : hn::LoadU(df, sums + r * kBlockWidth + v * kLanes);
    }
  }
  for (int64_t column = 0; column < columns; ++column) {
    VF w[kBlockVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kBlockVecs; ++v)
      w[v] = hn::LoadU(df, panel + column * kBlockWidth + v * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const VF input = hn::Set(df, x.data[r * x.stride + column]);
#pragma GCC unroll 4
      for (int v = 0; v < kBlockVecs; ++v) acc[r][v] = hn::MulAdd(w[v], input, acc[r][v]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kBlockVecs; ++v)
      hn::StoreU(acc[r][v], df, sums + r * kBlockWidth + v * kLanes);
  }
}

using BlockFunction = void (*)(const FloatRows&, const float*, int64_t, bool, float*);
template <int... kRows>
constexpr std::array<BlockFunction, sizeof...(kRows)> BlockTable(
    std::integer_sequence<int, kRows...>) {
  return {&Block<kRows + 1>...};
}
constexpr auto kBlocks = BlockTable(std::make_integer_sequence<int, kBlockRows>());

}  // namespace HWY_NAMESPACE
}  // namespace sluice
HWY_AFTER_NAMESPACE();
#endif
