// The inner half of flash decode (attention_decode.cu): which tiles of keys a warp of an item has,
// how they come into shared memory, and a warp's running softmax over them. Included by .cu files
// only.
#pragma once

#include "kernels/cuda/attention_device.cuh"

namespace sluice {

inline constexpr int kTileKeys = 16;
inline constexpr int kHeads = 8;  // Query heads of a block
inline constexpr int kMaxSplits = 64;
inline constexpr int kMinTiles = 4;  // Fewer tiles are not worth a part

struct DecodeParams {
  DeviceStep step;
  const void* qkv;
  void* k;
  void* v;
  void* out;
  int64_t qkv_stride, out_stride;
  float* partials;   // [row, unit, split] of [kHeads, head_dim], then [kHeads] max, sum
  int32_t* arrived;  // [row, unit]: parts that are ready
  int32_t* queue;    // Items handed out beyond the first two of each block; blocks that ended
  int num_kv_heads, block_size, group;
  int chunks;   // Units of one KV head: ceil(group / kHeads)
  int splits;   // Parts of a row at most
  int items;    // Rows x units x splits
  float scale;  // Times log2(e)
  NewKeys new_keys;

  __device__ int units() const { return num_kv_heads * chunks; }
};

template <int kHeadDim>
struct TileShape {
  // 16 bytes behind every row make the eight rows of a matrix fall into different banks.
  static constexpr int kStride = kHeadDim * 2 + 16;
  static constexpr int kBytes = kTileKeys * kStride;
  static constexpr int kStageBytes = 2 * kBytes;  // K, V
};

struct TileSource {
  const int32_t* table;
  uint32_t row;  // Of the cache
  int key;       // The first
  int position;  // Keys from here on are not in the cache
  int kv_head;
};

// An item, and which of its tiles are the warp's.
template <int kWarps>
struct Work {
  int row = 0;
  int position = -1;  // Of the row: the number of keys that are in the cache
  int kv_head = 0;
  int first_head = 0;  // Within the KV head's
  int splits = 0;      // Parts of the row
  int split = 0;       // Nothing to do if it is none of these
  int tiles = 0;       // Of the row
  int first = 0;       // The warp's i-th tile is first + i * kWarps
  int count = 0;       // Tiles of the warp
  const int32_t* table = nullptr;
  uint32_t cache_rows = 0;  // Lane j: cache row at which the warp's tile 32 * n + j begins

  __device__ Work(const DecodeParams& p, int item) {
    if (item >= p.items) return;
    const int unit = item / p.splits;
    row = p.step.decode_rows[unit / p.units()];
    position = p.step.positions[row];
    table = p.step.block_tables + p.step.sequences[row] * p.step.block_table_stride;
    kv_head = unit % p.units() / p.chunks;
    first_head = unit % p.chunks * kHeads;
    split = item % p.splits;
    if (position < 0) return;
    tiles = position / kTileKeys + 1;
    splits = min(p.splits, (tiles + kMinTiles - 1) / kMinTiles);
    if (split >= splits) return;
    first = tiles * split / splits + threadIdx.x / 32;
    count = max(0, (tiles * (split + 1) / splits - first + kWarps - 1) / kWarps);
    Locate(p, 0);
  }

  // Looks up the tiles i to i + 31.
  __device__ __forceinline__ void Locate(const DecodeParams& p, int i) {
    i += threadIdx.x % 32;
    if (i >= count) return;
    cache_rows =
        KvRow(table, (first + i * kWarps) * kTileKeys, kv_head, p.num_kv_heads, p.block_size);
  }

