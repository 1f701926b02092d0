#include "kernels/cpu/matmul.h"

#include <algorithm>
#include <array>
#include <utility>

#include "kernels/core/check.h"
#include "kernels/core/status_macros.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/matmul.cc"
#include "hwy/foreach_target.h"  // Must come before the includes below
// clang-format off
#include "hwy/highway.h"
#include "kernels/cpu/activation-inl.h"
#include "kernels/cpu/dequantize-inl.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace sluice {
namespace HWY_NAMESPACE {

// --- Where sums go
// --------------------------------------------------------------------------------------------------

// Finishes 16 sums of row m, columns n .. n + count (count <= 16).
HWY_INLINE void Finish(const MatMulOutput& out, const float* sums, int64_t m, int64_t n,
                       int64_t count) {
  const DF df;
  HWY_ALIGN float bias[kTileRows] = {};
  HWY_ALIGN float old[kTileRows] = {};
  float* y = out.y + m * out.stride + n;
  const bool whole = count == kTileRows;
  const float* bias_from = out.bias == nullptr ? nullptr : out.bias + n;
  const float* old_from = y;
  if (!whole) {  // Through copies: nothing beyond the matrix is read or written
    if (out.bias != nullptr) bias_from = std::copy_n(bias_from, count, bias) - count;
    if (out.add) old_from = std::copy_n(y, count, old) - count;
  }
  float* to = whole ? y : old;
  for (int v = 0; v < kVecs; ++v) {
    VF sum = hn::LoadU(df, sums + v * kLanes);
    if (bias_from != nullptr) sum = hn::Add(sum, hn::LoadU(df, bias_from + v * kLanes));
    sum = Activate(df, out.act, sum);
    if (out.add) sum = hn::Add(hn::LoadU(df, old_from + v * kLanes), sum);
    hn::StoreU(sum, df, to + v * kLanes);
  }
  if (!whole) std::copy_n(old, count, y);
}

// --- One row: weights go from codes to registers to the sum
// ---------------------------------------------------------

// Tiles side by side: as many chains of adds as hide the latency of one (4 cycles, 1 or 2 a cycle),
// and few enough that codes, parameters and sums of all of them stay in registers.
constexpr int kRowTiles = kLanes >= 16 ? 4 : 2;

template <Coding kCoding>
HWY_INLINE void AddColumn(const CodeTable& table, Decoder<kCoding> (&tiles)[kRowTiles], VF x,
                          VF (&sums)[kRowTiles][kVecs]) {
  for (int t = 0; t < kRowTiles; ++t) {
    for (int v = 0; v < kVecs; ++v)
      sums[t][v] = hn::MulAdd(tiles[t].Weights(table, v), x, sums[t][v]);
    tiles[t].Advance();
  }
}

// sums[t * 16 + i] = row i of tile first + t times x. A tile beyond the last is the last again.
template <Coding kCoding>
HWY_NOINLINE void OneRow(const PackedPart& part, int64_t first, const float* x, float* sums_out) {
  const DF df;
  using Tile = Decoder<kCoding>;
  const CodeTable table(part.table.data());
  VF sums[kRowTiles][kVecs];
  for (auto& tile : sums) {
    for (VF& sum : tile) sum = hn::Zero(df);
  }
  for (int64_t group = 0; group < part.groups; ++group) {
    Tile tiles[kRowTiles];
    for (int t = 0; t < kRowTiles; ++t) {
      tiles[t].SetGroup(part, part.Block(std::min(first + t, part.tiles - 1), group));
    }
    const int64_t columns = part.Columns(group);
    int64_t column = 0;
    for (; column + Tile::kStep <= columns; column += Tile::kStep) {
      for (auto& tile : tiles) tile.Load(column / Tile::kStep);
      for (int j = 0; j < Tile::kStep; ++j)
        AddColumn(table, tiles, hn::Set(df, x[column + j]), sums);
    }
    if (column < columns) {
      for (auto& tile : tiles) tile.Load(column / Tile::kStep);
      for (; column < columns; ++column) AddColumn(table, tiles, hn::Set(df, x[column]), sums);
    }
    x += columns;
  }
  for (int t = 0; t < kRowTiles; ++t) {
    for (int v = 0; v < kVecs; ++v)
      hn::StoreU(sums[t][v], df, sums_out + t * kTileRows + v * kLanes);
  }
}

struct OneRowOf {
  const PackedPart& part;
  int64_t first;
  const float* x;
  float* sums;
  template <Coding kCoding>
  void operator()() const {
    OneRow<kCoding>(part, first, x, sums);
  }
};

// --- Many rows: weights become a panel of floats, read by register blocks
// -------------------------------------------

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

// End of the panel that begins at column k: at a group's end, or a multiple of 8 within a long
// group.
int64_t PanelEnd(const PackedPart& part, int64_t k, int64_t max_columns) {
  if (part.group_size <= max_columns)
    return std::min(part.k, k + max_columns / part.group_size * part.group_size);
  const int64_t group_end = std::min(part.k, (k / part.group_size + 1) * part.group_size);
  return std::min(group_end, k + max_columns);
}

// One thread's piece of a product: tiles first .. first + kBlockTiles of a part, rows m_begin ..
// m_end.
struct Piece {
  const PackedPart& part;
  int64_t first, m_begin, m_end;
};

void FinishBlock(const Piece& piece, const MatMulOutput& out, int64_t m, int64_t rows,
                 const float* sums) {
  const PackedPart& part = piece.part;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t t = 0; t < kBlockTiles; ++t) {
      const int64_t n = (piece.first + t) * kTileRows;
      if (n >= part.n) break;
      Finish(out, sums + r * kBlockWidth + t * kTileRows, m + r, part.n_begin + n,
             std::min(kTileRows, part.n - n));
    }
  }
}

