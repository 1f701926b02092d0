// Flash prefill. A block takes the up to 64 rows of a tile and kHeads query heads of one KV head; each
// of its four warps 16 rows of each head, so that a fragment of K or V read from shared memory
// serves kHeads products. Tiles of keys come through a ring of two in shared memory; scores,
// softmax and output stay in registers.
#include "kernels/cuda/attention_device.h"

namespace sluice {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;
constexpr int kRows = kPrefillTileRows;
constexpr float kLowest = -1e30f;
static_assert(kRows == 16 * kWarps);

struct PrefillParams {
  DeviceStep step;
  const void* qkv;
  const void* k;
  const void* v;
  void* out;
  int64_t qkv_stride, out_stride;
  int num_kv_heads, block_size, group;
  float scale;  // Times log2(e)
};

template <int kHeadDim>
struct Layout {
  static constexpr int kKeys = kHeadDim > 128 ? 32 : 64;  // Of a tile
  // 16 bytes behind every row make the eight rows of a matrix fall into different banks.
  static constexpr int kStride = kHeadDim * 2 + 16;
  static constexpr int kQueryBytes = kRows * kStride;  // Of a head
  static constexpr int kTileBytes = kKeys * kStride;   // Of K, and of V
  static constexpr int Shared(int heads) { return heads * kQueryBytes + 4 * kTileBytes; }
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

// Running softmax of one warp and head: rows lane / 4 and lane / 4 + 8.
template <typename T, int kHeadDim>
struct RowState {
  float max[2] = {kLowest, kLowest};
  float sum[2] = {0.0f, 0.0f};  // The lane's own share
  float out[kHeadDim / 8][4];

  __device__ RowState() {
#pragma unroll
    for (auto& tile : out) tile[0] = tile[1] = tile[2] = tile[3] = 0.0f;
  }

  // Turns the scores of a tile of keys into weights, relative to the new maximum.
  template <int kTiles>
  __device__ __forceinline__ void Update(float (&s)[kTiles][4], float scale) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float highest = s[0][2 * r];
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        highest = fmaxf(highest, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
      }
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 1));
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2));
      highest = fmaxf(highest * scale, max[r]);
      if (__any_sync(0xffffffffu, highest > max[r])) {
        const float factor = Exp2(max[r] - highest);
        max[r] = highest;
        sum[r] *= factor;
#pragma unroll
        for (auto& tile : out) {
          tile[2 * r] *= factor;
          tile[2 * r + 1] *= factor;
        }
      }
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        s[n][2 * r] = Exp2(fmaf(s[n][2 * r], scale, -max[r]));
        s[n][2 * r + 1] = Exp2(fmaf(s[n][2 * r + 1], scale, -max[r]));
        sum[r] += s[n][2 * r] + s[n][2 * r + 1];
      }
    }
  }
};

// Scores of keys behind the row's own position become lowest. `above`: keys minus position of the
// lane's first element.
template <int kTiles>
__device__ __forceinline__ void MaskCausal(float (&s)[kTiles][4], int above) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (above + 8 * n + i % 2 - i / 2 * 8 > 0) s[n][i] = kLowest;
    }
  }
}