  // Where tile i lies; i goes up in steps of one.
  __device__ __forceinline__ TileSource Tile(const DecodeParams& p, int i) {
    if (i % 32 == 0 && i > 0) Locate(p, i);
    const uint32_t row = __shfl_sync(0xffffffffu, cache_rows, i % 32);
    return {table, row, (first + i * kWarps) * kTileKeys, position, kv_head};
  }
};

// Starts the copies of a tile to `shared`.
template <typename T, int kHeadDim>
__device__ __forceinline__ void Fetch(const DecodeParams& p, const TileSource& source,
                                      uint32_t shared) {
  constexpr int kChunks = kHeadDim / 8;  // Of 16 bytes, in a row
  const int lane = threadIdx.x % 32;
  const bool whole = p.block_size % kTileKeys == 0;
#pragma unroll 8
  for (int j = 0; j < kChunks / 2; ++j) {
    const int in_tile = (lane + 32 * j) / kChunks;
    const int column = (lane + 32 * j) % kChunks;
    const int key = source.key + in_tile;
    uint32_t from = source.row + in_tile;
    if (!whole) {
      from = KvRow(source.table, min(key, source.position), source.kv_head, p.num_kv_heads,
                   p.block_size);
    }
    const size_t offset = static_cast<size_t>(from) * kHeadDim + column * 8;
    const uint32_t to = shared + in_tile * TileShape<kHeadDim>::kStride + column * 16;
    CopyAsync16(to, static_cast<const T*>(p.k) + offset, key < source.position);
    CopyAsync16(to + TileShape<kHeadDim>::kBytes, static_cast<const T*>(p.v) + offset,
                key < source.position);
  }
}

// Running softmax of a warp. Lane l holds the maximum and its own share of the sum of head l / 4,
// and of O^T rows l / 4 + 8 n and columns 2 * (l % 4) + {0, 1}.
template <typename T, int kHeadDim>
struct WarpState {
  float max = kLowest;
  float sum = 0.0f;
  float out[kHeadDim / 16][4];

  __device__ WarpState() {
#pragma unroll
    for (auto& tile : out) tile[0] = tile[1] = tile[2] = tile[3] = 0.0f;
  }

  // Adds 16 keys from `key` whose tile lies at `shared`; `fragment` is the lane's row of a
  // ldmatrix in a tile.
  __device__ __forceinline__ void Add(const uint32_t (&q)[kHeadDim / 16][2], uint32_t shared,
                                      uint32_t fragment, int key, int length, float scale) {
    const int lane = threadIdx.x % 32;
    float s[2][4] = {};
#pragma unroll
    for (int j = 0; j < kHeadDim / 16; ++j) {
      uint32_t b[4];
      LoadMatrices(b, shared + fragment + 32 * j);
      const uint32_t a[4] = {q[j][0], 0, q[j][1], 0};
      Mma<T>(s[0], a, b[0], b[1]);
      Mma<T>(s[1], a, b[2], b[3]);
    }
    float x[4] = {s[0][0] * scale, s[0][1] * scale, s[1][0] * scale, s[1][1] * scale};
    if (key + kTileKeys > length) {
      const int own = key + 2 * (lane % 4);
      if (own >= length) x[0] = kLowest;
      if (own + 1 >= length) x[1] = kLowest;
      if (own + 8 >= length) x[2] = kLowest;
      if (own + 9 >= length) x[3] = kLowest;
    }
    float highest = fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3]));
    highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 1));
    highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2));
    if (__any_sync(0xffffffffu, highest > max)) Rescale(fmaxf(highest, max));
    float p[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) p[i] = Exp2(x[i] - max);
    sum += (p[0] + p[1]) + (p[2] + p[3]);
    const uint32_t p0 = Numeric<T>::FromFloats(p[0], p[1]);
    const uint32_t p1 = Numeric<T>::FromFloats(p[2], p[3]);
#pragma unroll
    for (int j = 0; j < kHeadDim / 16; ++j) {
      uint32_t a[4];
      LoadMatricesTransposed(a, shared + TileShape<kHeadDim>::kBytes + fragment + 32 * j);
      Mma<T>(out[j], a, p0, p1);
    }
  }

  __device__ __forceinline__ void Rescale(float highest) {
    const int lane = threadIdx.x % 32;
    const float factor = Exp2(max - highest);
    max = highest;
    sum *= factor;
    const float even = __shfl_sync(0xffffffffu, factor, lane % 4 * 8);
    const float odd = __shfl_sync(0xffffffffu, factor, lane % 4 * 8 + 4);
#pragma unroll
    for (auto& tile : out) {
      tile[0] *= even;
      tile[1] *= odd;
      tile[2] *= even;
      tile[3] *= odd;
    }
  }
};

}  // namespace sluice
