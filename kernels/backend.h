// Backend: the operations of a decoder at the grain of fused kernels, for one device. worker/engine
// calls one operation per line; kernels/cpu is the reference and a real backend, kernels/cuda the
// fast one.
//
// What a result may depend on. CPU: a row's result depends on its own inputs alone. The order of
// every reduction is fixed by k and by tiles of keys, never by the number of rows, the chunk, the
// batch mates or the threads; so cutting a model over workers, or a prompt into chunks, changes no
// bit (same host, same SIMD target). CUDA: the same within one batch bucket.
//
// Lifetime: Load* calls may fail and allocate; step operations neither allocate nor fail, and a
// wrong shape is a CHECK failure. Threads: load calls are thread-safe; step operations belong to
// the one thread that owns the Backend. Every TensorView must lie in memory from Allocate() of this
// backend and have dtype activation_dtype() unless it says otherwise. Shapes use M = rows of the
// step (num_tokens), N = out features, K = in features.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kernels/backend_types.h"
#include "kernels/core/tensor.h"
#include "kernels/quant.h"
#include "kernels/sampling.h"

namespace sluice {

class Backend {
 public:
  virtual ~Backend() = default;

  virtual std::string Name() const = 0;        // "cpu (avx3, 2 threads)"
  virtual DType activation_dtype() const = 0;  // Also the dtype of the residual stream on the wire

  // --- Load --------------------------------------------------------------------------------
  // Packs matrices that share their input, stacked along n (q, k, v; gate, up), into one weight.
  // All have the same k. Formats, group sizes and perms may differ from one to the next.
  // RESOURCE_EXHAUSTED when the device has no memory left.
  virtual absl::StatusOr<std::unique_ptr<PackedMatrix>> Upload(
      absl::Span<const QuantizedMatrix* const> stacked) = 0;
  // The same for a weight whose rows i and i + pair_distance of each section of 2 * pair_distance
  // rows are used together: the halves of a rotated head, or gate and up. A backend may lay such
  // rows side by side and fuse what follows; results do not depend on it.
  virtual absl::StatusOr<std::unique_ptr<PackedMatrix>> UploadPaired(
      absl::Span<const QuantizedMatrix* const> stacked, int64_t pair_distance) {
    return Upload(stacked);
  }
  // The vectors (kPlain, n = 1) one after another, as float32.
  virtual absl::StatusOr<std::unique_ptr<DeviceVector>> UploadVector(
      absl::Span<const QuantizedMatrix* const> stacked) = 0;
  virtual absl::StatusOr<std::unique_ptr<DeviceBuffer>> Allocate(int64_t bytes) = 0;
  // Reserves scratch for steps of up to max_rows rows, the widest N and K of the shard, and
  // contexts of max_context.
  struct Workspace {
    int64_t max_rows = 0, max_n = 0, max_k = 0, max_heads = 0, max_context = 0;
    int64_t num_kv_heads = 0, head_dim = 0, block_size = 0;
    int64_t step_rows = 0;      // Most rows of a step, at most max_rows
    int64_t max_sequences = 0;  // Most sequences of a step, and most rows of logits
    int64_t vocab = 0;          // Columns of logits; 0 on stages before the last
  };
  virtual absl::Status Reserve(const Workspace& workspace) = 0;

  // --- Step --------------------------------------------------------------------------------
  // Begins a step: everything until the next BeginStep belongs to it.
  virtual void BeginStep(const StepRows& rows) {}
  // Runs `operations`: calls of the operations below that are the same, with the same tensors, for
  // every step of as many rows. A backend may record them the first time and replay them later,
  // without calling again.
  virtual void Run(StepPart part, absl::FunctionRef<void()> operations) { operations(); }

  // out[m] = row ids[m] of table; out [M, table.k].
  virtual void Embed(const PackedMatrix& table, absl::Span<const uint32_t> ids, TensorView out) = 0;
  // x[m] += row ids[m] of table (learned positions).
  virtual void AddEmbedding(const PackedMatrix& table, absl::Span<const uint32_t> ids,
                            TensorView x) = 0;

