// Paged attention in three passes over the keys of a row: scores, softmax, weighted sum of v. Each
// score is a chain over head_dim, each output a chain over the keys in order of position, and the
// softmax sums its lanes in a fixed order, so a row's result depends on its own position alone; how
// many queries share a pass is free.
#include <algorithm>
#include <array>
#include <limits>
#include <utility>

#include "kernels/core/check.h"
#include "kernels/cpu/ops.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/attention.cc"
#include "hwy/foreach_target.h"  // Must come before highway.h
// clang-format off
#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"
// clang-format on

#ifndef SLUICE_KERNELS_CPU_ATTENTION_ONCE
#define SLUICE_KERNELS_CPU_ATTENTION_ONCE
namespace sluice {

constexpr int64_t kKeyTile = 16;     // Keys of one score vector
constexpr int64_t kMaxQueries = 12;  // Queries that share a pass over the keys of one KV head
constexpr int64_t kMaxHeadDim = 512;

// Queries of one KV head that one thread works on; query i sees keys 0 .. counts[i] - 1.
struct QueryGroup {
  int64_t size = 0;
  int64_t head = 0;  // KV head
  std::array<const float*, kMaxQueries> q;
  std::array<float*, kMaxQueries> out;
  std::array<float*, kMaxQueries> scores;
  std::array<int64_t, kMaxQueries> counts;
  const uint32_t* block_table = nullptr;
};

}  // namespace sluice
#endif

