// Flash prefill. A block takes the up to 64 rows of a tile and kHeads query heads of one KV head;
// each of its four warps 16 rows of each head, so that a fragment of K or V read from shared memory
// serves kHeads products. Tiles of keys come through shared memory, with kBuffers = 2 a whole tile
// ahead, with 1 (more blocks on an SM) as soon as the tile before has been used; scores, softmax
// and output stay in registers.
#include "kernels/cuda/attention_prefill.cuh"

namespace sluice {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;
constexpr int kRows = kPrefillTileRows;
static_assert(kRows == 16 * kWarps);

template <int kHeadDim>
struct Layout {
  static constexpr int kKeys = kHeadDim > 128 ? 32 : 64;  // Of a tile
  // 16 bytes behind every row make the eight rows of a matrix fall into different banks.
  static constexpr int kStride = kHeadDim * 2 + 16;
  static constexpr int kQueryBytes = kRows * kStride;  // Of a head
  static constexpr int kTileBytes = kKeys * kStride;   // Of K, and of V
  static constexpr int Shared(int heads, int buffers) {
    return heads * kQueryBytes + 2 * buffers * kTileBytes;
  }
};

// Where the keys of one sequence and KV head lie.
template <typename T, int kHeadDim>
struct KeySource {
  const int32_t* table;
  int length, kv_head, num_kv_heads, block_size;

  // The cache row of key first + 16 * (lane % 4), for Fetch from `first`.
  __device__ __forceinline__ uint32_t Locate(int first) const {
    return KvRow(table, min(first + threadIdx.x % 4 * 16, length - 1), kv_head, num_kv_heads,
                 block_size);
  }

  // Starts the copies of `cache`'s rows of keys [first, first + kKeys) to `shared`; zeros behind
  // the last key.
  __device__ __forceinline__ void Fetch(const T* cache, int first, uint32_t located,
                                        uint32_t shared) const {
    constexpr int kChunks = kHeadDim / 8;
    constexpr int kCopies = Layout<kHeadDim>::kKeys * kChunks;
    static_assert(kCopies % kThreads == 0);
    const bool whole = block_size % 16 == 0;  // 16 keys lie next to each other
#pragma unroll
    for (int i = 0; i < kCopies / kThreads; ++i) {
      const int row = (threadIdx.x + i * kThreads) / kChunks;
      const int column = (threadIdx.x + i * kThreads) % kChunks;
      uint32_t from = __shfl_sync(0xffffffffu, located, row / 16) + row % 16;
      if (!whole) {
        from = KvRow(table, min(first + row, length - 1), kv_head, num_kv_heads, block_size);
      }
      CopyAsync16(shared + row * Layout<kHeadDim>::kStride + column * 16,
                  cache + static_cast<size_t>(from) * kHeadDim + column * 8, first + row < length);
    }
  }
};

// Starts the copies of the tile's rows of q, all heads of the block; zeros behind the last row.
template <typename T, int kHeadDim, int kHeads>
__device__ __forceinline__ void FetchQueries(const PrefillParams& p, const PrefillTile& tile,
                                             int head, uint32_t q_shared) {
  using L = Layout<kHeadDim>;
  constexpr int kChunks = kHeadDim / 8;
  const T* q = static_cast<const T*>(p.qkv) + tile.row_begin * p.qkv_stride +
               static_cast<int64_t>(head) * kHeadDim;
#pragma unroll
  for (int i = 0; i < kHeads * kRows * kChunks / kThreads; ++i) {
    const int chunk = threadIdx.x + i * kThreads;
    const int row = chunk / (kHeads * kChunks);
    const int column = chunk % (kHeads * kChunks);
    CopyAsync16(
        q_shared + column / kChunks * L::kQueryBytes + row * L::kStride + column % kChunks * 16,
        q + min(row, tile.num_rows - 1) * p.qkv_stride + column * 8, row < tile.num_rows);
  }
}

// s += q times K of a tile; `q` and `k` are where the lane's row of a matrix lies in the first.
template <typename T, int kHeadDim, int kHeads, int kKeyTiles>
__device__ __forceinline__ void Score(uint32_t q, uint32_t k, float (&s)[kHeads][kKeyTiles][4]) {
  using L = Layout<kHeadDim>;
#pragma unroll
  for (int j = 0; j < kHeadDim / 16; ++j) {
    uint32_t a[kHeads][4];
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      LoadMatrices(a[h], q + h * L::kQueryBytes + 32 * j);
    }
#pragma unroll
    for (int n = 0; n < kKeyTiles; n += 2) {
      uint32_t b[4];
      LoadMatrices(b, k + n * 8 * L::kStride + 32 * j);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        Mma<T>(s[h][n], a[h], b[0], b[1]);
        Mma<T>(s[h][n + 1], a[h], b[2], b[3]);
      }
    }
  }
}

