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

constexpr int64_t kElement = 2;            // Bytes of an activation
constexpr int64_t kSliceBytes = 24 << 20;  // Of an unpacked slice: half of an H100's L2 cache
constexpr int64_t kGemmWorkspace = 32 << 20;

const CudaPackedMatrix& Packed(const PackedMatrix& matrix) {
  return static_cast<const CudaPackedMatrix&>(matrix);
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
                          const KvWrite& write, TensorView qkv) {
  NormMatMul(norm, x, linear, Activation::kNone, qkv);
  if (step_.device().num_prefill_tiles > 0) {
    return RopeAndWriteKv(qkv, write.rope, write.sequences, *write.kv);
  }
  new_keys_ = write.rope == nullptr ? NewKeys::kWrite : NewKeys::kTurnAndWrite;
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