HWY_BEFORE_NAMESPACE();
namespace sluice {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::CappedTag<float, kKeyTile>;
using VF = hn::Vec<DF>;
constexpr int kLanes = static_cast<int>(hn::MaxLanes(DF()));
constexpr int kVecs = static_cast<int>(kKeyTile) / kLanes;
constexpr int kSumVecs = 4;                        // Vectors of an output row in registers
constexpr int kQueryBlock = kLanes >= 16 ? 6 : 3;  // 24 sums of 32 registers, or 12 of 16

// --- Scores ---

// scores[r][position + 16 t ..] = q[r] * keys of tile t; a tile is [head_dim][stride] with 16 keys
// of interest.
template <int kRows, int kTiles>
HWY_INLINE void ScoreTiles(const QueryGroup& group, int64_t first, const float* const* tiles,
                           int64_t stride, int64_t head_dim, int64_t position) {
  const DF df;
  VF acc[kRows][kTiles][kVecs];
  for (auto& row : acc) {
    for (auto& tile : row) {
      for (VF& sum : tile) sum = hn::Zero(df);
    }
  }
  for (int64_t i = 0; i < head_dim; ++i) {
    for (int t = 0; t < kTiles; ++t) {
      for (int v = 0; v < kVecs; ++v) {
        const VF k = hn::LoadU(df, tiles[t] + i * stride + v * kLanes);
        for (int r = 0; r < kRows; ++r) {
          acc[r][t][v] = hn::MulAdd(k, hn::Set(df, group.q[first + r][i]), acc[r][t][v]);
        }
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int t = 0; t < kTiles; ++t) {
      float* to = group.scores[first + r] + position + t * kKeyTile;
      for (int v = 0; v < kVecs; ++v) hn::StoreU(acc[r][t][v], df, to + v * kLanes);
    }
  }
}

// All scores of kRows queries from `first`, where tiles of 16 keys lie within blocks.
template <int kRows>
HWY_NOINLINE void ScoresInTiles(const QueryGroup& group, int64_t first, int64_t count,
                                const KvLayer& kv) {
  constexpr int kTiles =
      kRows == 1 ? 4 : (kRows <= 3 ? 2 : 1);  // Enough chains to hide the latency of an add
  const auto tile_at = [&](int64_t position) {
    const KvBlock block = KvBlockAt(kv, group.block_table[position / kv.block_size], group.head);
    return block.k + position % kv.block_size;
  };
  int64_t position = 0;
  for (; position + (kTiles - 1) * kKeyTile < count; position += kTiles * kKeyTile) {
    const float* tiles[kTiles];
    for (int t = 0; t < kTiles; ++t) tiles[t] = tile_at(position + t * kKeyTile);
    ScoreTiles<kRows, kTiles>(group, first, tiles, kv.block_size, kv.head_dim, position);
  }
  for (; position < count; position += kKeyTile) {
    const float* tile = tile_at(position);
    ScoreTiles<kRows, 1>(group, first, &tile, kv.block_size, kv.head_dim, position);
  }
}

// The same where the block size is no multiple of 16: tiles go through a copy.
HWY_NOINLINE void ScoresThroughCopy(const QueryGroup& group, int64_t first, int64_t count,
                                    const KvLayer& kv) {
  HWY_ALIGN float copy[kMaxHeadDim * kKeyTile];
  const float* tile = copy;
  for (int64_t position = 0, keys = 0; position < count; position += keys) {
    const int64_t slot = position % kv.block_size;
    keys = std::min(kKeyTile, kv.block_size - slot);
    const KvBlock block = KvBlockAt(kv, group.block_table[position / kv.block_size], group.head);
    for (int64_t i = 0; i < kv.head_dim; ++i) {
      float* to = copy + i * kKeyTile;
      std::fill(std::copy_n(block.k + i * kv.block_size + slot, keys, to), to + kKeyTile, 0.0f);
    }
    ScoreTiles<1, 1>(group, first, &tile, kKeyTile, kv.head_dim, position);
  }
}

// --- Softmax ---

// scores[0 .. count) become e^(scale * (score - max)); returns their sum. What lies behind is
// ignored.
HWY_NOINLINE float Exponentials(float* scores, int64_t count, float scale) {
  const DF df;
  const VF lowest = hn::Set(df, -std::numeric_limits<float>::infinity());
  const VF vscale = hn::Set(df, scale);
  const int64_t whole = count / kLanes * kLanes;
  const auto rest = hn::FirstN(df, static_cast<size_t>(count - whole));
  VF max = lowest;
  for (int64_t i = 0; i < whole; i += kLanes) {
    const VF score = hn::Mul(hn::LoadU(df, scores + i), vscale);
    hn::StoreU(score, df, scores + i);
    max = hn::Max(max, score);
  }
  const VF last = hn::IfThenElse(rest, hn::Mul(hn::LoadU(df, scores + whole), vscale), lowest);
  if (whole < count) hn::StoreU(last, df, scores + whole);
  max = hn::MaxOfLanes(df, hn::Max(max, last));
  VF sum = hn::Zero(df);
  for (int64_t i = 0; i < count; i += kLanes) {
    const VF weight = hn::Exp(df, hn::Sub(hn::LoadU(df, scores + i), max));
    hn::StoreU(weight, df, scores + i);
    sum = hn::Add(sum, i < whole ? weight : hn::IfThenElseZero(rest, weight));
  }
  return hn::GetLane(hn::SumOfLanes(df, sum));
}

// --- Weighted sum ---

// out[r][i ..] += sum over keys begin .. end of weight * v, for kRows queries from `first` and
// kCount vectors of D.
template <int kRows, int kCount, class D>
HWY_NOINLINE void SumValues(const QueryGroup& group, int64_t first, int64_t begin, int64_t end,
                            const KvLayer& kv, int64_t i) {
  const D d;
  constexpr int64_t kWidth = static_cast<int64_t>(hn::MaxLanes(D()));
  hn::Vec<D> acc[kRows][kCount];
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kCount; ++c)
      acc[r][c] = hn::LoadU(d, group.out[first + r] + i + c * kWidth);
  }
  for (int64_t key = begin; key < end;) {
    const KvBlock block = KvBlockAt(kv, group.block_table[key / kv.block_size], group.head);
    const float* v = block.v + key % kv.block_size * kv.head_dim + i;
    const int64_t block_end = std::min(end, (key / kv.block_size + 1) * kv.block_size);
    for (; key < block_end; ++key, v += kv.head_dim) {
      hn::Vec<D> values[kCount];
      for (int c = 0; c < kCount; ++c) values[c] = hn::LoadU(d, v + c * kWidth);
      for (int r = 0; r < kRows; ++r) {
        const auto weight = hn::Set(d, group.scores[first + r][key]);
        for (int c = 0; c < kCount; ++c) acc[r][c] = hn::MulAdd(values[c], weight, acc[r][c]);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kCount; ++c)
      hn::StoreU(acc[r][c], d, group.out[first + r] + i + c * kWidth);
  }
}

template <int kRows>
void SumRows(const QueryGroup& group, int64_t first, int64_t begin, int64_t end,
             const KvLayer& kv) {
  int64_t i = 0;
  for (; i + kSumVecs * kLanes <= kv.head_dim; i += kSumVecs * kLanes) {
    SumValues<kRows, kSumVecs, DF>(group, first, begin, end, kv, i);
  }
  for (; i + kLanes <= kv.head_dim; i += kLanes)
    SumValues<kRows, 1, DF>(group, first, begin, end, kv, i);
  for (; i < kv.head_dim; ++i)
    SumValues<kRows, 1, hn::CappedTag<float, 1>>(group, first, begin, end, kv, i);
}

// --- One group ---

// Queries first .. first + kRows of the group.
template <int kRows>
void AttendRows(const QueryGroup& group, int64_t first, const KvLayer& kv, float scale) {
  const auto counts = group.counts.begin() + first;
  const int64_t most = *std::max_element(counts, counts + kRows);
  const int64_t least = *std::min_element(counts, counts + kRows);
  if (kv.block_size % kKeyTile == 0) {
    ScoresInTiles<kRows>(group, first, most, kv);
  } else {
    for (int64_t r = first; r < first + kRows; ++r)
      ScoresThroughCopy(group, r, group.counts[r], kv);
  }
  std::array<float, kRows> sums;
  for (int64_t r = 0; r < kRows; ++r) {
    sums[r] = Exponentials(group.scores[first + r], counts[r], scale);
    std::fill_n(group.out[first + r], kv.head_dim, 0.0f);
  }
  SumRows<kRows>(group, first, 0, least, kv);
  for (int64_t r = 0; r < kRows; ++r) {
    if (counts[r] > least) SumRows<1>(group, first + r, least, counts[r], kv);
    const float inverse = 1.0f / sums[r];
    float* out = group.out[first + r];
    for (int64_t i = 0; i < kv.head_dim; ++i) out[i] *= inverse;
  }
}

using AttendFunction = void (*)(const QueryGroup&, int64_t, const KvLayer&, float);
template <int... kRows>
constexpr std::array<AttendFunction, sizeof...(kRows)> AttendTable(
    std::integer_sequence<int, kRows...>) {
  return {&AttendRows<kRows + 1>...};
}
constexpr auto kAttend = AttendTable(std::make_integer_sequence<int, kQueryBlock>());

void Attend(const QueryGroup& group, const KvLayer& kv, float scale) {
  for (int64_t first = 0; first < group.size; first += kQueryBlock) {
    kAttend[std::min<int64_t>(kQueryBlock, group.size - first) - 1](group, first, kv, scale);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace sluice
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace sluice {
namespace {

HWY_EXPORT(Attend);

int64_t ScoreStride(int64_t max_context) {
  return (max_context + kKeyTile - 1) / kKeyTile * kKeyTile + kKeyTile;
}

int64_t DivideUp(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How the rows and heads of a step are cut into groups.
struct Cut {
  int64_t heads;         // Query heads of a group
  int64_t heads_per_kv;  // Query heads of a KV head
  int64_t num_kv_heads;
  int64_t head_dim;

  int64_t rows() const { return kMaxQueries / heads; }
  int64_t head_groups() const { return num_kv_heads * DivideUp(heads_per_kv, heads); }
  int64_t Pieces(const SequenceRows& sequence) const {
    return DivideUp(sequence.num_rows, rows()) * head_groups();
  }
};

// Heads that share a KV head go together, unless that leaves threads without work.
Cut MakeCut(int64_t num_heads, int64_t total_rows, const KvLayer& kv, int num_threads) {
  constexpr int64_t kPiecesPerThread = 4;
  const int64_t per_kv = num_heads / kv.num_kv_heads;
  const bool few = num_threads > 1 && total_rows * kv.num_kv_heads < kPiecesPerThread * num_threads;
  return {few ? 1 : std::min(per_kv, kMaxQueries), per_kv, kv.num_kv_heads, kv.head_dim};
}

QueryGroup GroupAt(const Cut& cut, const SequenceRows& sequence, int64_t piece, TensorView qkv,
                   TensorView out) {
  QueryGroup group;
  const int64_t head_group = piece % cut.head_groups();
  const int64_t groups_per_kv = DivideUp(cut.heads_per_kv, cut.heads);
  group.head = head_group / groups_per_kv;
  group.block_table = sequence.block_table;
  const int64_t head_begin = head_group % groups_per_kv * cut.heads;
  const int64_t head_end = std::min(cut.heads_per_kv, head_begin + cut.heads);
  const int64_t row_begin = piece / cut.head_groups() * cut.rows();
  const int64_t row_end = std::min(sequence.num_rows, row_begin + cut.rows());
  for (int64_t row = row_begin; row < row_end; ++row) {
    for (int64_t head = head_begin; head < head_end; ++head) {
      const int64_t column = (group.head * cut.heads_per_kv + head) * cut.head_dim;
      group.q[group.size] = qkv.Row(sequence.row_begin + row) + column;
      group.out[group.size] = out.Row(sequence.row_begin + row) + column;
      group.counts[group.size++] = sequence.start_pos + row + 1;
    }
  }
  return group;
}

}  // namespace

int64_t AttentionScratchFloats(int64_t max_context) {
  return kMaxQueries * ScoreStride(max_context);
}

void Attention(TensorView qkv, absl::Span<const SequenceRows> sequences, const KvLayer& kv,
               float scale, TensorView out, const AttentionThreads& threads) {
  SLUICE_CHECK(kv.head_dim <= kMaxHeadDim) << kv.head_dim;
  const int64_t num_heads = out.cols / kv.head_dim;
  SLUICE_CHECK(out.cols % kv.head_dim == 0 && num_heads % kv.num_kv_heads == 0) << out.cols;
  SLUICE_CHECK(qkv.cols == out.cols + 2 * kv.num_kv_heads * kv.head_dim) << qkv.cols;
  int64_t rows = 0;
  for (const SequenceRows& sequence : sequences) rows += sequence.num_rows;
  const Cut cut = MakeCut(num_heads, rows, kv, threads.pool.num_threads());
  int64_t pieces = 0;
  for (const SequenceRows& sequence : sequences) pieces += cut.Pieces(sequence);
  const auto attend = HWY_DYNAMIC_DISPATCH(Attend);
  threads.pool.ParallelFor(pieces, [&](int64_t index, int thread) {
    // Late rows see the most keys: largest pieces first.
    int64_t piece = pieces - 1 - index;
    size_t s = 0;
    for (; piece >= cut.Pieces(sequences[s]); ++s) piece -= cut.Pieces(sequences[s]);
    QueryGroup group = GroupAt(cut, sequences[s], piece, qkv, out);
    const int64_t stride =
        ScoreStride(*std::max_element(group.counts.begin(), group.counts.begin() + group.size));
    SLUICE_CHECK(stride * kMaxQueries <= threads.stride) << "a context exceeds Reserve";
    for (int64_t i = 0; i < group.size; ++i)
      group.scores[i] = threads.scratch + thread * threads.stride + i * stride;
    attend(group, kv, scale);
  });
}

}  // namespace sluice
#endif  // HWY_ONCE
