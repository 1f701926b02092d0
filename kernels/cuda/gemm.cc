#include "kernels/cuda/gemm.h"

#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/core/check.h"
#include "kernels/core/status_macros.h"
#include "kernels/cuda/cublas_library.h"
#include "kernels/cuda/launch.h"

namespace sluice {
namespace {

absl::Status LtStatus(cublasStatus_t status, const std::string& what) {
  if (status == CUBLAS_STATUS_SUCCESS) return absl::OkStatus();
  const std::string text = absl::StrCat(what, ": ", CublasLibrary::Get()->status_string(status));
  return status == CUBLAS_STATUS_ALLOC_FAILED ? absl::ResourceExhaustedError(text)
                                              : absl::InternalError(text);
}

// For calls that only a bug of ours makes fail.
void CheckLt(cublasStatus_t status, const char* what) {
  SLUICE_CHECK(status == CUBLAS_STATUS_SUCCESS)
      << what << ": " << CublasLibrary::Get()->status_string(status);
}

cudaDataType TypeOf(DType dtype) {
  switch (dtype) {
    case DType::kF16:
      return CUDA_R_16F;
    case DType::kBF16:
      return CUDA_R_16BF;
    case DType::kF32:
      return CUDA_R_32F;
    default:
      break;
  }
  SLUICE_CHECK(false) << "no matrix product of " << NameOf(dtype);
  return CUDA_R_32F;
}

// The largest power of two up to 16 bytes that every row begins at a multiple of.
uint32_t AlignmentOf(const void* data, int64_t stride, DType dtype) {
  const uint64_t bits =
      reinterpret_cast<uintptr_t>(data) | static_cast<uint64_t>(stride) * SizeOf(dtype) | 16;
  return static_cast<uint32_t>(bits & (~bits + 1));
}

struct Alignments {
  uint32_t x, w, y;
  explicit Alignments(const GemmArgs& args)
      : x(AlignmentOf(args.x, args.x_stride, args.dtype)),
        w(AlignmentOf(args.w, args.w_stride, args.dtype)),
        y(AlignmentOf(args.y, args.y_stride, args.y_dtype)) {}
};

// What of the arguments decides besides n, k and the bucket.
uint32_t TraitBits(const GemmArgs& args) {
  const Alignments alignments(args);
  uint32_t bits = alignments.x | alignments.w << 5 | alignments.y << 10;
  bits |= static_cast<uint32_t>(args.dtype) << 15 | static_cast<uint32_t>(args.y_dtype) << 19;
  bits |= static_cast<uint32_t>(args.bias != nullptr) << 23 |
          static_cast<uint32_t>(args.relu) << 24 | static_cast<uint32_t>(args.accumulate) << 25;
  return bits;
}

// A product of `m` rows as cuBLASLt sees it: its matrices are column-major, so it computes
// y^T [n, m] = (w^T [k, n])^T * x^T [k, m] on the memory as it lies. Plain data, nothing allocated.
struct Problem {
  const CublasLibrary& lt = *CublasLibrary::Get();
  cublasLtMatmulDescOpaque_t operation;
  cublasLtMatrixLayoutOpaque_t w, x, y;

  Problem(const GemmArgs& args, int64_t m) {
    CheckLt(lt.desc_init(&operation, sizeof(operation), CUBLAS_COMPUTE_32F, CUDA_R_32F),
            "operation");
    Set(CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T);
    Set(CUBLASLT_MATMUL_DESC_TRANSB, CUBLAS_OP_N);
    cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    if (args.relu) epilogue = CUBLASLT_EPILOGUE_RELU;
    if (args.bias != nullptr) {
      epilogue = args.relu ? CUBLASLT_EPILOGUE_RELU_BIAS : CUBLASLT_EPILOGUE_BIAS;
      Set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, args.bias);
      Set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, TypeOf(args.y_dtype));
    }
    Set(CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue);
    const cudaDataType type = TypeOf(args.dtype);
    CheckLt(lt.layout_init(&w, sizeof(w), type, args.k, args.n, args.w_stride), "w");
    CheckLt(lt.layout_init(&x, sizeof(x), type, args.k, m, args.x_stride), "x");
    CheckLt(lt.layout_init(&y, sizeof(y), TypeOf(args.y_dtype), args.n, m, args.y_stride), "y");
  }

  template <typename T>
  void Set(cublasLtMatmulDescAttributes_t attribute, const T& value) {
    CheckLt(lt.desc_set(&operation, attribute, &value, sizeof(value)),
            "attribute of the operation");
  }
};

// What a kernel may use: our workspace, sums in float32 that are added in a fixed order, and the
// alignment that is there.
struct Preference {
  const CublasLibrary& lt = *CublasLibrary::Get();
  cublasLtMatmulPreferenceOpaque_t opaque;

