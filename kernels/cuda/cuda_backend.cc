#include "kernels/cuda/cuda_backend.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/core/check.h"
#include "kernels/core/status_macros.h"
#include "kernels/cuda/elementwise.h"
#include "kernels/cuda/rope_kv.h"

namespace sluice {
namespace {

constexpr int64_t kElement = 2;                   // Bytes of an activation
constexpr int64_t kBatchedRows = 2 * kBatchRows;  // More rows: unpack and cuBLASLt
constexpr int64_t kSliceBytes = 24 << 20;  // Of an unpacked slice: half of an H100's L2 cache
constexpr int64_t kGemmWorkspace = 32 << 20;

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

absl::Status Grow(DeviceMemory& memory, int64_t bytes) {
  if (bytes <= memory.bytes()) return absl::OkStatus();
  memory = DeviceMemory();
  SLUICE_ASSIGN_OR_RETURN(memory, DeviceMemory::Allocate(bytes));
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<Backend>> MakeCudaBackend(int device_index, DType dtype) {
  return CudaBackend::Create(device_index, dtype);
}

// --- Load ---

absl::StatusOr<std::unique_ptr<Backend>> CudaBackend::Create(int device_index, DType dtype) {
  if (dtype != DType::kF16 && dtype != DType::kBF16) {
    return absl::InvalidArgumentError(
        absl::StrCat("a GPU works in float16 or bfloat16, not ", NameOf(dtype)));
  }
  std::unique_ptr<CudaBackend> backend(new CudaBackend(dtype));
  SLUICE_RETURN_IF_ERROR(backend->Init(device_index));
  return backend;
}

absl::Status CudaBackend::Init(int device_index) {
  int devices = 0;
  if (const cudaError_t error = cudaGetDeviceCount(&devices); error != cudaSuccess) devices = 0;
  if (device_index < 0 || device_index >= devices) {
    return absl::FailedPreconditionError(
        absl::StrCat("cuda:", device_index, ": this process sees ", devices,
                     " GPUs; check the driver and CUDA_VISIBLE_DEVICES, or use --device cpu"));
  }
  SLUICE_RETURN_IF_ERROR(CudaStatus(cudaSetDevice(device_index), "selecting the GPU"));
  cudaDeviceProp properties;
  SLUICE_RETURN_IF_ERROR(CudaStatus(cudaGetDeviceProperties(&properties, device_index),
                                    "reading the GPU's properties"));
  if (properties.major < 8) {
    return absl::FailedPreconditionError(
        absl::StrCat("cuda:", device_index, " (", properties.name, ") has compute capability ",
                     properties.major, ".", properties.minor, "; 8.0 or newer is needed"));
  }
  SLUICE_RETURN_IF_ERROR(CudaStatus(
      cudaStreamCreateWithFlags(&context_.stream, cudaStreamNonBlocking), "making a stream"));
  context_.num_sms = properties.multiProcessorCount;
  context_.max_shared_bytes = static_cast<int>(properties.sharedMemPerBlockOptin);
  // Newer cards run the PTX of sm_80, whose kernels do not wait for each other.
  context_.dependent_launch = properties.major == 9;
  SLUICE_ASSIGN_OR_RETURN(gemm_, Gemm::Create(kGemmWorkspace));
  SLUICE_ASSIGN_OR_RETURN(batch_scratch_,
                          DeviceMemory::Allocate(BatchScratchBytes(context_.num_sms)));
  name_ = absl::StrCat("cuda:", device_index, " (", properties.name, ", ", NameOf(dtype_), ")");
  return absl::OkStatus();
}

CudaBackend::~CudaBackend() {
  if (context_.stream == nullptr) return;
  cudaStreamSynchronize(context_.stream);
  for (const auto& [key, graph] : graphs_) {
    if (graph != nullptr) cudaGraphExecDestroy(graph);
  }
  cudaStreamDestroy(context_.stream);
}

absl::StatusOr<std::unique_ptr<PackedMatrix>> CudaBackend::UploadPaired(
    absl::Span<const QuantizedMatrix* const> stacked, int64_t pair_distance) {
  SLUICE_ASSIGN_OR_RETURN(std::unique_ptr<CudaPackedMatrix> matrix,
                          PackOnDevice(context_, stacked, pair_distance, dtype_));
  return std::unique_ptr<PackedMatrix>(std::move(matrix));
}

absl::StatusOr<std::unique_ptr<DeviceVector>> CudaBackend::UploadVector(
    absl::Span<const QuantizedMatrix* const> stacked) {
  std::vector<float> values;
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
    const size_t begin = values.size();
    values.resize(begin + vector->spec.k);
    ToFloat(vector->spec.plain_dtype, vector->codes(), vector->spec.k, values.data() + begin);
  }
  const auto bytes = static_cast<int64_t>(values.size() * sizeof(float));
  SLUICE_ASSIGN_OR_RETURN(DeviceMemory memory, DeviceMemory::Allocate(bytes));
  SLUICE_RETURN_IF_ERROR(CudaStatus(
      cudaMemcpy(memory.data(), values.data(), static_cast<size_t>(bytes), cudaMemcpyHostToDevice),
      "copying a vector to the card"));
  return std::make_unique<CudaVector>(std::move(memory), static_cast<int64_t>(values.size()));
}

absl::StatusOr<std::unique_ptr<DeviceBuffer>> CudaBackend::Allocate(int64_t bytes) {
  SLUICE_ASSIGN_OR_RETURN(DeviceMemory memory, DeviceMemory::Allocate(bytes));
  return std::make_unique<CudaBuffer>(std::move(memory));
}

absl::Status CudaBackend::Reserve(const Workspace& workspace) {
  // Graphs hold addresses of what is about to change.
  SLUICE_CUDA_CHECK(cudaStreamSynchronize(context_.stream));
  for (const auto& [key, graph] : graphs_) {
    if (graph != nullptr) cudaGraphExecDestroy(graph);
  }
  graphs_.clear();
  reserved_ = workspace;
  const int64_t rows = workspace.max_rows;
  SLUICE_RETURN_IF_ERROR(Grow(normalized_, rows * PlainStride(workspace.max_k) * kElement));
  SLUICE_RETURN_IF_ERROR(Grow(wide_, rows * workspace.max_n * kElement));
  SLUICE_RETURN_IF_ERROR(Grow(
      unpacked_, std::max(kSliceBytes, 2 * kTileRows * PlainStride(workspace.max_k) * kElement)));
  SLUICE_RETURN_IF_ERROR(Grow(rope_, 2 * rows * kMaxHalfDim * int64_t{sizeof(float)}));
  SLUICE_RETURN_IF_ERROR(Grow(row_index_, rows * int64_t{sizeof(int32_t)}));
  if (workspace.head_dim > 0) {
    const AttentionShape shape = {static_cast<int>(workspace.max_heads),
                                  static_cast<int>(workspace.num_kv_heads),
                                  static_cast<int>(workspace.head_dim),
                                  static_cast<int>(workspace.block_size),
                                  1.0f,
                                  dtype_};
    if (!AttentionSupports(shape)) {
      return absl::UnimplementedError(absl::StrCat(
          "a GPU worker has no attention for heads of ", workspace.head_dim,
          " elements (it has 32, 64, 80, 96, 128 and 256); use a CPU worker for this model"));
    }
    SLUICE_RETURN_IF_ERROR(Grow(decode_scratch_, DecodeScratchBytes(shape, context_.num_sms)));
  }
  SLUICE_RETURN_IF_ERROR(ReserveSampling(workspace));
  return step_.Reserve(workspace.step_rows > 0 ? workspace.step_rows : rows,
                       std::max<int64_t>(workspace.max_sequences, 1), workspace.max_context,
                       workspace.block_size);
}

// --- Step ---

void CudaBackend::BeginStep(const StepRows& rows) { step_.Begin(context_, rows); }

void CudaBackend::Run(StepPart part, absl::FunctionRef<void()> operations) {
  if (!step_.recordable()) return operations();
  const auto key = std::make_tuple(part, int64_t{step_.device().rows}, step_.logit_rows());
  const auto found = graphs_.find(key);
  if (found == graphs_.end()) {
    // The first time as it is: kernels are loaded when they first run, which cannot be recorded.
    graphs_[key] = nullptr;
    return operations();
  }
  if (found->second == nullptr) {
    cudaGraph_t graph = nullptr;
    SLUICE_CUDA_CHECK(cudaStreamBeginCapture(context_.stream, cudaStreamCaptureModeThreadLocal));
    operations();
    SLUICE_CUDA_CHECK(cudaStreamEndCapture(context_.stream, &graph));
    SLUICE_CUDA_CHECK(cudaGraphInstantiate(&found->second, graph, 0));
    SLUICE_CUDA_CHECK(cudaGraphDestroy(graph));
  }
  SLUICE_CUDA_CHECK(cudaGraphLaunch(found->second, context_.stream));
}

int64_t CudaBackend::PaddedRows(const TensorView& view) const {
  return view.rows == step_.real_rows() ? step_.device().rows : view.rows;
}

void CudaBackend::Embed(const PackedMatrix& table, absl::Span<const uint32_t> ids, TensorView out) {
  SLUICE_CHECK(static_cast<int64_t>(ids.size()) == step_.real_rows() && out.cols == table.k());
  const CudaPackedMatrix::Part& part = Packed(table).parts()[0];
  SLUICE_CHECK(Packed(table).parts().size() == 1);
  if (part.format != QuantFormat::kPlain) {
    return EmbedPacked(context_, dtype_, part, step_.device().token_ids, step_.device().rows,
                       /*add=*/false, out.data, out.stride);
  }
  EmbedRows(context_, step_.device(),
            {part.weight.data, dtype_, table.n(), table.k(), part.weight.plain_stride},
            {out.data, out.stride, dtype_});
}

void CudaBackend::AddEmbedding(const PackedMatrix& table, absl::Span<const uint32_t> ids,
                               TensorView x) {
  SLUICE_CHECK(static_cast<int64_t>(ids.size()) == step_.real_rows() && x.cols == table.k());
  const CudaPackedMatrix::Part& part = Packed(table).parts()[0];
  SLUICE_CHECK(Packed(table).parts().size() == 1);
  if (part.format != QuantFormat::kPlain) {
    return EmbedPacked(context_, dtype_, part, step_.device().table_rows, step_.device().rows,
                       /*add=*/true, x.data, x.stride);
  }
  AddEmbeddingRows(context_, step_.device(),
                   {part.weight.data, dtype_, table.n(), table.k(), part.weight.plain_stride},
                   {x.data, x.stride, dtype_});
}

RopeRows CudaBackend::RopeTable(absl::Span<const uint32_t> positions,
                                absl::Span<const float* const> inv_freq, int64_t half_dim,
                                float scale) {
  SLUICE_CHECK(static_cast<int64_t>(positions.size()) == step_.real_rows() &&
               step_.inv_freq() != nullptr)
      << "the step began without these rows";
  const int64_t rows = step_.device().rows;
  float* cos = rope_.as<float>();
  float* sin = cos + rows * half_dim;
  sluice::RopeTable(context_, {.positions = step_.device().positions,
                               .inv_freq = step_.inv_freq(),
                               .inv_freq_row_stride = step_.inv_freq_stride(),
                               .half_dim = half_dim,
                               .scale = scale,
                               .rows = rows,
                               .cos = cos,
                               .sin = sin});
  return {cos, sin, half_dim};
}

// --- Products ---

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

// --- Attention ---

AttentionShape CudaBackend::ShapeOf(const KvLayer& kv, int64_t num_heads, float scale) const {
  return {static_cast<int>(num_heads),
          static_cast<int>(kv.num_kv_heads),
          static_cast<int>(kv.head_dim),
          static_cast<int>(kv.block_size),
          scale,
          dtype_};
}

void CudaBackend::RopeAndWriteKv(TensorView qkv, const RopeRows* rope,
                                 absl::Span<const SequenceRows> sequences, const KvLayer& kv) {
  SLUICE_CHECK(qkv.rows == step_.real_rows()) << qkv.rows;
  DeviceStep step = step_.device();
  if (rope != nullptr) {
    step.cos = rope->cos;
    step.sin = rope->sin;
  }
  const int64_t heads = qkv.cols / kv.head_dim - 2 * kv.num_kv_heads;
  sluice::RopeAndWriteKv(context_, step, ShapeOf(kv, heads, 1.0f), qkv.data, qkv.stride,
                         rope != nullptr, kv);
}

void CudaBackend::NormQkv(const Norm& norm, TensorView x, const Linear& linear,
                          const RopeRows* rope, absl::Span<const SequenceRows> sequences,
                          const KvLayer& kv, TensorView qkv) {
  NormMatMul(norm, x, linear, Activation::kNone, qkv);
  if (step_.device().num_prefill_tiles > 0) return RopeAndWriteKv(qkv, rope, sequences, kv);
  new_keys_ = rope == nullptr ? NewKeys::kWrite : NewKeys::kTurnAndWrite;
}

void CudaBackend::PagedAttention(TensorView qkv, absl::Span<const SequenceRows> sequences,
                                 const KvLayer& kv, float scale, TensorView out) {
  SLUICE_CHECK(qkv.rows == step_.real_rows() && out.rows == qkv.rows) << qkv.rows;
  DeviceStep step = step_.device();
  const AttentionShape shape = ShapeOf(kv, out.cols / kv.head_dim, scale);
  if (new_keys_ == NewKeys::kTurnAndWrite) {
    step.cos = rope_.as<float>();
    step.sin = step.cos + step.rows * step.half_dim;
  }
  if (step.num_decode_rows > 0) {
    DecodeAttention(context_, step, shape, qkv.data, qkv.stride, kv, out.data, out.stride,
                    decode_scratch_.data(), new_keys_);
  }
  if (step.num_prefill_tiles > 0) {
    PrefillAttention(context_, step, shape, qkv.data, qkv.stride, kv, out.data, out.stride);
  }
  new_keys_ = NewKeys::kReady;
}

}  // namespace sluice