template <typename T, int kHeadDim, int kHeads>
__global__ void __launch_bounds__(kThreads) PrefillKernel(const PrefillParams p) {
  using L = Layout<kHeadDim>;
  constexpr int kKeyTiles = L::kKeys / 8;
  constexpr int kChunks = kHeadDim / 8;
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
  const T* q = static_cast<const T*>(p.qkv) + tile.row_begin * p.qkv_stride +
               static_cast<int64_t>(head) * kHeadDim;
  const uint32_t q_shared = SharedAddress(shared);
  const uint32_t k_shared = q_shared + kHeads * L::kQueryBytes;
  const uint32_t v_shared = k_shared + 2 * L::kTileBytes;

#pragma unroll
  for (int i = 0; i < kHeads * kRows * kChunks / kThreads; ++i) {
    const int chunk = threadIdx.x + i * kThreads;
    const int row = chunk / (kHeads * kChunks);
    const int column = chunk % (kHeads * kChunks);
    CopyAsync16(
        q_shared + column / kChunks * L::kQueryBytes + row * L::kStride + column % kChunks * 16,
        q + min(row, tile.num_rows - 1) * p.qkv_stride + column * 8, row < tile.num_rows);
  }
  uint32_t located = keys.Locate(0);
  keys.Fetch(k, 0, located, k_shared);
  CommitCopies();
  keys.Fetch(v, 0, located, v_shared);
  CommitCopies();

  const uint32_t q_fragment = q_shared + (16 * warp + lane % 16) * L::kStride + lane / 16 * 16;
  const uint32_t k_fragment = (lane % 8 + lane / 16 * 8) * L::kStride + lane / 8 % 2 * 16;
  const uint32_t v_fragment = (lane % 16) * L::kStride + lane / 16 * 16;
  const int warp_position = tile.start_pos + 16 * warp;
  RowState<T, kHeadDim> rows[kHeads];
  const int num_tiles = (length + L::kKeys - 1) / L::kKeys;
  for (int t = 0; t < num_tiles; ++t) {
    const uint32_t k_tile = k_shared + t % 2 * L::kTileBytes;
    const uint32_t v_tile = v_shared + t % 2 * L::kTileBytes;
    WaitForCopies<1>();
    __syncthreads();  // K of this tile is there, and everyone is done with the tile before
    const bool more = t + 1 < num_tiles;
    const int next = (t + 1) * L::kKeys;
    if (more) {
      located = keys.Locate(next);
      keys.Fetch(k, next, located, k_shared + (t + 1) % 2 * L::kTileBytes);
    }
    CommitCopies();

    float s[kHeads][kKeyTiles][4] = {};
#pragma unroll
    for (int j = 0; j < kHeadDim / 16; ++j) {
      uint32_t a[kHeads][4];
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        LoadMatrices(a[h], q_fragment + h * L::kQueryBytes + 32 * j);
      }
#pragma unroll
      for (int n = 0; n < kKeyTiles; n += 2) {
        uint32_t b[4];
        LoadMatrices(b, k_tile + k_fragment + n * 8 * L::kStride + 32 * j);
#pragma unroll
        for (int h = 0; h < kHeads; ++h) {
          Mma<T>(s[h][n], a[h][0], a[h][1], a[h][2], a[h][3], b[0], b[1]);
          Mma<T>(s[h][n + 1], a[h][0], a[h][1], a[h][2], a[h][3], b[2], b[3]);
        }
      }
    }
    const bool mask = (t + 1) * L::kKeys - 1 > warp_position;
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      if (mask) MaskCausal(s[h], t * L::kKeys + 2 * (lane % 4) - warp_position - lane / 4);
      rows[h].Update(s[h], p.scale);
    }

    WaitForCopies<1>();
    __syncthreads();  // V of this tile
    if (more) keys.Fetch(v, next, located, v_shared + (t + 1) % 2 * L::kTileBytes);
    CommitCopies();
#pragma unroll
    for (int n = 0; n < kKeyTiles; n += 2) {
      uint32_t a[kHeads][4];
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        a[h][0] = Pack<T>(s[h][n][0], s[h][n][1]);
        a[h][1] = Pack<T>(s[h][n][2], s[h][n][3]);
        a[h][2] = Pack<T>(s[h][n + 1][0], s[h][n + 1][1]);
        a[h][3] = Pack<T>(s[h][n + 1][2], s[h][n + 1][3]);
      }
#pragma unroll
      for (int j = 0; j < kHeadDim / 16; ++j) {
        uint32_t b[4];
        LoadMatricesTransposed(b, v_tile + v_fragment + n * 8 * L::kStride + 32 * j);
#pragma unroll
        for (int h = 0; h < kHeads; ++h) {
          Mma<T>(rows[h].out[2 * j], a[h][0], a[h][1], a[h][2], a[h][3], b[0], b[1]);
          Mma<T>(rows[h].out[2 * j + 1], a[h][0], a[h][1], a[h][2], a[h][3], b[2], b[3]);
        }
      }
    }
  }

#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = rows[h].sum[r];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      const float inverse = 1.0f / sum;
      const int row = 16 * warp + lane / 4 + 8 * r;
      if (row >= tile.num_rows) continue;
      auto* out = reinterpret_cast<uint32_t*>(
          static_cast<T*>(p.out) + (tile.row_begin + row) * p.out_stride +
          static_cast<int64_t>(head + h) * kHeadDim + 2 * (lane % 4));
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        out[4 * n] = Pack<T>(rows[h].out[n][2 * r] * inverse, rows[h].out[n][2 * r + 1] * inverse);
      }
    }
  }
}

template <typename T, int kHeadDim, int kHeads>
void LaunchPrefill(const LaunchContext& context, const PrefillParams& params, int num_heads) {
  constexpr int kShared = Layout<kHeadDim>::Shared(kHeads);
  auto* kernel = &PrefillKernel<T, kHeadDim, kHeads>;
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
  ForShape(shape, [&]<typename T, int kHeadDim>() {
    if constexpr (kHeadDim <= 128) {
      // Pairs of heads, where they leave two blocks for every SM; the bits are the same.
      const int64_t pairs = static_cast<int64_t>(step.num_prefill_tiles) * shape.num_heads / 2;
      if (params.group % 2 == 0 && pairs >= 2 * context.num_sms &&
          Layout<kHeadDim>::Shared(2) <= context.max_shared_bytes) {
        return LaunchPrefill<T, kHeadDim, 2>(context, params, shape.num_heads);
      }
    }
    LaunchPrefill<T, kHeadDim, 1>(context, params, shape.num_heads);
  });
}

}  // namespace sluice