void ManyRows(const Piece& piece, const FloatRows& x, const MatMulOutput& out, float* panel,
              float* sums) {
  const PackedPart& part = piece.part;
  // With few rows a panel is used up at once: keep it in the first-level cache.
  const int64_t max_columns =
      piece.m_end - piece.m_begin <= 2 * kBlockRows ? 128 : MatMulScratch::kMaxPanelColumns;
  for (int64_t k = 0, end = 0; k < part.k; k = end) {
    end = PanelEnd(part, k, max_columns);
    for (int t = 0; t < kBlockTiles; ++t) {
      const int64_t tile = std::min(piece.first + t, part.tiles - 1);
      WithCoding(part, FillPanelOf{part, tile, k, end, panel + t * kTileRows});
    }
    for (int64_t m = piece.m_begin; m < piece.m_end; m += kBlockRows) {
      const int64_t rows = std::min<int64_t>(kBlockRows, piece.m_end - m);
      float* block = sums + (m - piece.m_begin) * kBlockWidth;
      const FloatRows input = {x.data + m * x.stride + k, rows, x.stride};
      kBlocks[rows - 1](input, panel, end - k, k == 0, block);
      if (end == part.k) FinishBlock(piece, out, m, rows, block);
    }
  }
}

// --- The whole product
// ----------------------------------------------------------------------------------------------

// Parts that read the same input.
using Run = absl::Span<const PackedPart>;

// The part and the tile within it of unit `unit`, where each part is cut into units of `tiles`
// tiles.
std::pair<const PackedPart*, int64_t> UnitAt(Run run, int64_t unit, int64_t tiles) {
  for (const PackedPart& part : run) {
    const int64_t units = (part.tiles + tiles - 1) / tiles;
    if (unit < units) return {&part, unit * tiles};
    unit -= units;
  }
  SLUICE_CHECK(false) << "unit beyond the matrix";
  return {};
}

int64_t CountUnits(Run run, int64_t tiles) {
  int64_t units = 0;
  for (const PackedPart& part : run) units += (part.tiles + tiles - 1) / tiles;
  return units;
}

void MatVec(Run run, const float* x, const MatMulOutput& out, ThreadPool& pool) {
  pool.ParallelFor(CountUnits(run, kRowTiles), [&](int64_t unit, int) {
    const auto [part, first] = UnitAt(run, unit, kRowTiles);
    HWY_ALIGN float sums[kRowTiles * kTileRows];
    WithCoding(*part, OneRowOf{*part, first, x, sums});
    for (int64_t t = 0; t < kRowTiles && first + t < part->tiles; ++t) {
      const int64_t n = (first + t) * kTileRows;
      Finish(out, sums + t * kTileRows, 0, part->n_begin + n, std::min(kTileRows, part->n - n));
    }
  });
}

