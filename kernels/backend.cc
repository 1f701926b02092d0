// MakeCudaBackend of a build without CUDA.
#include "kernels/backend.h"

namespace sluice {

absl::StatusOr<std::unique_ptr<Backend>> MakeCudaBackend(int /*device_index*/, DType /*dtype*/) {
  return absl::UnimplementedError(
      "this build has no CUDA backend; use device cpu, or build with CMAKE_CUDA_COMPILER set");
}

}  // namespace sluice
