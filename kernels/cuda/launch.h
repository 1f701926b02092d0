// Launching kernels: on one stream, in a chain of programmatic dependent launches where the card
// has them (sm_90 and newer), plain launches elsewhere.
//
// Every kernel of a step is launched with Launch() and begins with: what does not depend on other
// kernels (reads of weights), then WaitForPrevious(), then the rest. Without the wait a kernel may
// run before the one in front of it has written its output; and since a kernel counts as complete
// only after its own wait, a chain of them is in order throughout.
#pragma once

#include <cuda_runtime.h>

#include "kernels/core/check.h"

namespace sluice {

#define SLUICE_CUDA_CHECK(call)                                    \
  do {                                                             \
    const cudaError_t sluice_cuda_error = (call);                  \
    SLUICE_CHECK(sluice_cuda_error == cudaSuccess)                 \
        << #call << ": " << cudaGetErrorString(sluice_cuda_error); \
  } while (false)

// Where and how kernels of one backend are launched. Copied freely.
struct LaunchContext {
  cudaStream_t stream = nullptr;
  int num_sms = 0;
  int max_shared_bytes = 0;       // A block may opt in to
  bool dependent_launch = false;  // Programmatic dependent launch
};

// Device: lets the next kernel of the stream start its own preparation now.
__device__ __forceinline__ void LetNextStart() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
// Device: waits until the kernels before this one have written everything.
__device__ __forceinline__ void WaitForPrevious() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// A refused launch (wrong configuration) is a bug of ours. An error of a kernel itself shows at the
// next call that waits for the stream.
template <typename... Params, typename... Args>
void Launch(const LaunchContext& context, void (*kernel)(Params...), dim3 grid, dim3 block,
            size_t shared_bytes, Args... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = context.stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = context.dependent_launch ? 1 : 0;
  SLUICE_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...));
}

}  // namespace sluice
