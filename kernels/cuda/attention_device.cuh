// Device code that the attention kernels share: copies to addresses of shared memory, matrix
// fragments, turning, places in the cache, and the choice of a kernel instance by shape.
// Included by .cu files only.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/core/check.h"
#include "kernels/cuda/attention.h"
#include "kernels/cuda/numeric.cuh"

namespace sluice {

inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr float kLowest = -1e30f;  // Score of a key that is not seen

__device__ __forceinline__ uint32_t SharedAddress(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies 16 bytes past L1, or writes 16 zero bytes.
__device__ __forceinline__ void CopyAsync16(uint32_t shared, const void* global, bool copy) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
               "r"(copy ? 16 : 0)
               : "memory");
}

// Four 8 x 8 matrices of 16-bit elements; lane 8 i + r gives the address of row r of matrix i.
__device__ __forceinline__ void LoadMatrices(uint32_t (&out)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared)
               : "memory");
}
__device__ __forceinline__ void LoadMatricesTransposed(uint32_t (&out)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared)
               : "memory");
}

__device__ __forceinline__ float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Elements i and i + half_dim of a head turned by an angle, before rounding. Every kernel rounds
// the same way, so that q and k have the same bits whoever turns them.
__device__ __forceinline__ float2 Turn(float first, float second, float cos, float sin) {
  return {__fmaf_rn(first, cos, -__fmul_rn(second, sin)),
          __fmaf_rn(second, cos, __fmul_rn(first, sin))};
}

// Row (block, head, slot) of the cache that holds key `key` of the sequence whose row of the block
// table is `table`.
__device__ __forceinline__ uint32_t KvRow(const int32_t* table, int key, int kv_head,
                                          int num_kv_heads, int block_size) {
  const auto block = static_cast<uint32_t>(table[key / block_size]);
  return (block * num_kv_heads + kv_head) * block_size + key % block_size;
}

// Calls launch.operator()<T, kHeadDim>() for the shape's dtype and head_dim.
template <typename T, typename LaunchFunction>
void ForHeadDim(int head_dim, const LaunchFunction& launch) {
  switch (head_dim) {
    case 32:
      return launch.template operator()<T, 32>();
    case 64:
      return launch.template operator()<T, 64>();
    case 80:
      return launch.template operator()<T, 80>();
    case 96:
      return launch.template operator()<T, 96>();
    case 128:
      return launch.template operator()<T, 128>();
    case 256:
      return launch.template operator()<T, 256>();
    default:
      SLUICE_CHECK(false) << "head_dim " << head_dim;
  }
}
template <typename LaunchFunction>
void ForShape(const AttentionShape& shape, const LaunchFunction& launch) {
  SLUICE_CHECK(AttentionSupports(shape)) << shape.num_heads << " heads over " << shape.num_kv_heads
                                         << " of " << shape.head_dim << ", " << NameOf(shape.dtype);
  if (shape.dtype == DType::kF16) {
    ForHeadDim<__half>(shape.head_dim, launch);
  } else {
    ForHeadDim<__nv_bfloat16>(shape.head_dim, launch);
  }
}

template <typename Params>
void AllowShared(void (*kernel)(Params), int bytes) {
  SLUICE_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                         cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

}  // namespace sluice
