// The operations of the CPU backend that are not products: one function per source file, called by
// cpu_backend.cc. All views are float32 in host memory. Results depend on a row's own inputs alone
// (kernels/backend.h).
#pragma once

#include <cstdint>

#include "absl/types/span.h"
#include "kernels/backend.h"
#include "kernels/cpu/matmul.h"
#include "kernels/cpu/pack.h"
#include "kernels/cpu/thread_pool.h"

namespace sluice {

// A piece of work below which a helper costs more than it gives: about 10 microseconds of one
// thread.
constexpr int64_t kFloatsPerPiece = 32768;

// y[m] = norm(x[rows[m]]), or of x[m] when rows is empty. y may be x when rows is empty. norm.cc
void NormRows(const Norm& norm, TensorView x, absl::Span<const int64_t> rows, TensorView y,
              ThreadPool& pool);

// y[m] = act(g) * u, where g and u are the halves of row m of gate_up [M, 2 * y.cols].
// activation.cc
void GateUp(TensorView gate_up, Activation act, TensorView y, ThreadPool& pool);

// out[m] = row ids[m] of table, or added to it. `scratch` holds table.k() floats per thread, for
// the latter. embedding.cc
void EmbedRows(const CpuPackedMatrix& table, absl::Span<const uint32_t> ids, TensorView out,
               ThreadPool& pool);
void AddEmbeddedRows(const CpuPackedMatrix& table, absl::Span<const uint32_t> ids, TensorView x,
                     float* scratch, ThreadPool& pool);

// cos and sin [M, half_dim] of positions[m] * inv_freq[m][i], times scale; the product is rounded
// to float as the libraries do. rope.cc
void FillRopeTable(absl::Span<const uint32_t> positions, absl::Span<const float* const> inv_freq,
                   float scale, float* cos, float* sin, int64_t half_dim);

// Turns q and k of qkv in place and writes k and v to the cache. rope.cc
void RopeAndWrite(TensorView qkv, const RopeRows* rope, absl::Span<const SequenceRows> sequences,
                  const KvLayer& kv, ThreadPool& pool);

// Memory that Attention needs per thread, in floats, for contexts of up to max_context.
int64_t AttentionScratchFloats(int64_t max_context);

// attention.cc. The threads that share an attention, and `stride` floats of scratch for each.
struct AttentionThreads {
  ThreadPool& pool;
  float* scratch = nullptr;
  int64_t stride = 0;
};
void Attention(TensorView qkv, absl::Span<const SequenceRows> sequences, const KvLayer& kv,
               float scale, TensorView out, const AttentionThreads& threads);

// The cache of one layer on the CPU. A block of one KV head holds v as [block_size, head_dim] and k
// turned to [head_dim, block_size]: 16 neighbouring keys are then one vector, and a score is a
// chain over head_dim without a sum across lanes.
struct KvBlock {
  float* k = nullptr;
  float* v = nullptr;
};
inline KvBlock KvBlockAt(const KvLayer& kv, uint32_t block, int64_t head) {
  const int64_t offset =
      (static_cast<int64_t>(block) * kv.num_kv_heads + head) * kv.block_size * kv.head_dim;
  return {static_cast<float*>(kv.k) + offset, static_cast<float*>(kv.v) + offset};
}

}  // namespace sluice
