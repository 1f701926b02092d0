// Flash prefill with wgmma, for sm_90 and head_dim 64 and 128. A block takes the up to 64 rows of a
// tile; each of its kHeads warpgroups does one query head of the KV head. Q, K and V lie in shared
// memory in panels of 64 columns, rows of 128 bytes, 16-byte chunks permuted as the tensor cores
// expect it (128-byte swizzle). The next tile of keys is on its way while one is used.
#include <algorithm>

#include "kernels/cuda/attention_prefill.h"

namespace sluice {
namespace {

constexpr int kRows = kPrefillTileRows;
constexpr int kGroupThreads = 128;  // A warpgroup
constexpr int kPairKeys = 64;       // Of a tile
static_assert(kRows == 64);

// clang-format off
#define SLUICE_WGMMA_SS_64(type)\
asm volatile(\
"{ .reg .pred p; setp.ne.b32 p, %34, 0; "\
"wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {"\
"%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "\
"%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "\
"%32, %33, p, 1, 1, 0, 0; }"\
: "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]), "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]), "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3]), "+f"(d[4][0]), "+f"(d[4][1]), "+f"(d[4][2]), "+f"(d[4][3]), "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]), "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]), "+f"(d[7][0]), "+f"(d[7][1]), "+f"(d[7][2]), "+f"(d[7][3])\
: "l"(a), "l"(b), "r"(accumulate))
#define SLUICE_WGMMA_RS_64(type)\
asm volatile(\
"{ .reg .pred p; setp.ne.b32 p, %37, 0; "\
"wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {"\
"%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "\
"%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "\
"{%32, %33, %34, %35}, %36, p, 1, 1, 1; }"\
: "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]), "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]), "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3]), "+f"(d[4][0]), "+f"(d[4][1]), "+f"(d[4][2]), "+f"(d[4][3]), "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]), "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]), "+f"(d[7][0]), "+f"(d[7][1]), "+f"(d[7][2]), "+f"(d[7][3])\
: "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1))
#define SLUICE_WGMMA_SS_128(type)\
asm volatile(\
"{ .reg .pred p; setp.ne.b32 p, %66, 0; "\
"wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {"\
"%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "\
"%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "\
"%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "\
"%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "\
"%64, %65, p, 1, 1, 0, 0; }"\
: "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]), "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]), "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3]), "+f"(d[4][0]), "+f"(d[4][1]), "+f"(d[4][2]), "+f"(d[4][3]), "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]), "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]), "+f"(d[7][0]), "+f"(d[7][1]), "+f"(d[7][2]), "+f"(d[7][3]), "+f"(d[8][0]), "+f"(d[8][1]), "+f"(d[8][2]), "+f"(d[8][3]), "+f"(d[9][0]), "+f"(d[9][1]), "+f"(d[9][2]), "+f"(d[9][3]), "+f"(d[10][0]), "+f"(d[10][1]), "+f"(d[10][2]), "+f"(d[10][3]), "+f"(d[11][0]), "+f"(d[11][1]), "+f"(d[11][2]), "+f"(d[11][3]), "+f"(d[12][0]), "+f"(d[12][1]), "+f"(d[12][2]), "+f"(d[12][3]), "+f"(d[13][0]), "+f"(d[13][1]), "+f"(d[13][2]), "+f"(d[13][3]), "+f"(d[14][0]), "+f"(d[14][1]), "+f"(d[14][2]), "+f"(d[14][3]), "+f"(d[15][0]), "+f"(d[15][1]), "+f"(d[15][2]), "+f"(d[15][3])\
: "l"(a), "l"(b), "r"(accumulate))
#define SLUICE_WGMMA_RS_128(type)\
asm volatile(\
"{ .reg .pred p; setp.ne.b32 p, %69, 0; "\
"wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {"\
"%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "\
"%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "\
"%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "\
"%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "\
"{%64, %65, %66, %67}, %68, p, 1, 1, 1; }"\
: "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]), "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]), "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3]), "+f"(d[4][0]), "+f"(d[4][1]), "+f"(d[4][2]), "+f"(d[4][3]), "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]), "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]), "+f"(d[7][0]), "+f"(d[7][1]), "+f"(d[7][2]), "+f"(d[7][3]), "+f"(d[8][0]), "+f"(d[8][1]), "+f"(d[8][2]), "+f"(d[8][3]), "+f"(d[9][0]), "+f"(d[9][1]), "+f"(d[9][2]), "+f"(d[9][3]), "+f"(d[10][0]), "+f"(d[10][1]), "+f"(d[10][2]), "+f"(d[10][3]), "+f"(d[11][0]), "+f"(d[11][1]), "+f"(d[11][2]), "+f"(d[11][3]), "+f"(d[12][0]), "+f"(d[12][1]), "+f"(d[12][2]), "+f"(d[12][3]), "+f"(d[13][0]), "+f"(d[13][1]), "+f"(d[13][2]), "+f"(d[13][3]), "+f"(d[14][0]), "+f"(d[14][1]), "+f"(d[14][2]), "+f"(d[14][3]), "+f"(d[15][0]), "+f"(d[15][1]), "+f"(d[15][2]), "+f"(d[15][3])\
: "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1))
// clang-format on