// Adds weights (the scores of a tile after the softmax) times V of the tile.
template <typename T, int kHeadDim, int kHeads, int kKeyTiles>
__device__ __forceinline__ void AddValues(const float (&s)[kHeads][kKeyTiles][4], uint32_t v,
                                          RowState<T, kHeadDim> (&rows)[kHeads]) {
  using L = Layout<kHeadDim>;
#pragma unroll
  for (int n = 0; n < kKeyTiles; n += 2) {
    uint32_t a[kHeads][4];
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      a[h][0] = Numeric<T>::FromFloats(s[h][n][0], s[h][n][1]);
      a[h][1] = Numeric<T>::FromFloats(s[h][n][2], s[h][n][3]);
      a[h][2] = Numeric<T>::FromFloats(s[h][n + 1][0], s[h][n + 1][1]);
      a[h][3] = Numeric<T>::FromFloats(s[h][n + 1][2], s[h][n + 1][3]);
    }
#pragma unroll
    for (int j = 0; j < kHeadDim / 16; ++j) {
      uint32_t b[4];
      LoadMatricesTransposed(b, v + n * 8 * L::kStride + 32 * j);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        Mma<T>(rows[h].out[2 * j], a[h], b[0], b[1]);
        Mma<T>(rows[h].out[2 * j + 1], a[h], b[2], b[3]);
      }
    }
  }
}

template <typename T, int kHeadDim, int kHeads, int kBuffers>
__global__ void __launch_bounds__(kThreads) PrefillKernel(const PrefillParams p) {
  using L = Layout<kHeadDim>;
  constexpr int kKeyTiles = L::kKeys / 8;
  extern __shared__ __align__(128) uint8_t shared[];
  LetNextStart();
  WaitForPrevious();

  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  // Late rows see the most keys: they start first.
  const PrefillTile tile = p.step.prefill_tiles[gridDim.y - 1 - blockIdx.y];
  const int head = blockIdx.x * kHeads;
  const int length = tile.start_pos + tile.num_rows;
  const KeySource<T, kHeadDim> keys = {
      p.step.block_tables + tile.sequence * p.step.block_table_stride, length, head / p.group,
      p.num_kv_heads, p.block_size};
  const T* k = static_cast<const T*>(p.k);
  const T* v = static_cast<const T*>(p.v);
  const uint32_t q_shared = SharedAddress(shared);
  const uint32_t k_shared = q_shared + kHeads * L::kQueryBytes;
  const uint32_t v_shared = k_shared + kBuffers * L::kTileBytes;

  FetchQueries<T, kHeadDim, kHeads>(p, tile, head, q_shared);
  uint32_t located = keys.Locate(0);
  keys.Fetch(k, 0, located, k_shared);
  CommitCopies();
  if (kBuffers == 2) {
    keys.Fetch(v, 0, located, v_shared);
    CommitCopies();
  }

  const uint32_t q_fragment = q_shared + (16 * warp + lane % 16) * L::kStride + lane / 16 * 16;
  const uint32_t k_fragment = (lane % 8 + lane / 16 * 8) * L::kStride + lane / 8 % 2 * 16;
  const uint32_t v_fragment = (lane % 16) * L::kStride + lane / 16 * 16;
  const int warp_position = tile.start_pos + 16 * warp;
  RowState<T, kHeadDim> rows[kHeads];
  const int num_tiles = (length + L::kKeys - 1) / L::kKeys;
  for (int t = 0; t < num_tiles; ++t) {
    const int buffer = t % kBuffers * L::kTileBytes;
    const int next_buffer = (t + 1) % kBuffers * L::kTileBytes;
    const uint32_t k_tile = k_shared + buffer;
    const uint32_t v_tile = v_shared + buffer;
    const int next = (t + 1) * L::kKeys;
    const bool more = t + 1 < num_tiles;
    const auto fetch_next_k = [&] {
      if (more) {
        located = keys.Locate(next);
        keys.Fetch(k, next, located, k_shared + next_buffer);
      }
      CommitCopies();
    };
    WaitForCopies<kBuffers - 1>();
    __syncthreads();  // K of this tile is there, and everyone is done with the tile before
    if (kBuffers == 2) {
      fetch_next_k();
    } else {
      keys.Fetch(v, t * L::kKeys, located, v_tile);
      CommitCopies();
    }

    float s[kHeads][kKeyTiles][4] = {};
    Score<T, kHeadDim, kHeads>(q_fragment, k_tile + k_fragment, s);
    if (kBuffers == 1) {
      __syncthreads();  // Everyone is done with K
      fetch_next_k();
    }
    const bool mask = (t + 1) * L::kKeys - 1 > warp_position;
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      if (mask) MaskCausal(s[h], t * L::kKeys + 2 * (lane % 4) - warp_position - lane / 4);
      rows[h].Update(s[h], p.scale);
    }

    WaitForCopies<1>();
    __syncthreads();  // V of this tile
    if (kBuffers == 2) {
      if (more) keys.Fetch(v, next, located, v_shared + next_buffer);
      CommitCopies();
    }
    AddValues<T, kHeadDim, kHeads>(s, v_tile + v_fragment, rows);
  }

