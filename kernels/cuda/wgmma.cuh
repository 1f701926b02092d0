// Products of a warpgroup (wgmma, sm_90a), 64 rows of 16-bit elements with float32 sums. Elsewhere
// the functions do nothing. Included by .cu files only.
//
// Operands in shared memory lie in panels of 64 elements (128 bytes) a row, the 16-byte chunks of
// row r permuted by XOR with r % 8; panels begin at multiples of 1024 bytes. The sums of a
// warpgroup's warp w, rows 16 w to 16 w + 15, lie as those of mma.sync: lane l has rows l / 4 and l
// / 4 + 8 and columns 8 n + 2 (l % 4) + {0, 1} in d[n].
#pragma once

#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace sluice {

// clang-format off
#define SLUICE_TILE(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define SLUICE_EIGHT_TILES(n)                                                      \
  SLUICE_TILE(n), SLUICE_TILE(n + 1), SLUICE_TILE(n + 2), SLUICE_TILE(n + 3),      \
      SLUICE_TILE(n + 4), SLUICE_TILE(n + 5), SLUICE_TILE(n + 6), SLUICE_TILE(n + 7)
#define SLUICE_WGMMA_SS_64(type)                                                          \
  asm volatile(                                                                           \
      "{ .reg .pred p; setp.ne.b32 p, %34, 0; "                                           \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {"                    \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "            \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, " \
      "%32, %33, p, 1, 1, 0, 0; }"                                                        \
      : SLUICE_EIGHT_TILES(0)                                                             \
      : "l"(a), "l"(b), "r"(accumulate))
#define SLUICE_WGMMA_SS_128(type)                                                         \
  asm volatile(                                                                           \
      "{ .reg .pred p; setp.ne.b32 p, %66, 0; "                                           \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {"                   \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "            \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "  \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "  \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, " \
      "%64, %65, p, 1, 1, 0, 0; }"                                                        \
      : SLUICE_EIGHT_TILES(0), SLUICE_EIGHT_TILES(8)                                      \
      : "l"(a), "l"(b), "r"(accumulate))
#define SLUICE_WGMMA_RS_64(type)                                                          \
  asm volatile(                                                                           \
      "{ .reg .pred p; setp.ne.b32 p, %37, 0; "                                           \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {"                    \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "            \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, " \
      "{%32, %33, %34, %35}, %36, p, 1, 1, 1; }"                                          \
      : SLUICE_EIGHT_TILES(0)                                                             \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1))
#define SLUICE_WGMMA_RS_128(type)                                                         \
  asm volatile(                                                                           \
      "{ .reg .pred p; setp.ne.b32 p, %69, 0; "                                           \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {"                   \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "            \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "  \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "  \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, " \
      "{%64, %65, %66, %67}, %68, p, 1, 1, 1; }"                                          \
      : SLUICE_EIGHT_TILES(0), SLUICE_EIGHT_TILES(8)                                      \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1))
// clang-format on

// d [64, 8 * kTiles] (+)= a [64, 16] * b [16, 8 * kTiles], both in shared memory, rows of K
// elements.
template <typename T, int kTiles>
__device__ __forceinline__ void MultiplyShared(float (&d)[kTiles][4], uint64_t a, uint64_t b,
                                               int accumulate) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  static_assert(kTiles == 8 || kTiles == 16);
  if constexpr (std::is_same_v<T, __half>) {
    if constexpr (kTiles == 8) SLUICE_WGMMA_SS_64("f16");
    if constexpr (kTiles == 16) SLUICE_WGMMA_SS_128("f16");
  } else {
    if constexpr (kTiles == 8) SLUICE_WGMMA_SS_64("bf16");
    if constexpr (kTiles == 16) SLUICE_WGMMA_SS_128("bf16");
  }
#endif
}

// d [64, 8 * kTiles] += a [64, 16] in registers * b [16, 8 * kTiles], rows of b next to each other.
template <typename T, int kTiles>
__device__ __forceinline__ void MultiplyRegisters(float (&d)[kTiles][4], const uint32_t (&a)[4],
                                                  uint64_t b) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  static_assert(kTiles == 8 || kTiles == 16);
  if constexpr (std::is_same_v<T, __half>) {
    if constexpr (kTiles == 8) SLUICE_WGMMA_RS_64("f16");
    if constexpr (kTiles == 16) SLUICE_WGMMA_RS_128("f16");
  } else {
    if constexpr (kTiles == 8) SLUICE_WGMMA_RS_64("bf16");
    if constexpr (kTiles == 16) SLUICE_WGMMA_RS_128("bf16");
  }
#endif
}

// Before the first product after ordinary writes of its registers.
__device__ __forceinline__ void BeginProducts() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
// Waits for all products.
__device__ __forceinline__ void EndProducts() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#endif
}
// Keeps the compiler from moving uses of registers across a wait.
template <int kTiles>
__device__ __forceinline__ void Pin(float (&d)[kTiles][4]) {
#pragma unroll
  for (auto& tile : d) {
    asm volatile("" : "+f"(tile[0]), "+f"(tile[1]), "+f"(tile[2]), "+f"(tile[3])::"memory");
  }
}
// Makes shared memory that this thread has written visible to the tensor cores.
__device__ __forceinline__ void PublishToTensorCores() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Groups of 8 rows are 1024 bytes apart, panels `panel_bytes`.
__device__ __forceinline__ uint64_t Descriptor(uint32_t shared, int panel_bytes) {
  return static_cast<uint64_t>((shared & 0x3ffff) >> 4) |
         static_cast<uint64_t>(panel_bytes >> 4) << 16 | uint64_t{1024 >> 4} << 32 |
         uint64_t{1} << 62;
}

#undef SLUICE_WGMMA_SS_64
#undef SLUICE_WGMMA_SS_128
#undef SLUICE_WGMMA_RS_64
#undef SLUICE_WGMMA_RS_128
#undef SLUICE_EIGHT_TILES
#undef SLUICE_TILE

}  // namespace sluice
