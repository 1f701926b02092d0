// Device code that the attention kernels share: asynchronous copies to shared memory, matrix
// fragments and mma.sync for float16 and bfloat16, and the choice of a kernel instance by shape.
// Included by .cu files only.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/core/check.h"
#include "kernels/cuda/attention.h"

namespace sluice {

inline constexpr float kLog2E = 1.4426950408889634f;

__device__ __forceinline__ uint32_t SharedAddress(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies 16 bytes past L1, or writes 16 zero bytes.
__device__ __forceinline__ void CopyAsync16(uint32_t shared, const void* global, bool copy) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
               "r"(copy ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void CommitCopies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most kPending of this thread's latest groups are under way.
template <int kPending>
__device__ __forceinline__ void WaitForCopies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
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

// c [16, 8] += a [16, 16] * b [16, 8].
template <typename T>
__device__ __forceinline__ void Mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                    uint32_t a3, uint32_t b0, uint32_t b1) {
  if constexpr (sizeof(T) == sizeof(__half) && std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}

// Two floats as two 16-bit elements, `low` at the lower address.
template <typename T>
__device__ __forceinline__ uint32_t Pack(float low, float high) {
  uint32_t bits;
  if constexpr (std::is_same_v<T, __half>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  }
  return bits;
}

template <typename T>
__device__ __forceinline__ float ToFloat(T value) {
  if constexpr (std::is_same_v<T, __half>) {
    return __half2float(value);
  } else {
    return __bfloat162float(value);
  }
}
template <typename T>
__device__ __forceinline__ T FromFloat(float value) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(value);
  } else {
    return __float2bfloat16_rn(value);
  }
}

__device__ __forceinline__ float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Elements i and i + half_dim of a head turned by an angle, before rounding. Every kernel rounds the
// same way, so that q and k have the same bits whoever turns them.
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