// d [64, 8 * kTiles] (+)= a [64, 16] * b [16, 8 * kTiles], both in shared memory, rows of K elements.
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

template <int kHeadDim, int kHeads, int kKeys>
struct Sm90Layout {
  static constexpr int kQueryBytes = kRows * kHeadDim * 2;                      // Of a head
  static constexpr int kTileBytes = kKeys * kHeadDim * 2;                       // Of K, and of V
  static constexpr int kShared = 1024 + kHeads * kQueryBytes + 4 * kTileBytes;  // 1024 to align

  // Place of 16-byte chunk `column` of row `row` of a matrix of `rows` rows.
  __device__ static uint32_t Place(int rows, int row, int column) {
    return column / 8 * (rows * 128) + row * 128 + ((column ^ row) % 8) * 16;
  }
};

// Starts the copies of keys [first, first + kKeys), K to `shared`, V behind it; zeros behind the last.
template <typename T, int kHeadDim, int kHeads, int kKeys>
__device__ __forceinline__ void FetchKeys(const PrefillParams& p, const int32_t* table, int kv_head,
                                          int first, int length, uint32_t shared) {
  using L = Sm90Layout<kHeadDim, kHeads, kKeys>;
  constexpr int kChunks = kHeadDim / 8;
  constexpr int kThreads = kHeads * kGroupThreads;
  const uint32_t located =
      KvRow(table, min(first + threadIdx.x % (kKeys / 16) * 16, length - 1) / 16 * 16, kv_head,
            p.num_kv_heads, p.block_size);
#pragma unroll
  for (int i = 0; i < kKeys * kChunks / kThreads; ++i) {
    const int row = (threadIdx.x + i * kThreads) / kChunks;
    const int column = (threadIdx.x + i * kThreads) % kChunks;
    const uint32_t from = __shfl_sync(0xffffffffu, located, row / 16) + row % 16;
    const size_t offset = static_cast<size_t>(from) * kHeadDim + column * 8;
    const uint32_t to = shared + L::Place(kKeys, row, column);
    CopyAsync16(to, static_cast<const T*>(p.k) + offset, first + row < length);
    CopyAsync16(to + L::kTileBytes, static_cast<const T*>(p.v) + offset, first + row < length);
  }
  CommitCopies();
}

