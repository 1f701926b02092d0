#include "kernels/cpu/cpu_backend.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "kernels/core/check.h"
#include "kernels/core/status_macros.h"
#include "kernels/cpu/memory.h"
#include "kernels/cpu/pack.h"

namespace sluice {
namespace {

constexpr int64_t kFloatBytes = sizeof(float);

const CpuPackedMatrix& Packed(const PackedMatrix& matrix) {
  return static_cast<const CpuPackedMatrix&>(matrix);
}

void CheckShape(TensorView view, int64_t rows, int64_t cols) {
  SLUICE_CHECK(view.dtype == DType::kF32)
      << "the CPU backend works on float32, not " << NameOf(view.dtype);
  SLUICE_CHECK(view.rows == rows && view.cols == cols && (view.rows <= 1 || view.stride >= cols))
      << "[" << view.rows << ", " << view.cols << "] where [" << rows << ", " << cols << "] is due";
}

// Makes `memory` at least `bytes` long; its content is lost when it grows.
absl::Status Grow(HostMemory& memory, int64_t bytes) {
  if (bytes <= memory.bytes()) return absl::OkStatus();
  SLUICE_ASSIGN_OR_RETURN(memory, HostMemory::Allocate(bytes));
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<Backend>> MakeCpuBackend(int num_threads) {
  if (num_threads < 1 || num_threads > 1024) {
    return absl::InvalidArgumentError(
        absl::StrCat("threads = ", num_threads, " is out of range 1..1024"));
  }
  return std::make_unique<CpuBackend>(num_threads);
}

CpuBackend::CpuBackend(int num_threads)
    : pool_(num_threads), matmul_scratch_(num_threads), sampling_(num_threads) {}

std::string CpuBackend::Name() const {
  return absl::StrCat("cpu (", absl::AsciiStrToLower(SimdTargetName()), ", ", pool_.num_threads(),
                      pool_.num_threads() == 1 ? " thread)" : " threads)");
}

// --- Load ---

absl::StatusOr<std::unique_ptr<PackedMatrix>> CpuBackend::Upload(
    absl::Span<const QuantizedMatrix* const> stacked) {
  SLUICE_ASSIGN_OR_RETURN(std::unique_ptr<CpuPackedMatrix> matrix, Pack(stacked));
  return std::unique_ptr<PackedMatrix>(std::move(matrix));
}

absl::StatusOr<std::unique_ptr<DeviceVector>> CpuBackend::UploadVector(
    absl::Span<const QuantizedMatrix* const> stacked) {
  int64_t size = 0;
  for (const QuantizedMatrix* vector : stacked) {
    if (vector->spec.format != QuantFormat::kPlain || vector->spec.n != 1) {
      return absl::InvalidArgumentError(absl::StrCat("a vector must be plain with n = 1, not ",
                                                     NameOf(vector->spec.format),
                                                     " with n = ", vector->spec.n));
    }
    SLUICE_RETURN_IF_ERROR(CheckSpec(vector->spec));
    if (vector->planes.size() < SizesOf(vector->spec).total()) {
      return absl::InvalidArgumentError("a vector's plane is shorter than its spec says");
    }
    size += vector->spec.k;
  }
  SLUICE_ASSIGN_OR_RETURN(HostMemory memory, HostMemory::Allocate(size * kFloatBytes));
  float* next = memory.as<float>();
  for (const QuantizedMatrix* vector : stacked) {
    ToFloat(vector->spec.plain_dtype, vector->codes(), vector->spec.k, next);
    next += vector->spec.k;
  }
  return std::make_unique<HostVector>(std::move(memory), size);
}

absl::StatusOr<std::unique_ptr<DeviceBuffer>> CpuBackend::Allocate(int64_t bytes) {
  SLUICE_ASSIGN_OR_RETURN(HostMemory memory, HostMemory::Allocate(bytes));
  return std::make_unique<HostBuffer>(std::move(memory));
}

absl::Status CpuBackend::Reserve(const Workspace& workspace) {
  const int64_t widest = std::max(workspace.max_n, workspace.max_k);
  SLUICE_RETURN_IF_ERROR(matmul_scratch_.ReserveGathered(workspace.max_rows, workspace.max_k));
  SLUICE_RETURN_IF_ERROR(
      Grow(normalized_, workspace.max_rows * PaddedStride(workspace.max_k) * kFloatBytes));
  SLUICE_RETURN_IF_ERROR(Grow(wide_, workspace.max_rows * workspace.max_n * kFloatBytes));
  SLUICE_RETURN_IF_ERROR(Grow(embedding_, pool_.num_threads() * widest * kFloatBytes));
  return Grow(attention_,
              pool_.num_threads() * AttentionScratchFloats(workspace.max_context) * kFloatBytes);
}

// --- Step ---

void CpuBackend::Embed(const PackedMatrix& table, absl::Span<const uint32_t> ids, TensorView out) {
  CheckShape(out, static_cast<int64_t>(ids.size()), table.k());
  EmbedRows(Packed(table), ids, out, pool_);
}

void CpuBackend::AddEmbedding(const PackedMatrix& table, absl::Span<const uint32_t> ids,
                              TensorView x) {
  CheckShape(x, static_cast<int64_t>(ids.size()), table.k());
  SLUICE_CHECK(pool_.num_threads() * table.k() * kFloatBytes <= embedding_.bytes())
      << "a row exceeds Reserve";
  AddEmbeddedRows(Packed(table), ids, x, embedding_.as<float>(), pool_);
}

RopeRows CpuBackend::RopeTable(absl::Span<const uint32_t> positions,
                               absl::Span<const float* const> inv_freq, int64_t half_dim,
                               float scale) {
  SLUICE_CHECK(positions.size() == inv_freq.size())
      << positions.size() << " and " << inv_freq.size();
  const size_t size = positions.size() * static_cast<size_t>(half_dim);
  if (rope_.size() < 2 * size) rope_.resize(2 * size);
  const RopeRows rows = {rope_.data(), rope_.data() + size, half_dim};
  FillRopeTable(positions, inv_freq, scale, rope_.data(), rope_.data() + size, half_dim);
  return rows;
}

FloatRows CpuBackend::Normalized(const Norm& norm, TensorView x, absl::Span<const int64_t> rows) {
  if (norm.kind == NormKind::kNone && rows.empty()) return {x.Row(0), x.rows, x.stride};
  const int64_t count = rows.empty() ? x.rows : static_cast<int64_t>(rows.size());
  const TensorView y = {normalized_.as<float>(), DType::kF32, count, x.cols, PaddedStride(x.cols)};
  SLUICE_CHECK(count * y.stride * kFloatBytes <= normalized_.bytes())
      << "a step of " << count << " rows of " << x.cols << " exceeds Reserve";
  NormRows(norm, x, rows, y, pool_);
  return {y.Row(0), count, y.stride};
}

void CpuBackend::Multiply(const FloatRows& x, const Linear& linear, const MatMulOutput& out) {
  SLUICE_CHECK(linear.bias == nullptr || linear.bias->size() == linear.weight->n())
      << linear.bias->size();
  MatMul(Packed(*linear.weight), x, out, matmul_scratch_, pool_);
}

void CpuBackend::NormMatMul(const Norm& norm, TensorView x, const Linear& linear, Activation act,
                            TensorView y) {
  CheckShape(x, x.rows, linear.weight->k());
  CheckShape(y, x.rows, linear.weight->n());
  const float* bias = linear.bias == nullptr ? nullptr : linear.bias->data();
  Multiply(Normalized(norm, x, {}), linear, {y.Row(0), y.stride, bias, act, /*add=*/false});
}

void CpuBackend::NormGateUp(const Norm& norm, TensorView x, const Linear& gate_up, Activation act,
                            TensorView y) {
  const int64_t n = gate_up.weight->n();
  CheckShape(x, x.rows, gate_up.weight->k());
  SLUICE_CHECK(n % 2 == 0) << n;
  CheckShape(y, x.rows, n / 2);
  SLUICE_CHECK(x.rows * n * kFloatBytes <= wide_.bytes())
      << "a step of " << x.rows << " rows of " << n << " exceeds Reserve";
  const TensorView wide = {wide_.data(), DType::kF32, x.rows, n, n};
  const float* bias = gate_up.bias == nullptr ? nullptr : gate_up.bias->data();
  Multiply(Normalized(norm, x, {}), gate_up,
           {wide.Row(0), n, bias, Activation::kNone, /*add=*/false});
  GateUp(wide, act, y, pool_);
}

void CpuBackend::MatMulResidual(TensorView x, const Linear& linear, TensorView residual) {
  CheckShape(x, x.rows, linear.weight->k());
  CheckShape(residual, x.rows, linear.weight->n());
  const float* bias = linear.bias == nullptr ? nullptr : linear.bias->data();
  Multiply({x.Row(0), x.rows, x.stride}, linear,
           {residual.Row(0), residual.stride, bias, Activation::kNone, /*add=*/true});
}

void CpuBackend::ApplyNorm(const Norm& norm, TensorView x) {
  CheckShape(x, x.rows, x.cols);
  if (norm.kind != NormKind::kNone) NormRows(norm, x, {}, x, pool_);
}

void CpuBackend::RopeAndWriteKv(TensorView qkv, const RopeRows* rope,
                                absl::Span<const SequenceRows> sequences, const KvLayer& kv) {
  CheckShape(qkv, qkv.rows, qkv.cols);
  RopeAndWrite(qkv, rope, sequences, kv, pool_);
}

void CpuBackend::PagedAttention(TensorView qkv, absl::Span<const SequenceRows> sequences,
                                const KvLayer& kv, float scale, TensorView out) {
  CheckShape(qkv, out.rows, qkv.cols);
  CheckShape(out, out.rows, out.cols);
  Attention(
      qkv, sequences, kv, scale, out,
      {pool_, attention_.as<float>(), attention_.bytes() / kFloatBytes / pool_.num_threads()});
}

void CpuBackend::LmHead(const Norm& norm, TensorView x, absl::Span<const int64_t> rows,
                        const Linear& head, TensorView logits) {
  if (rows.empty()) return;
  CheckShape(x, x.rows, head.weight->k());
  CheckShape(logits, static_cast<int64_t>(rows.size()), head.weight->n());
  for (const int64_t row : rows) SLUICE_CHECK(row >= 0 && row < x.rows) << row;
  const float* bias = head.bias == nullptr ? nullptr : head.bias->data();
  Multiply(Normalized(norm, x, rows), head,
           {logits.Row(0), logits.stride, bias, Activation::kNone, /*add=*/false});
}

void CpuBackend::Sample(TensorView logits, absl::Span<const SamplingRow> rows,
                        absl::Span<SampledToken> out) {
  SLUICE_CHECK(rows.size() == out.size()) << rows.size() << " and " << out.size();
  CheckShape(logits, logits.rows, logits.cols);
  pool_.ParallelFor(static_cast<int64_t>(rows.size()), [&](int64_t i, int thread) {
    SLUICE_CHECK(rows[i].row >= 0 && rows[i].row < logits.rows) << rows[i].row;
    const absl::Span<const float> row(logits.Row(rows[i].row), static_cast<size_t>(logits.cols));
    out[i] = SampleRow(row, rows[i], sampling_[thread]);
  });
}

SampledToken CpuBackend::Score(TensorView logits, int64_t row, uint32_t id, int32_t count) {
  CheckShape(logits, logits.rows, logits.cols);
  SLUICE_CHECK(row >= 0 && row < logits.rows) << row;
  return ScoreRow({logits.Row(row), static_cast<size_t>(logits.cols)}, id, count, sampling_[0]);
}

void CpuBackend::CopyToHost(TensorView source, void* host) {
  const size_t bytes = static_cast<size_t>(source.cols) * SizeOf(source.dtype);
  for (int64_t m = 0; m < source.rows; ++m) {
    std::memcpy(static_cast<uint8_t*>(host) + m * bytes, source.Rows(m, 1).data, bytes);
  }
}

void CpuBackend::CopyFromHost(const void* host, TensorView target) {
  const size_t bytes = static_cast<size_t>(target.cols) * SizeOf(target.dtype);
  for (int64_t m = 0; m < target.rows; ++m) {
    std::memcpy(target.Rows(m, 1).data, static_cast<const uint8_t*>(host) + m * bytes, bytes);
  }
}

}  // namespace sluice
