// The products of the CUDA backend: which way each one takes.
#include <algorithm>
#include <vector>

#include "kernels/core/check.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/elementwise.h"

namespace sluice {
namespace {

constexpr int64_t kElement = 2;                   // Bytes of an activation
constexpr int64_t kBatchedRows = 2 * kBatchRows;  // More rows: unpack and cuBLASLt

const CudaPackedMatrix& Packed(const PackedMatrix& matrix) {
  return static_cast<const CudaPackedMatrix&>(matrix);
}

const float* DataOf(const DeviceVector* vector) {
  return vector == nullptr ? nullptr : vector->data();
}

// Column `column` of y.
void* At(void* y, int64_t column, bool is_float) {
  return static_cast<uint8_t*>(y) + column * (is_float ? 4 : kElement);
}

}  // namespace

bool CudaBackend::FitsSmall(const CudaPackedMatrix::Part& part, int64_t rows) const {
  return rows <= kSmallRows && SmallMatMulShared(part.format, part.weight, static_cast<int>(rows),
                                                 NormKind::kLayer) <= context_.max_shared_bytes;
}

bool CudaBackend::CanPair(const CudaPackedMatrix& weight, int64_t rows,
                          int64_t pair_distance) const {
  if (weight.parts().size() != 1) return false;
  const CudaPackedMatrix::Part& part = weight.parts()[0];
  if (part.weight.order.pair_distance != pair_distance) return false;
  return FitsSmall(part, rows) || (part.format != QuantFormat::kPlain && rows <= kBatchedRows);
}

InputParams CudaBackend::Prepared(const InputParams& in, int64_t k) {
  const bool aligned = in.stride % 8 == 0 && reinterpret_cast<uintptr_t>(in.x) % 16 == 0;
  if (in.norm == NormKind::kNone && in.perm == nullptr && in.row_index == nullptr && aligned) {
    return in;
  }
  const int64_t stride = PlainStride(k);
  SLUICE_CHECK(in.rows * stride * kElement <= normalized_.bytes())
      << "a step of " << in.rows << " rows of " << k << " exceeds Reserve";
  NormRows(context_, {.kind = in.norm,
                      .weight = in.norm_weight,
                      .bias = in.norm_bias,
                      .eps = in.eps,
                      .x = in.x,
                      .x_stride = in.stride,
                      .row_index = in.row_index,
                      .perm = in.perm,
                      .y = normalized_.data(),
                      .y_stride = stride,
                      .rows = in.rows,
                      .cols = k,
                      .dtype = dtype_});
  InputParams ready;
  ready.x = normalized_.data();
  ready.stride = stride;
  ready.rows = in.rows;
  return ready;
}

void CudaBackend::Product(const Norm& norm, const Rows& rows, const Linear& linear,
                          EpilogueParams out) {
  const CudaPackedMatrix& weight = Packed(*linear.weight);
  SLUICE_CHECK(rows.x.cols == weight.k() && rows.x.dtype == dtype_)
      << rows.x.cols << " and " << weight.k();
  SLUICE_CHECK(linear.bias == nullptr || linear.bias->size() == weight.n());
  InputParams in;
  in.x = rows.x.data;
  in.stride = rows.x.stride;
  in.rows = static_cast<int32_t>(rows.count);
  in.row_index = rows.row_index;
  in.norm = norm.kind;
  in.norm_weight = DataOf(norm.weight);
  in.norm_bias = DataOf(norm.bias);
  in.eps = norm.eps;
  for (const CudaPackedMatrix::Part& part : weight.parts()) {
    EpilogueParams mine = out;
    mine.scale = part.scale;
    mine.y = At(out.y, part.row_begin, out.kind == EpilogueKind::kLogits);
    mine.bias = linear.bias == nullptr ? nullptr : linear.bias->data() + part.row_begin;
    InputParams part_in = in;
    part_in.perm = part.perm;
    if (FitsSmall(part, rows.count)) {
      SmallMatMul(context_, dtype_, part.format, {part_in, part.weight, mine});
      continue;
    }
    part_in = Prepared(part_in, weight.k());
    if (part.format == QuantFormat::kPlain) {
      const WeightParams& w = part.weight;
      PlainProduct(part_in, {w.data, w.plain_stride, w.order.n, w.k, 0, 0}, mine);
    } else if (rows.count <= kBatchedRows) {
      BatchedProduct(part, part_in, mine);
    } else {
      LargeProduct(part, part_in, mine);
    }
  }
}

void CudaBackend::BatchedProduct(const CudaPackedMatrix::Part& part, InputParams in,
                                 EpilogueParams out) {
  const int64_t y_element = out.kind == EpilogueKind::kLogits ? 4 : kElement;
  for (int64_t left = in.rows; left > 0; left -= kBatchRows) {
    in.rows = static_cast<int32_t>(std::min<int64_t>(left, kBatchRows));
    BatchedMatMul(context_, dtype_, part.format, {in, part.weight, out}, batch_scratch_.data());
    in.x = static_cast<const uint8_t*>(in.x) + kBatchRows * in.stride * kElement;
    out.y = static_cast<uint8_t*>(out.y) + kBatchRows * out.y_stride * y_element;
  }
}

void CudaBackend::LargeProduct(const CudaPackedMatrix::Part& part, const InputParams& in,
                               const EpilogueParams& out) {
  const WeightParams& w = part.weight;
  const int64_t stride = PlainStride(w.k);
  const int64_t pair = w.order.pair_distance;
  const bool halves = pair > 0 && w.order.n == 2 * pair;
  // Whole sections, or any tiles when the two halves are taken apart.
  const int64_t step = pair > 0 && !halves ? pair / 8 : 1;
  const int64_t fitting = unpacked_.bytes() / (kTileRows * stride * kElement);
  const int64_t slice = std::max<int64_t>(1, fitting / step) * step;
  SLUICE_CHECK(slice * kTileRows * stride * kElement <= unpacked_.bytes() || !halves) << slice;
  for (int64_t begin = 0; begin < w.tiles; begin += slice) {
    const int64_t end = std::min<int64_t>(w.tiles, begin + slice);
    const int64_t rows = (end - begin) * 8;
    auto* low = unpacked_.as<uint8_t>();
    uint8_t* high = halves ? low + rows * stride * kElement : nullptr;
    UnpackTiles(context_, dtype_, part, static_cast<int>(begin), static_cast<int>(end), low, high,
                stride);
    if (!halves) {
      const int64_t first = begin * kTileRows;
      PlainProduct(in, {low, stride, std::min<int64_t>(2 * rows, w.order.n - first), w.k, first, 0},
                   out);
    } else if (out.kind == EpilogueKind::kGateUp) {
      PlainProduct(in, {low, stride, 2 * rows, w.k, begin * 8, pair}, out);
    } else {
      PlainProduct(in, {low, stride, rows, w.k, begin * 8, 0}, out);
      PlainProduct(in, {high, stride, rows, w.k, pair + begin * 8, 0}, out);
    }
  }
}

void CudaBackend::PlainProduct(const InputParams& in, const PlainWeight& w,
                               const EpilogueParams& out) {
  const bool logits = out.kind == EpilogueKind::kLogits;
  const bool to_wide = out.kind == EpilogueKind::kGateUp ||
                       (out.kind == EpilogueKind::kResidual && out.bias != nullptr);
  GemmArgs args;
  args.x = in.x;
  args.x_stride = in.stride;
  args.w = w.data;
  args.w_stride = w.stride;
  args.y = to_wide ? wide_.data() : At(out.y, w.column, logits);
  args.y_stride = to_wide ? w.n : out.y_stride;
  args.m = in.rows;
  args.n = w.n;
  args.dtype = dtype_;
  args.y_dtype = logits ? DType::kF32 : dtype_;
  args.k = w.k;
  args.accumulate = out.kind == EpilogueKind::kResidual && !to_wide;
  SLUICE_CHECK(!to_wide || in.rows * w.n * kElement <= wide_.bytes())
      << in.rows << " rows of " << w.n;
  gemm_->Run(context_, args);
  const float* bias = out.bias == nullptr ? nullptr : out.bias + w.column;
  if (out.kind == EpilogueKind::kGateUp) {
    const int64_t cols = w.n / 2;
    if (bias != nullptr) {  // Rows [w.column, + cols) of gate and of up
      for (const int64_t half : {0, 1}) {
        AddBiasActivation(context_, {.x = At(wide_.data(), half * cols, false),
                                     .x_dtype = dtype_,
                                     .x_stride = w.n,
                                     .bias = bias + half * w.pair_distance,
                                     .y = At(wide_.data(), half * cols, false),
                                     .y_stride = w.n,
                                     .rows = in.rows,
                                     .cols = cols,
                                     .dtype = dtype_});
      }
    }
    GateUp(context_, {.wide = wide_.data(),
                      .wide_stride = w.n,
                      .act = out.act,
                      .y = At(out.y, w.column, false),
                      .y_stride = out.y_stride,
                      .rows = in.rows,
                      .cols = cols,
                      .dtype = dtype_});
    return;
  }
  SLUICE_CHECK(!logits || bias == nullptr) << "a head with a bias";
  if (bias == nullptr && out.act == Activation::kNone) return;
  AddBiasActivation(context_, {.x = args.y,
                               .x_dtype = dtype_,
                               .x_stride = args.y_stride,
                               .bias = bias,
                               .act = out.act,
                               .accumulate = to_wide,
                               .y = At(out.y, w.column, false),
                               .y_stride = out.y_stride,
                               .rows = in.rows,
                               .cols = w.n,
                               .dtype = dtype_});
}

void CudaBackend::NormMatMul(const Norm& norm, TensorView x, const Linear& linear, Activation act,
                             TensorView y) {
  SLUICE_CHECK(y.cols == linear.weight->n() && y.rows == x.rows && y.dtype == dtype_);
  EpilogueParams out;
  out.act = act;
  out.y = y.data;
  out.y_stride = y.stride;
  Product(norm, {x, PaddedRows(x), nullptr}, linear, out);
}

void CudaBackend::NormGateUp(const Norm& norm, TensorView x, const Linear& gate_up, Activation act,
                             TensorView y) {
  const int64_t n = gate_up.weight->n(), rows = PaddedRows(x);
  SLUICE_CHECK(n % 2 == 0 && y.cols == n / 2 && y.rows == x.rows && y.dtype == dtype_);
  EpilogueParams out;
  out.y = y.data;
  out.y_stride = y.stride;
  out.act = act;
  const CudaPackedMatrix& weight = Packed(*gate_up.weight);
  const bool sliced = rows > kBatchedRows && weight.parts().size() == 1 &&
                      weight.parts()[0].format != QuantFormat::kPlain &&
                      weight.parts()[0].weight.order.pair_distance == n / 2;
  if (sliced || CanPair(weight, rows, n / 2)) {
    out.kind = EpilogueKind::kGateUp;
    return Product(norm, {x, rows, nullptr}, gate_up, out);
  }
  SLUICE_CHECK(rows * n * kElement <= wide_.bytes()) << rows << " rows of " << n;
  EpilogueParams wide;
  wide.y = wide_.data();
  wide.y_stride = n;
  Product(norm, {x, rows, nullptr}, gate_up, wide);
  GateUp(context_, {.wide = wide_.data(),
                    .wide_stride = n,
                    .act = act,
                    .y = y.data,
                    .y_stride = y.stride,
                    .rows = rows,
                    .cols = n / 2,
                    .dtype = dtype_});
}

void CudaBackend::MatMulResidual(TensorView x, const Linear& linear, TensorView residual) {
  SLUICE_CHECK(residual.cols == linear.weight->n() && residual.rows == x.rows);
  EpilogueParams out;
  out.kind = EpilogueKind::kResidual;
  out.y = residual.data;
  out.y_stride = residual.stride;
  Product(Norm(), {x, PaddedRows(x), nullptr}, linear, out);
}

void CudaBackend::ApplyNorm(const Norm& norm, TensorView x) {
  if (norm.kind == NormKind::kNone) return;
  NormRows(context_, {.kind = norm.kind,
                      .weight = DataOf(norm.weight),
                      .bias = DataOf(norm.bias),
                      .eps = norm.eps,
                      .x = x.data,
                      .x_stride = x.stride,
                      .y = x.data,
                      .y_stride = x.stride,
                      .rows = PaddedRows(x),
                      .cols = x.cols,
                      .dtype = dtype_});
}

void CudaBackend::LmHead(const Norm& norm, TensorView x, absl::Span<const int64_t> rows,
                         const Linear& head, TensorView logits) {
  if (rows.empty()) return;
  const auto count = static_cast<int64_t>(rows.size());
  SLUICE_CHECK(logits.rows == count && logits.cols == head.weight->n() &&
               logits.dtype == DType::kF32);
  EpilogueParams out;
  out.kind = EpilogueKind::kLogits;
  out.y = logits.data;
  out.y_stride = logits.stride;
  if (step_.IsLogitRows(rows)) {
    return Product(norm, {x, step_.logit_rows(), step_.device_logit_rows()}, head, out);
  }
  // Rows that the step did not announce (prompt scores).
  std::vector<int32_t> index(rows.begin(), rows.end());
  SLUICE_CHECK(count * 4 <= row_index_.bytes()) << count;
  SLUICE_CUDA_CHECK(cudaMemcpyAsync(row_index_.data(), index.data(), index.size() * 4,
                                    cudaMemcpyHostToDevice, context_.stream));
  Product(norm, {x, count, row_index_.as<int32_t>()}, head, out);
}

}  // namespace sluice