template <typename T, int kHeadDim, int kHeads, int kKeys>
__global__ void __launch_bounds__(kHeads* kGroupThreads, 1) Sm90Kernel(const PrefillParams p) {
  using L = Sm90Layout<kHeadDim, kHeads, kKeys>;
  constexpr int kChunks = kHeadDim / 8;
  constexpr int kThreads = kHeads * kGroupThreads;
  extern __shared__ __align__(1024) uint8_t shared[];
  LetNextStart();
  WaitForPrevious();

  const int warp = threadIdx.x / 32 % 4;
  const int lane = threadIdx.x % 32;
  // Late rows see the most keys: they start first.
  const PrefillTile tile = p.step.prefill_tiles[gridDim.y - 1 - blockIdx.y];
  const int first_head = blockIdx.x * kHeads;
  const int group = threadIdx.x / kGroupThreads;
  const int length = tile.start_pos + tile.num_rows;
  const int kv_head = first_head / p.group;
  const int32_t* table = p.step.block_tables + tile.sequence * p.step.block_table_stride;
  const T* q = static_cast<const T*>(p.qkv) + tile.row_begin * p.qkv_stride +
               static_cast<int64_t>(first_head) * kHeadDim;
  const uint32_t q_shared = (SharedAddress(shared) + 1023) / 1024 * 1024;
  const uint32_t kv_shared = q_shared + kHeads * L::kQueryBytes;
#pragma unroll
  for (int i = 0; i < kHeads * kRows * kChunks / kThreads; ++i) {
    const int chunk = threadIdx.x + i * kThreads;
    const int row = chunk / (kHeads * kChunks);
    const int column = chunk % (kHeads * kChunks);
    CopyAsync16(
        q_shared + column / kChunks * L::kQueryBytes + L::Place(kRows, row, column % kChunks),
        q + min(row, tile.num_rows - 1) * p.qkv_stride + column * 8, row < tile.num_rows);
  }
  FetchKeys<T, kHeadDim, kHeads, kKeys>(p, table, kv_head, 0, length, kv_shared);

  const uint32_t q_own = q_shared + group * L::kQueryBytes;
  const int warp_position = tile.start_pos + 16 * warp;
  RowState<T, kHeadDim> rows;
  const int num_tiles = (length + kKeys - 1) / kKeys;
  for (int t = 0; t < num_tiles; ++t) {
    const uint32_t k_tile = kv_shared + t % 2 * (2 * L::kTileBytes);
    const uint32_t v_tile = k_tile + L::kTileBytes;
    WaitForCopies<0>();
    PublishToTensorCores();
    __syncthreads();  // The tile is there, and everyone is done with the one before
    if (t + 1 < num_tiles) {
      FetchKeys<T, kHeadDim, kHeads, kKeys>(p, table, kv_head, (t + 1) * kKeys, length,
                                            kv_shared + (t + 1) % 2 * (2 * L::kTileBytes));
    }
    float s[kKeys / 8][4];
    Pin(s);
    BeginProducts();
#pragma unroll
    for (int j = 0; j < kHeadDim / 16; ++j) {
      const int in_panel = j % 4 * 32;
      MultiplyShared<T>(s, Descriptor(q_own + j / 4 * (kRows * 128) + in_panel, 16),
                        Descriptor(k_tile + j / 4 * (kKeys * 128) + in_panel, 16), j > 0);
    }
    EndProducts();
    Pin(s);
    if ((t + 1) * kKeys - 1 > warp_position) {
      MaskCausal(s, t * kKeys + 2 * (lane % 4) - warp_position - lane / 4);
    }
    rows.Update(s, p.scale);
    uint32_t weights[kKeys / 16][4];
#pragma unroll
    for (int n = 0; n < kKeys / 16; ++n) {
      weights[n][0] = Pack<T>(s[2 * n][0], s[2 * n][1]);
      weights[n][1] = Pack<T>(s[2 * n][2], s[2 * n][3]);
      weights[n][2] = Pack<T>(s[2 * n + 1][0], s[2 * n + 1][1]);
      weights[n][3] = Pack<T>(s[2 * n + 1][2], s[2 * n + 1][3]);
    }
    Pin(rows.out);
    BeginProducts();
#pragma unroll
    for (int n = 0; n < kKeys / 16; ++n) {
      MultiplyRegisters<T>(rows.out, weights[n], Descriptor(v_tile + n * 2048, kKeys * 128));
    }
    EndProducts();
    Pin(rows.out);
#pragma unroll
    for (auto& four : weights) {
      asm volatile("" : "+r"(four[0]), "+r"(four[1]), "+r"(four[2]), "+r"(four[3])::"memory");
    }
  }
  T* out = static_cast<T*>(p.out) + (tile.row_begin + 16 * warp) * p.out_stride +
           static_cast<int64_t>(first_head + group) * kHeadDim;
  StoreRows(rows, tile.num_rows - 16 * warp, out, p.out_stride);
}

template <typename T, int kHeadDim, int kHeads, int kKeys>
bool Launch90(const LaunchContext& context, const PrefillParams& params, int num_heads) {
  constexpr int kShared = Sm90Layout<kHeadDim, kHeads, kKeys>::kShared;
  auto* kernel = &Sm90Kernel<T, kHeadDim, kHeads, kKeys>;
  cudaFuncAttributes attributes;
  SLUICE_CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel));
  if (attributes.binaryVersion != 90) return false;
  AllowShared(kernel, kShared);
  Launch(context, kernel, dim3(num_heads / kHeads, params.step.num_prefill_tiles),
         dim3(kHeads * kGroupThreads), kShared, params);
  return true;
}

template <typename T, int kHeadDim>
bool LaunchHeads(const LaunchContext& context, const PrefillParams& params, int num_heads) {
  const int64_t pairs = static_cast<int64_t>(params.step.num_prefill_tiles) * num_heads / 2;
  if (params.group % 2 == 0 && pairs >= context.num_sms) {
    return Launch90<T, kHeadDim, 2, kPairKeys>(context, params, num_heads);
  }
  return Launch90<T, kHeadDim, 1, kPairKeys>(context, params, num_heads);
}

template <typename T>
bool LaunchDims(const LaunchContext& context, const AttentionShape& shape,
                const PrefillParams& params) {
  if (shape.head_dim == 64) return LaunchHeads<T, 64>(context, params, shape.num_heads);
  return LaunchHeads<T, 128>(context, params, shape.num_heads);
}

}  // namespace

bool LaunchPrefillSm90(const LaunchContext& context, const AttentionShape& shape,
                       const PrefillParams& params) {
  constexpr int kSharedOfSm90 = 227 << 10;
  if (context.max_shared_bytes < kSharedOfSm90 || shape.block_size % 16 != 0 ||
      (shape.head_dim != 64 && shape.head_dim != 128)) {
    return false;
  }
  return shape.dtype == DType::kF16 ? LaunchDims<__half>(context, shape, params)
                                    : LaunchDims<__nv_bfloat16>(context, shape, params);
}

}  // namespace sluice
