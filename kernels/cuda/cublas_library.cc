#include "kernels/cuda/cublas_library.h"

#include <dlfcn.h>

#include <string>
#include <type_traits>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"

namespace sluice {
namespace {

constexpr char kName[] = "libcublasLt.so.13";
constexpr char kBuildTimeFolder[] = SLUICE_CUDA_LIBRARY_DIR;

absl::StatusOr<CublasLibrary> Find() {
  void* library = dlopen(kName, RTLD_NOW | RTLD_LOCAL);
  const std::string second = absl::StrCat(kBuildTimeFolder, "/", kName);
  if (library == nullptr) library = dlopen(second.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    return absl::NotFoundError(
        absl::StrCat("cuBLAS 13 (", kName, ") is neither in the loader's path nor in ",
                     kBuildTimeFolder, ": install it, or name its folder in LD_LIBRARY_PATH"));
  }
  CublasLibrary found{};
  std::string missing;
  const auto bind = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
    if (function == nullptr) missing = name;
  };
  bind(found.create, "cublasLtCreate");
  bind(found.destroy, "cublasLtDestroy");
  bind(found.status_string, "cublasLtGetStatusString");
  bind(found.heuristic, "cublasLtMatmulAlgoGetHeuristic");
  bind(found.matmul, "cublasLtMatmul");
  bind(found.desc_init, "cublasLtMatmulDescInit_internal");
  bind(found.desc_set, "cublasLtMatmulDescSetAttribute");
  bind(found.layout_init, "cublasLtMatrixLayoutInit_internal");
  bind(found.preference_init, "cublasLtMatmulPreferenceInit_internal");
  bind(found.preference_set, "cublasLtMatmulPreferenceSetAttribute");
  if (missing.empty()) return found;
  return absl::NotFoundError(
      absl::StrCat("the cuBLAS found as ", kName, " has no ", missing, ": install cuBLAS 13"));
}

const absl::StatusOr<CublasLibrary>& Library() {
  static const auto& library = *new absl::StatusOr<CublasLibrary>(Find());
  return library;
}

}  // namespace

absl::Status CublasLibrary::Load() { return Library().status(); }

const CublasLibrary* CublasLibrary::Get() { return &*Library(); }

}  // namespace sluice