#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    T* out = static_cast<T*>(p.out) + (tile.row_begin + 16 * warp) * p.out_stride +
             static_cast<int64_t>(head + h) * kHeadDim;
    StoreRows(rows[h], tile.num_rows - 16 * warp, out, p.out_stride);
  }
}

template <typename T, int kHeadDim, int kHeads, int kBuffers>
void LaunchPrefill(const LaunchContext& context, const PrefillParams& params, int num_heads) {
  constexpr int kShared = Layout<kHeadDim>::Shared(kHeads, kBuffers);
  auto* kernel = &PrefillKernel<T, kHeadDim, kHeads, kBuffers>;
  AllowShared(kernel, kShared);
  Launch(context, kernel, dim3(num_heads / kHeads, params.step.num_prefill_tiles), dim3(kThreads),
         kShared, params);
}

}  // namespace

void PrefillAttention(const LaunchContext& context, const DeviceStep& step,
                      const AttentionShape& shape, const void* qkv, int64_t qkv_stride,
                      const KvLayer& kv, void* out, int64_t out_stride) {
  if (step.num_prefill_tiles == 0) return;
  PrefillParams params = {};
  params.step = step;
  params.qkv = qkv;
  params.k = kv.k;
  params.v = kv.v;
  params.out = out;
  params.qkv_stride = qkv_stride;
  params.out_stride = out_stride;
  params.num_kv_heads = shape.num_kv_heads;
  params.block_size = shape.block_size;
  params.group = shape.num_heads / shape.num_kv_heads;
  params.scale = shape.scale * kLog2E;
  if (LaunchPrefillSm90(context, shape, params)) return;
  // Pairs of heads where they leave two blocks for every SM; the bits are the same.
  const int64_t pairs = static_cast<int64_t>(step.num_prefill_tiles) * shape.num_heads / 2;
  ForShape(shape, [&]<typename T, int kHeadDim>() {
    if constexpr (kHeadDim <= 128) {
      if (params.group % 2 == 0 && pairs >= 2 * context.num_sms &&
          Layout<kHeadDim>::Shared(2, 2) <= context.max_shared_bytes) {
        return LaunchPrefill<T, kHeadDim, 2, 2>(context, params, shape.num_heads);
      }
    }
    LaunchPrefill<T, kHeadDim, 1, 1>(context, params, shape.num_heads);
  });
}

}  // namespace sluice
