// What kernels need of float16 and bfloat16 under one name: Numeric<T> for T = __half and
// __nv_bfloat16; pairs of elements travel as uint32_t (the lower half is the first).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace sluice {

template <typename T>
struct Numeric;

template <>
struct Numeric<__half> {
  using Pair = __half2;
  static __device__ __forceinline__ float ToFloat(__half x) { return __half2float(x); }
  static __device__ __forceinline__ __half FromFloat(float x) { return __float2half_rn(x); }
  static __device__ __forceinline__ float2 ToFloat2(uint32_t pair) {
    return __half22float2(reinterpret_cast<const __half2&>(pair));
  }
  static __device__ __forceinline__ uint32_t FromFloats(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
};

template <>
struct Numeric<__nv_bfloat16> {
  using Pair = __nv_bfloat162;
  static __device__ __forceinline__ float ToFloat(__nv_bfloat16 x) { return __bfloat162float(x); }
  static __device__ __forceinline__ __nv_bfloat16 FromFloat(float x) {
    return __float2bfloat16_rn(x);
  }
  static __device__ __forceinline__ float2 ToFloat2(uint32_t pair) {
    return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(pair));
  }
  static __device__ __forceinline__ uint32_t FromFloats(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
};

// Arithmetic on pairs.
template <typename T>
__device__ __forceinline__ uint32_t PairSub(uint32_t a, uint32_t b) {
  using Pair = typename Numeric<T>::Pair;
  const Pair result = __hsub2(reinterpret_cast<const Pair&>(a), reinterpret_cast<const Pair&>(b));
  return reinterpret_cast<const uint32_t&>(result);
}
template <typename T>
__device__ __forceinline__ uint32_t PairMul(uint32_t a, uint32_t b) {
  using Pair = typename Numeric<T>::Pair;
  const Pair result = __hmul2(reinterpret_cast<const Pair&>(a), reinterpret_cast<const Pair&>(b));
  return reinterpret_cast<const uint32_t&>(result);
}
// a * b + c with one rounding.
template <typename T>
__device__ __forceinline__ uint32_t PairFma(uint32_t a, uint32_t b, uint32_t c) {
  using Pair = typename Numeric<T>::Pair;
  const Pair result = __hfma2(reinterpret_cast<const Pair&>(a), reinterpret_cast<const Pair&>(b),
                              reinterpret_cast<const Pair&>(c));
  return reinterpret_cast<const uint32_t&>(result);
}
// The first or second element of a pair, twice.
__device__ __forceinline__ uint32_t TwiceLow(uint32_t pair) { return __byte_perm(pair, 0, 0x1010); }
__device__ __forceinline__ uint32_t TwiceHigh(uint32_t pair) {
  return __byte_perm(pair, 0, 0x3232);
}

// d [16, 8] += a [16, 16] * b [16, 8], float32 accumulation; one warp. With g = lane / 4, t = lane
// % 4:
//   a[0] = (row g, k 2t..2t+1)   a[1] = (row g+8, same)   a[2] = (row g, k 2t+8..2t+9)   a[3] = row
//   g+8 b0 = (k 2t..2t+1, column g)  b1 = (k 2t+8..2t+9, column g) d[0], d[1] = (row g, columns 2t,
//   2t+1)       d[2], d[3] = row g+8
// (PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type".)
template <typename T>
__device__ __forceinline__ void Mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1);
template <>
__device__ __forceinline__ void Mma<__half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                            uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void Mma<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4],
                                                   uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Copies of 16 bytes from global to shared memory that run on while the thread goes on; past the
// L1. `bytes` 0 fills with zeros.
__device__ __forceinline__ void CopyAsync16(void* shared, const void* global) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
}
__device__ __forceinline__ void CopyAsync16(void* shared, const void* global, int bytes) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global),
               "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void CommitCopies() { asm volatile("cp.async.commit_group;"); }
// Waits until at most kPending of this thread's groups are under way.
template <int kPending>
__device__ __forceinline__ void WaitForCopies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace sluice
