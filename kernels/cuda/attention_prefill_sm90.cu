// Flash prefill with wgmma, for sm_90 and head_dim 64 and 128. A block takes the up to 64 rows of a
// tile; each of its kHeads warpgroups does one query head of the KV head. Q, K and V lie in shared
// memory in panels of 64 columns, rows of 128 bytes, 16-byte chunks permuted as the tensor cores
// expect it (128-byte swizzle). The next tile of keys is on its way while one is used.
#include <algorithm>

#include "kernels/cuda/attention_prefill.cuh"
#include "kernels/cuda/wgmma.cuh"

namespace sluice {
namespace {

constexpr int kRows = kPrefillTileRows;
constexpr int kGroupThreads = 128;  // A warpgroup
constexpr int kKeysOfTile = 64;
static_assert(kRows == 64);

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

// Starts the copies of keys [first, first + kKeys), K to `shared`, V behind it; zeros behind the
// last.
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

// Starts the copies of the tile's rows of q, all heads of the block; zeros behind the last row.
template <typename T, int kHeadDim, int kHeads, int kKeys>
__device__ __forceinline__ void FetchQueries(const PrefillParams& p, const PrefillTile& tile,
                                             int first_head, uint32_t shared) {
  using L = Sm90Layout<kHeadDim, kHeads, kKeys>;
  constexpr int kChunks = kHeadDim / 8;
  constexpr int kThreads = kHeads * kGroupThreads;
  const T* q = static_cast<const T*>(p.qkv) + tile.row_begin * p.qkv_stride +
               static_cast<int64_t>(first_head) * kHeadDim;
#pragma unroll
  for (int i = 0; i < kHeads * kRows * kChunks / kThreads; ++i) {
    const int chunk = threadIdx.x + i * kThreads;
    const int row = chunk / (kHeads * kChunks);
    const int column = chunk % (kHeads * kChunks);
    CopyAsync16(shared + column / kChunks * L::kQueryBytes + L::Place(kRows, row, column % kChunks),
                q + min(row, tile.num_rows - 1) * p.qkv_stride + column * 8, row < tile.num_rows);
  }
}

// s = the warpgroup's q times K of a tile.
template <typename T, int kHeadDim, int kKeys>
__device__ __forceinline__ void Score(uint32_t q, uint32_t k, float (&s)[kKeys / 8][4]) {
  Pin(s);
  BeginProducts();
#pragma unroll
  for (int j = 0; j < kHeadDim / 16; ++j) {
    const int in_panel = j % 4 * 32;
    MultiplyShared<T>(s, Descriptor(q + j / 4 * (kRows * 128) + in_panel, 16),
                      Descriptor(k + j / 4 * (kKeys * 128) + in_panel, 16), j > 0);
  }
  EndProducts();
  Pin(s);
}

// out += weights (the scores of a tile after the softmax) times V of the tile.
template <typename T, int kHeadDim, int kKeys>
__device__ __forceinline__ void AddValues(const float (&s)[kKeys / 8][4], uint32_t v,
                                          float (&out)[kHeadDim / 8][4]) {
  uint32_t weights[kKeys / 16][4];
#pragma unroll
  for (int n = 0; n < kKeys / 16; ++n) {
    weights[n][0] = Numeric<T>::FromFloats(s[2 * n][0], s[2 * n][1]);
    weights[n][1] = Numeric<T>::FromFloats(s[2 * n][2], s[2 * n][3]);
    weights[n][2] = Numeric<T>::FromFloats(s[2 * n + 1][0], s[2 * n + 1][1]);
    weights[n][3] = Numeric<T>::FromFloats(s[2 * n + 1][2], s[2 * n + 1][3]);
  }
  Pin(out);
  BeginProducts();
#pragma unroll
  for (int n = 0; n < kKeys / 16; ++n) {
    MultiplyRegisters<T>(out, weights[n], Descriptor(v + n * 2048, kKeys * 128));
  }
  EndProducts();
  Pin(out);
#pragma unroll
  for (auto& four : weights) {
    asm volatile("" : "+r"(four[0]), "+r"(four[1]), "+r"(four[2]), "+r"(four[3])::"memory");
  }
}

template <typename T, int kHeadDim, int kHeads, int kKeys>
__global__ void __launch_bounds__(kHeads* kGroupThreads, 2) Sm90Kernel(const PrefillParams p) {
  using L = Sm90Layout<kHeadDim, kHeads, kKeys>;
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
  const uint32_t q_shared = (SharedAddress(shared) + 1023) / 1024 * 1024;
  const uint32_t kv_shared = q_shared + kHeads * L::kQueryBytes;
  FetchQueries<T, kHeadDim, kHeads, kKeys>(p, tile, first_head, q_shared);
  FetchKeys<T, kHeadDim, kHeads, kKeys>(p, table, kv_head, 0, length, kv_shared);

  const int warp_position = tile.start_pos + 16 * warp;
  RowState<T, kHeadDim> rows;
  const int num_tiles = (length + kKeys - 1) / kKeys;
  for (int t = 0; t < num_tiles; ++t) {
    const uint32_t k_tile = kv_shared + t % 2 * (2 * L::kTileBytes);
    WaitForCopies<0>();
    PublishToTensorCores();
    __syncthreads();  // The tile is there, and everyone is done with the one before
    if (t + 1 < num_tiles) {
      FetchKeys<T, kHeadDim, kHeads, kKeys>(p, table, kv_head, (t + 1) * kKeys, length,
                                            kv_shared + (t + 1) % 2 * (2 * L::kTileBytes));
    }
    float s[kKeys / 8][4];
    Score<T, kHeadDim, kKeys>(q_shared + group * L::kQueryBytes, k_tile, s);
    if ((t + 1) * kKeys - 1 > warp_position) {
      MaskCausal(s, t * kKeys + 2 * (lane % 4) - warp_position - lane / 4);
    }
    rows.Update(s, p.scale);
    AddValues<T, kHeadDim, kKeys>(s, k_tile + L::kTileBytes, rows.out);
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
    return Launch90<T, kHeadDim, 2, kKeysOfTile>(context, params, num_heads);
  }
  return Launch90<T, kHeadDim, 1, kKeysOfTile>(context, params, num_heads);
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
