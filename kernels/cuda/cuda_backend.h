// The CUDA backend: float16 or bfloat16 activations on one GPU, weights packed for the tensor cores
// (packed_layout.h). Everything runs on one stream; operations return before they are done, copies
// to the host wait.
//
// Which way a product takes is a matter of the rows of the step:
//   up to 8         SmallMatMul, norm and epilogue fused
//   up to 128       norm apart; BatchedMatMul in pieces of 64 rows, epilogue fused; cuBLASLt for
//                   plain weights
//   more            weights unpacked in slices that stay in the L2 cache, cuBLASLt
//
// Buckets: a step of decode rows alone is filled up to the next of kDecodeBuckets with rows of
// padding, so that its operations can be recorded once (Run) and replayed.
//
// An error of CUDA in a step is the end of the process: a context that has seen one is lost, and
// the worker's peers recover as from any dead worker.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "kernels/backend.h"
#include "kernels/cuda/attention.h"
#include "kernels/cuda/gemm.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/matmul.h"
#include "kernels/cuda/memory.h"
#include "kernels/cuda/packed_matrix.h"
#include "kernels/cuda/step_buffer.h"

namespace sluice {

// Ids of one request that may not be sampled; more are refused before they come here.
inline constexpr int64_t kMaxBannedIds = 1024;

class CudaBackend final : public Backend {
 public:
  static absl::StatusOr<std::unique_ptr<Backend>> Create(int device_index, DType dtype);
  ~CudaBackend() override;

  std::string Name() const override { return name_; }
  DType activation_dtype() const override { return dtype_; }

  absl::StatusOr<std::unique_ptr<PackedMatrix>> Upload(
      absl::Span<const QuantizedMatrix* const> stacked) override {
    return UploadPaired(stacked, 0);
  }
  absl::StatusOr<std::unique_ptr<PackedMatrix>> UploadPaired(
      absl::Span<const QuantizedMatrix* const> stacked, int64_t pair_distance) override;
  absl::StatusOr<std::unique_ptr<DeviceVector>> UploadVector(
      absl::Span<const QuantizedMatrix* const> stacked) override;
  absl::StatusOr<std::unique_ptr<DeviceBuffer>> Allocate(int64_t bytes) override;
  absl::Status Reserve(const Workspace& workspace) override;

  void BeginStep(const StepRows& rows) override;
  void Run(StepPart part, absl::FunctionRef<void()> operations) override;

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
  void NormQkv(const Norm& norm, TensorView x, const Linear& linear, const KvWrite& write,
               TensorView qkv) override;
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
  // Rows of x that a product takes.
  struct Rows {
    TensorView x;
    int64_t count = 0;                   // With padding
    const int32_t* row_index = nullptr;  // Device; null: in order
  };

  // Plain rows that give columns [column, column + n) of a result. With a pair distance, the second
  // half of the rows is that far behind the first (kGateUp).
  struct PlainWeight {
    const void* data = nullptr;  // [n, k]
    int64_t stride = 0, n = 0, k = 0, column = 0, pair_distance = 0;
  };

  explicit CudaBackend(DType dtype) : dtype_(dtype) {}
  absl::Status Init(int device_index);

  void Product(const Norm& norm, const Rows& rows, const Linear& linear, EpilogueParams out);
  // One part of a weight; x has been normed and permuted where InputParams say nothing else.
  void SmallProduct(const CudaPackedMatrix::Part& part, InputParams in, EpilogueParams out);
  void BatchedProduct(const CudaPackedMatrix::Part& part, InputParams in, EpilogueParams out);
  void LargeProduct(const CudaPackedMatrix::Part& part, const InputParams& in,
                    const EpilogueParams& out);
  void PlainProduct(const InputParams& in, const PlainWeight& w, const EpilogueParams& out);
  // norm(x) in the order that the weight wants, in scratch; x itself when nothing has to be done.
  InputParams Prepared(const InputParams& in, int64_t k);
  bool FitsSmall(const CudaPackedMatrix::Part& part, int64_t rows) const;
  // Products of that many rows with this weight can pair rows i and i + pair_distance.
  bool CanPair(const CudaPackedMatrix& weight, int64_t rows, int64_t pair_distance) const;
  AttentionShape ShapeOf(const KvLayer& kv, int64_t num_heads, float scale) const;
  absl::Status ReserveSampling(const Workspace& workspace);
  // Rows and ids as they lie on both sides; runs the kernels and waits. One result a row.
  void RunSampling(TensorView logits, absl::Span<const SamplingRow> rows, int32_t forced_id,
                   absl::Span<SampledToken> out);
  // Rows of views in a step: the padded count in place of the real one.
  int64_t PaddedRows(const TensorView& view) const;

  // How the next PagedAttention finds the new keys: NormQkv leaves turning and writing to it when
  // all rows decode.
  NewKeys new_keys_ = NewKeys::kReady;

  const DType dtype_;
  std::string name_;
  LaunchContext context_;
  std::unique_ptr<Gemm> gemm_;
  Workspace reserved_;
  StepBuffer step_;
  DeviceMemory normalized_;      // [max_rows, PlainStride(max_k)]
  DeviceMemory wide_;            // [max_rows, max_n], of large products; float32 for logits
  DeviceMemory unpacked_;        // A slice of a weight
  DeviceMemory batch_scratch_;   // BatchedMatMul
  DeviceMemory decode_scratch_;  // DecodeAttention
  DeviceMemory rope_;            // cos, then sin: [max_rows, kMaxHalfDim]
  int64_t sampling_rows_ = 0, sampling_ids_ = 0;  // Room for rows and for ids of their lists
  DeviceMemory sampling_scratch_;
  // SamplingIo: rows and ids to the device, sampled tokens back.
  PinnedMemory sampling_host_;
  DeviceMemory sampling_memory_;
  DeviceMemory row_index_;  // Rows of logits that a step did not announce
  // Recorded parts, by part and rows; null until the part has run once.
  std::map<std::tuple<StepPart, int64_t, int64_t>, cudaGraphExec_t> graphs_;
};

}  // namespace sluice
