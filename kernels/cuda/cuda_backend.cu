// The CUDA backend's place. Until its operations are here, a worker that asks for a GPU is told so
// when it starts, before anything is loaded.
#include <cuda_runtime_api.h>

#include "absl/strings/str_cat.h"
#include "kernels/backend.h"

namespace sluice {

absl::StatusOr<std::unique_ptr<Backend>> MakeCudaBackend(int device_index) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess) devices = 0;
  return absl::UnimplementedError(absl::StrCat(
      "GPU ", device_index, " (of ", devices,
      " found): this version runs models on CPU workers only; start the worker with --device cpu"));
}

}  // namespace sluice