void MatMat(Run run, const FloatRows& x, const MatMulOutput& out, MatMulScratch& scratch,
            ThreadPool& pool) {
  const int64_t units = CountUnits(run, kBlockTiles);
  // Rows are cut when they exceed the scratch, or when there are too few units to keep all threads
  // busy to the end.
  constexpr int64_t kPiecesPerThread = 4;
  constexpr int64_t kMinRows =
      4 * kBlockRows;  // Below, turning codes to floats would cost more than a fifth
  int64_t cuts = (x.rows + MatMulScratch::kMaxRows - 1) / MatMulScratch::kMaxRows;
  if (pool.num_threads() > 1) {
    const int64_t wanted = (kPiecesPerThread * pool.num_threads() + units - 1) / units;
    cuts = std::max(cuts, std::min(wanted, x.rows / kMinRows));
  }
  const int64_t rows = ((x.rows + cuts - 1) / cuts + kBlockRows - 1) / kBlockRows * kBlockRows;
  cuts = (x.rows + rows - 1) / rows;
  pool.ParallelFor(units * cuts, [&](int64_t index, int thread) {
    const auto [part, first] = UnitAt(run, index % units, kBlockTiles);
    const int64_t m = index / units * rows;
    const Piece piece = {*part, first, m, std::min(x.rows, m + rows)};
    ManyRows(piece, x, out, scratch.panel(thread), scratch.sums(thread));
  });
}

void RunParts(Run run, const FloatRows& x, const MatMulOutput& out, MatMulScratch& scratch,
              ThreadPool& pool) {
  if (x.rows == 1) return MatVec(run, x.data, out, pool);
  MatMat(run, x, out, scratch, pool);
}

const char* TargetName() { return hwy::TargetName(HWY_TARGET); }

}  // namespace HWY_NAMESPACE
}  // namespace sluice
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace sluice {
namespace {

HWY_EXPORT(RunParts);
HWY_EXPORT(TargetName);

// The input in the order of the part's columns, in rows that do not fall on each other in the
// first-level cache.
FloatRows Gather(const PackedPart& part, const FloatRows& x, MatMulScratch& scratch,
                 ThreadPool& pool) {
  const int64_t stride = PaddedStride(part.k);
  float* to = scratch.gathered(x.rows, stride);
  pool.ParallelFor(x.rows, [&](int64_t m, int) {
    const float* from = x.data + m * x.stride;
    float* row = to + m * stride;
    if (part.perm == nullptr) {
      std::copy_n(from, part.k, row);
    } else {
      for (int64_t i = 0; i < part.k; ++i) row[i] = from[part.perm[i]];
    }
  });
  return {to, x.rows, stride};
}

}  // namespace

MatMulScratch::MatMulScratch(int num_threads)
    : memory_(static_cast<size_t>(num_threads) * kThreadFloats * sizeof(float)) {}

absl::Status MatMulScratch::ReserveGathered(int64_t max_rows, int64_t max_k) {
  const int64_t bytes = max_rows * PaddedStride(max_k) * static_cast<int64_t>(sizeof(float));
  if (bytes <= gathered_.bytes()) return absl::OkStatus();
  SLUICE_ASSIGN_OR_RETURN(gathered_, HostMemory::Allocate(bytes));
  return absl::OkStatus();
}

float* MatMulScratch::gathered(int64_t rows, int64_t stride) {
  SLUICE_CHECK(rows * stride * static_cast<int64_t>(sizeof(float)) <= gathered_.bytes())
      << "a step of " << rows << " rows exceeds Reserve";
  return gathered_.as<float>();
}

void MatMul(const CpuPackedMatrix& w, const FloatRows& x, const MatMulOutput& out,
            MatMulScratch& scratch, ThreadPool& pool) {
  if (x.rows == 0) return;
  const absl::Span<const PackedPart> parts = w.parts();
  for (size_t begin = 0, end = 0; begin < parts.size(); begin = end) {
    for (end = begin + 1; end < parts.size() && parts[end].perm == parts[begin].perm;) ++end;
    constexpr int64_t kPageFloats = 1024;
    const bool gather = parts[begin].perm != nullptr || (x.rows > 1 && x.stride % kPageFloats == 0);
    const FloatRows input = gather ? Gather(parts[begin], x, scratch, pool) : x;
    HWY_DYNAMIC_DISPATCH(RunParts)(parts.subspan(begin, end - begin), input, out, scratch, pool);
  }
}

const char* SimdTargetName() { return HWY_DYNAMIC_DISPATCH(TargetName)(); }

}  // namespace sluice
#endif  // HWY_ONCE
