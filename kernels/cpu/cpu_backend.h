// The CPU backend: float32 activations, weights in codes (pack.h), SIMD by Highway with the target
// picked at run time. The reference that the other backends are tested against, and a real backend.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "kernels/cpu/matmul.h"
#include "kernels/cpu/ops.h"
#include "kernels/cpu/sampling.h"
#include "kernels/cpu/thread_pool.h"

namespace sluice {

class CpuBackend final : public Backend {
 public:
  // REQUIRES: 1 <= num_threads <= 1024.
  explicit CpuBackend(int num_threads);

  std::string Name() const override;
  DType activation_dtype() const override { return DType::kF32; }

  // INVALID_ARGUMENT: see Pack.
  absl::StatusOr<std::unique_ptr<PackedMatrix>> Upload(
      absl::Span<const QuantizedMatrix* const> stacked) override;
  absl::StatusOr<std::unique_ptr<DeviceVector>> UploadVector(
      absl::Span<const QuantizedMatrix* const> stacked) override;
  absl::StatusOr<std::unique_ptr<DeviceBuffer>> Allocate(int64_t bytes) override;
  // Every later call only adds room.
  absl::Status Reserve(const Workspace& workspace) override;

  void Embed(const PackedMatrix& table, absl::Span<const uint32_t> ids, TensorView out) override;
  void AddEmbedding(const PackedMatrix& table, absl::Span<const uint32_t> ids,
                    TensorView x) override;
  RopeRows RopeTable(absl::Span<const uint32_t> positions, absl::Span<const float* const> inv_freq,
                     int64_t half_dim, float scale) override;
  void NormMatMul(const Norm& norm, TensorView x, const Linear& linear, Activation act,
                  TensorView y) override;
  void NormGateUp(const Norm& norm, TensorView x, const Linear& gate_up, Activation act,
                  TensorView y) override;
  void MatMulResidual(TensorView x, const Linear& linear, TensorView residual) override;
  void ApplyNorm(const Norm& norm, TensorView x) override;
  void RopeAndWriteKv(TensorView qkv, const RopeRows* rope,
                      absl::Span<const SequenceRows> sequences, const KvLayer& kv) override;
  void PagedAttention(TensorView qkv, absl::Span<const SequenceRows> sequences, const KvLayer& kv,
                      float scale, TensorView out) override;
  void LmHead(const Norm& norm, TensorView x, absl::Span<const int64_t> rows, const Linear& head,
              TensorView logits) override;
  void Sample(TensorView logits, absl::Span<const SamplingRow> rows,
              absl::Span<SampledToken> out) override;
  SampledToken Score(TensorView logits, int64_t row, uint32_t id, int32_t count) override;
  void CopyToHost(TensorView source, void* host) override;
  void CopyFromHost(const void* host, TensorView target) override;

 private:
  // norm(x), or x itself when there is no norm and no choice of rows; in scratch otherwise.
  FloatRows Normalized(const Norm& norm, TensorView x, absl::Span<const int64_t> rows);
  void Multiply(const FloatRows& x, const Linear& linear, const MatMulOutput& out);

  ThreadPool pool_;
  MatMulScratch matmul_scratch_;
  HostMemory normalized_;    // [max_rows, PaddedStride(max_k)]
  HostMemory wide_;          // [max_rows, max_n]: gate and up before they are joined
  HostMemory attention_;     // Per thread
  HostMemory embedding_;     // Per thread, a row of max_n or max_k floats
  std::vector<float> rope_;  // cos, then sin; grows to the largest step
  std::vector<SamplingScratch> sampling_;
};

}  // namespace sluice
