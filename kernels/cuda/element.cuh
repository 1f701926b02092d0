// Elements of activations in device code: float32 from and to float16 and bfloat16, one or eight at
// a time, and the host's choice between the two. Included by .cu files only.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/core/check.h"
#include "kernels/core/dtype.h"

namespace sluice {

inline constexpr int kWide = 8;  // Elements of a 16-byte load

__device__ __forceinline__ float ToFloat(float x) { return x; }
__device__ __forceinline__ float ToFloat(__half x) { return __half2float(x); }
__device__ __forceinline__ float ToFloat(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void Store(float x, __half* y) { *y = __float2half_rn(x); }
__device__ __forceinline__ void Store(float x, __nv_bfloat16* y) { *y = __float2bfloat16_rn(x); }

// kCount elements at `from`: one, or kWide at an address that is a multiple of 16 bytes.
template <int kCount, typename T>
__device__ __forceinline__ void Load(const T* from, float* to) {
  if constexpr (kCount == 1) {
    *to = ToFloat(*from);
  } else {
    alignas(16) T values[kCount];
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(values) / 16); ++i) {
      reinterpret_cast<uint4*>(values)[i] = reinterpret_cast<const uint4*>(from)[i];
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = ToFloat(values[i]);
  }
}

template <int kCount, typename T>
__device__ __forceinline__ void Write(const float* from, T* to) {
  if constexpr (kCount == 1) {
    Store(*from, to);
  } else {
    alignas(16) T values[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) Store(from[i], &values[i]);
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(values);
  }
}

inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether rows of `stride` elements at `data` all begin at multiples of 16 bytes.
inline bool IsAligned(const void* data, int64_t stride, DType dtype) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
         stride * static_cast<int64_t>(SizeOf(dtype)) % 16 == 0;
}

// Calls function(T()) with the element type of an activation dtype.
template <typename Function>
void Dispatch(DType dtype, const Function& function) {
  SLUICE_CHECK(dtype == DType::kF16 || dtype == DType::kBF16) << NameOf(dtype);
  if (dtype == DType::kF16) {
    function(__half());
  } else {
    function(__nv_bfloat16());
  }
}

}  // namespace sluice
