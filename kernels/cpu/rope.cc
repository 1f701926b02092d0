#include <algorithm>
#include <cmath>

#include "kernels/core/check.h"
#include "kernels/cpu/ops.h"

namespace sluice {
namespace {

void TurnHead(const float* cos, const float* sin, int64_t half_dim, float* head) {
  float* second = head + half_dim;
  for (int64_t i = 0; i < half_dim; ++i) {
    const float a = head[i];
    const float b = second[i];
    head[i] = a * cos[i] - b * sin[i];
    second[i] = b * cos[i] + a * sin[i];
  }
}

// One row's k (turned to [head_dim, block_size]) and v behind it to slot `slot` of `block`.
void WriteKv(const float* k, const KvLayer& kv, uint32_t block, int64_t slot) {
  const float* v = k + kv.num_kv_heads * kv.head_dim;
  for (int64_t head = 0; head < kv.num_kv_heads; ++head) {
    const KvBlock to = KvBlockAt(kv, block, head);
    for (int64_t i = 0; i < kv.head_dim; ++i)
      to.k[i * kv.block_size + slot] = k[head * kv.head_dim + i];
    std::copy_n(v + head * kv.head_dim, kv.head_dim, to.v + slot * kv.head_dim);
  }
}

}  // namespace

void FillRopeTable(absl::Span<const uint32_t> positions, absl::Span<const float* const> inv_freq,
                   float scale, float* cos, float* sin, int64_t half_dim) {
  for (size_t m = 0; m < positions.size(); ++m) {
    for (int64_t i = 0; i < half_dim; ++i) {
      const float angle = static_cast<float>(positions[m]) * inv_freq[m][i];
      *cos++ = static_cast<float>(std::cos(static_cast<double>(angle))) * scale;
      *sin++ = static_cast<float>(std::sin(static_cast<double>(angle))) * scale;
    }
  }
}

void RopeAndWrite(TensorView qkv, const RopeRows* rope, absl::Span<const SequenceRows> sequences,
                  const KvLayer& kv, ThreadPool& pool) {
  const int64_t heads = qkv.cols / kv.head_dim;
  const int64_t num_heads = heads - 2 * kv.num_kv_heads;
  SLUICE_CHECK(qkv.cols % kv.head_dim == 0 && num_heads > 0) << qkv.cols << " columns";
  const int64_t half_dim = rope == nullptr ? 0 : rope->half_dim;
  SLUICE_CHECK(2 * half_dim <= kv.head_dim) << half_dim;
  const int64_t rows_per_piece = std::max<int64_t>(1, kFloatsPerPiece / 2 / qkv.cols);
  for (const SequenceRows& sequence : sequences) {
    pool.ParallelFor(
        (sequence.num_rows + rows_per_piece - 1) / rows_per_piece, [&](int64_t piece, int) {
          const int64_t end = std::min(sequence.num_rows, (piece + 1) * rows_per_piece);
          for (int64_t i = piece * rows_per_piece; i < end; ++i) {
            const int64_t m = sequence.row_begin + i;
            const int64_t position = sequence.start_pos + i;
            const uint32_t block = sequence.block_table[position / kv.block_size];
            SLUICE_CHECK(block < kv.num_blocks)
                << "block " << block << " beyond the pool of " << kv.num_blocks;
            float* row = qkv.Row(m);
            for (int64_t head = 0; rope != nullptr && head < num_heads + kv.num_kv_heads; ++head) {
              TurnHead(rope->cos + m * half_dim, rope->sin + m * half_dim, half_dim,
                       row + head * kv.head_dim);
            }
            WriteKv(row + num_heads * kv.head_dim, kv, block, position % kv.block_size);
          }
        });
  }
}

}  // namespace sluice
