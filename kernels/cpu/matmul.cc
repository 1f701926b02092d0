#include "kernels/cpu/matmul.h"

#include <algorithm>
#include <utility>

#include "kernels/core/check.h"
#include "kernels/core/status_macros.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/matmul.cc"
#include "hwy/foreach_target.h"  // Must come before the includes below
// clang-format off
#include "hwy/highway.h"
#include "kernels/cpu/activation-inl.h"
#include "kernels/cpu/matmul-inl.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace sluice {
namespace HWY_NAMESPACE {

// --- Where sums go ---

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

// --- Many rows ---

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

// --- The whole product ---

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

// x: [k][rows] with rows one of 1, 2, 4, 8, of which the first `count` are real.
void MultiplyFew(Run run, const float* x, int rows, int64_t count, const MatMulOutput& out,
                 ThreadPool& pool) {
  const int64_t tiles = TilesFor(rows);
  pool.ParallelFor(CountUnits(run, tiles), [&](int64_t unit, int) {
    const auto [part, first] = UnitAt(run, unit, tiles);
    HWY_ALIGN float sums[kMaxFewRows * TilesFor(kMaxFewRows) * kTileRows];
    static_assert(sizeof(sums) >= sizeof(float) * TilesFor(1) * kTileRows);
    WithCoding(*part, FewRowsOf{*part, first, rows, x, sums});
    for (int64_t m = 0; m < count; ++m) {
      for (int64_t t = 0; t < tiles && first + t < part->tiles; ++t) {
        const int64_t n = (first + t) * kTileRows;
        Finish(out, sums + (m * tiles + t) * kTileRows, m, part->n_begin + n,
               std::min(kTileRows, part->n - n));
      }
    }
  });
}

void MultiplyMany(Run run, const FloatRows& x, const MatMulOutput& out, MatMulScratch& scratch,
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

// Transposes x, in the order of the part's columns, to [k][rows]; rows beyond the last repeat it.
const float* GatherFew(const PackedPart& part, const FloatRows& x, int rows,
                       MatMulScratch& scratch) {
  if (rows == 1 && part.perm == nullptr) return x.data;
  float* to = scratch.gathered(rows, part.k);
  for (int r = 0; r < rows; ++r) {
    const float* from = x.data + std::min<int64_t>(r, x.rows - 1) * x.stride;
    for (int64_t i = 0; i < part.k; ++i)
      to[i * rows + r] = from[part.perm == nullptr ? i : part.perm[i]];
  }
  return to;
}

// x in the order of the part's columns, in rows that do not fall on each other in the first-level
// cache.
FloatRows GatherMany(const PackedPart& part, const FloatRows& x, MatMulScratch& scratch,
                     ThreadPool& pool) {
  constexpr int64_t kPageFloats = 1024;
  if (part.perm == nullptr && x.stride % kPageFloats != 0) return x;
  const int64_t stride = PaddedStride(part.k);
  float* to = scratch.gathered(x.rows, stride);
  pool.ParallelFor(x.rows, [&](int64_t m, int) {
    const float* from = x.data + m * x.stride;
    float* row = to + m * stride;
    for (int64_t i = 0; i < part.k; ++i) row[i] = from[part.perm == nullptr ? i : part.perm[i]];
  });
  return {to, x.rows, stride};
}

void RunParts(Run run, const FloatRows& x, const MatMulOutput& out, MatMulScratch& scratch,
              ThreadPool& pool) {
  if (x.rows > kMaxFewRows)
    return MultiplyMany(run, GatherMany(run[0], x, scratch, pool), out, scratch, pool);
  const int rows = RoundUpRows(x.rows);
  MultiplyFew(run, GatherFew(run[0], x, rows, scratch), rows, x.rows, out, pool);
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

}  // namespace

MatMulScratch::MatMulScratch(int num_threads)
    : memory_(static_cast<size_t>(num_threads) * kThreadFloats * sizeof(float)) {}

absl::Status MatMulScratch::ReserveGathered(int64_t max_rows, int64_t max_k) {
  constexpr int64_t kMaxRepeated = 8;  // Few rows are filled up to this number
  const int64_t rows = std::max(max_rows, kMaxRepeated);
  const int64_t bytes = rows * PaddedStride(max_k) * static_cast<int64_t>(sizeof(float));
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
    HWY_DYNAMIC_DISPATCH(RunParts)(parts.subspan(begin, end - begin), x, out, scratch, pool);
  }
}

const char* SimdTargetName() { return HWY_DYNAMIC_DISPATCH(TargetName)(); }

}  // namespace sluice
#endif  // HWY_ONCE