  Preference(const GemmArgs& args, uint64_t workspace_bytes) {
    CheckLt(lt.preference_init(&opaque, sizeof(opaque)), "preference");
    Set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, workspace_bytes);
    Set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
        static_cast<uint32_t>(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
    const Alignments alignments(args);
    Set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignments.w);
    Set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignments.x);
    Set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignments.y);
    Set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignments.y);
  }

  template <typename T>
  void Set(cublasLtMatmulPreferenceAttributes_t attribute, const T& value) {
    CheckLt(lt.preference_set(&opaque, attribute, &value, sizeof(value)),
            "attribute of the preference");
  }
};

std::string ShapeText(const GemmArgs& args, int64_t m) {
  return absl::StrCat("matrix product [", m, ", ", args.k, "] x [", args.n, ", ", args.k, "] of ",
                      NameOf(args.dtype), " to ", NameOf(args.y_dtype));
}

void CheckArgs(const GemmArgs& args) {
  SLUICE_CHECK(args.m > 0 && args.n > 0 && args.k > 0)
      << args.m << " x " << args.n << " x " << args.k;
  SLUICE_CHECK(args.x_stride >= args.k && args.w_stride >= args.k && args.y_stride >= args.n)
      << "strides " << args.x_stride << ", " << args.w_stride << ", " << args.y_stride;
  SLUICE_CHECK(!(args.relu && args.accumulate)) << "relu of a residual";
}

}  // namespace

int64_t GemmRowBucket(int64_t m) {
  int64_t bucket = 1;
  while (bucket < m) {
    if (bucket >= 64 && bucket + bucket / 2 >= m) return bucket + bucket / 2;
    bucket *= 2;
  }
  return bucket;
}

Gemm::Gemm(cublasLtHandle_t handle, DeviceMemory workspace)
    : handle_(handle), workspace_(std::move(workspace)) {}

Gemm::~Gemm() { static_cast<void>(CublasLibrary::Get()->destroy(handle_)); }

absl::StatusOr<std::unique_ptr<Gemm>> Gemm::Create(int64_t workspace_bytes) {
  SLUICE_RETURN_IF_ERROR(CublasLibrary::Load());
  SLUICE_ASSIGN_OR_RETURN(DeviceMemory workspace, DeviceMemory::Allocate(workspace_bytes));
  cublasLtHandle_t handle = nullptr;
  SLUICE_RETURN_IF_ERROR(LtStatus(CublasLibrary::Get()->create(&handle), "start of cuBLASLt"));
  return std::unique_ptr<Gemm>(new Gemm(handle, std::move(workspace)));
}

absl::Status Gemm::Choose(const GemmArgs& args, int64_t bucket) {
  const Key key(args.n, args.k, bucket, TraitBits(args));
  if (chosen_.find(key) != chosen_.end()) return absl::OkStatus();
  Problem problem(args, bucket);
  Preference preference(args, static_cast<uint64_t>(workspace_.bytes()));
  cublasLtMatmulHeuristicResult_t result{};
  int count = 0;
  const cublasStatus_t status = CublasLibrary::Get()->heuristic(
      handle_, &problem.operation, &problem.w, &problem.x, &problem.y, &problem.y,
      &preference.opaque, /*requestedAlgoCount=*/1, &result, &count);
  if (status == CUBLAS_STATUS_NOT_SUPPORTED || (status == CUBLAS_STATUS_SUCCESS && count == 0)) {
    return absl::UnimplementedError(
        absl::StrCat("cuBLASLt has no kernel for the ", ShapeText(args, bucket)));
  }
  SLUICE_RETURN_IF_ERROR(
      LtStatus(status, absl::StrCat("choice for the ", ShapeText(args, bucket))));
  chosen_.emplace(key, result.algo);
  return absl::OkStatus();
}

absl::Status Gemm::Prepare(const GemmArgs& args) {
  CheckArgs(args);
  const int64_t last = GemmRowBucket(args.m);
  for (int64_t bucket = 1; bucket <= last; bucket = GemmRowBucket(bucket + 1)) {
    SLUICE_RETURN_IF_ERROR(Choose(args, bucket));
  }
  return absl::OkStatus();
}

void Gemm::Run(const LaunchContext& context, const GemmArgs& args) {
  CheckArgs(args);
  const int64_t bucket = GemmRowBucket(args.m);
  const Key key(args.n, args.k, bucket, TraitBits(args));
  auto found = chosen_.find(key);
  if (found == chosen_.end()) {
    const absl::Status status = Choose(args, bucket);
    SLUICE_CHECK(status.ok()) << status.ToString();
    found = chosen_.find(key);
  }
  Problem problem(args, args.m);
  const float alpha = 1.0f;
  const float beta = args.accumulate ? 1.0f : 0.0f;
  const cublasStatus_t status = CublasLibrary::Get()->matmul(
      handle_, &problem.operation, &alpha, args.w, &problem.w, args.x, &problem.x, &beta, args.y,
      &problem.y, args.y, &problem.y, &found->second, workspace_.data(),
      static_cast<size_t>(workspace_.bytes()), context.stream);
  SLUICE_CHECK(status == CUBLAS_STATUS_SUCCESS)
      << ShapeText(args, args.m) << ": " << CublasLibrary::Get()->status_string(status);
}

}  // namespace sluice