  // cos/sin of position * inv_freq for each row; inv_freq[m] points to half_dim floats for row
  // m. `scale` multiplies both.
  virtual RopeRows RopeTable(absl::Span<const uint32_t> positions,
                             absl::Span<const float* const> inv_freq, int64_t half_dim,
                             float scale) = 0;

  // y [M, N] = act(norm(x) * W^T + bias). y must not alias x.
  virtual void NormMatMul(const Norm& norm, TensorView x, const Linear& linear, Activation act,
                          TensorView y) = 0;
  // y [M, N/2] = act(g) * u, where g, u = the two halves of norm(x) * W^T + bias, W [N, K] = gate
  // stacked on up.
  virtual void NormGateUp(const Norm& norm, TensorView x, const Linear& gate_up, Activation act,
                          TensorView y) = 0;
  // residual [M, N] += x * W^T + bias.
  virtual void MatMulResidual(TensorView x, const Linear& linear, TensorView residual) = 0;
  // x = norm(x), in place.
  virtual void ApplyNorm(const Norm& norm, TensorView x) = 0;

  // qkv [M, (num_heads + 2 * num_kv_heads) * head_dim]: turns q and k in place (rope may be null)
  // and writes k and v of each row to its slot in the cache.
  virtual void RopeAndWriteKv(TensorView qkv, const RopeRows* rope,
                              absl::Span<const SequenceRows> sequences, const KvLayer& kv) = 0;
  // NormMatMul and RopeAndWriteKv in one; qkv is then for PagedAttention of the same layer, which must
  // follow, and for nothing else.
  virtual void NormQkv(const Norm& norm, TensorView x, const Linear& linear, const KvWrite& write,
                       TensorView qkv) {
    NormMatMul(norm, x, linear, Activation::kNone, qkv);
    RopeAndWriteKv(qkv, write.rope, write.sequences, *write.kv);
  }
  // out [M, num_heads * head_dim] = softmax(scale * q * K^T) * V, causal, over the cache. Query
  // head h reads KV head h / (num_heads / num_kv_heads). q = the first num_heads * head_dim columns
  // of qkv.
  virtual void PagedAttention(TensorView qkv, absl::Span<const SequenceRows> sequences,
                              const KvLayer& kv, float scale, TensorView out) = 0;

  // logits [R, vocab] float32 = norm(x[rows]) * W^T, R = rows.size().
  virtual void LmHead(const Norm& norm, TensorView x, absl::Span<const int64_t> rows,
                      const Linear& head, TensorView logits) = 0;
  // One result per request, in order; SamplingRow::row indexes logits.
  virtual void Sample(TensorView logits, absl::Span<const SamplingRow> rows,
                      absl::Span<SampledToken> out) = 0;
  // Log-probability of token `id` in row `row` and the top `count`, of the raw logits (prompt
  // logprobs).
  virtual SampledToken Score(TensorView logits, int64_t row, uint32_t id, int32_t count) = 0;

  // Copies between host and device memory; returns when done.
  virtual void CopyToHost(TensorView source, void* host) = 0;  // Dense rows of cols elements
  virtual void CopyFromHost(const void* host, TensorView target) = 0;
};

// A CPU backend with its own pool of num_threads - 1 helpers (the caller is the other one); they
// sleep while idle. INVALID_ARGUMENT unless 1 <= num_threads <= 1024.
absl::StatusOr<std::unique_ptr<Backend>> MakeCpuBackend(int num_threads);

// One GPU, with activations of `dtype` (kF16 or kBF16). UNIMPLEMENTED in a build without CUDA;
// FAILED_PRECONDITION: no such device, or one older than compute capability 8.0.
absl::StatusOr<std::unique_ptr<Backend>> MakeCudaBackend(int device_index, DType dtype);

}  // namespace sluice
