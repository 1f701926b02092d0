// Flash decode. An item is one part of the keys of one row and one KV head, with up to eight of its
// query heads. Each warp of a block owns every kWarps-th tile of 16 keys and a ring of tiles in
// shared memory that it fills itself, so that nothing waits for another warp before the item's end.
//
//   S [8 heads, 16 keys] = Q K^T:  mma with Q as the 16-row operand, of which 8 rows exist
//   O^T [head_dim, 8 heads] += V^T P^T:  V^T as the 16-row operand, so no row is wasted; the
//   accumulator of S is, packed, already the fragment that P^T has to be
//
// Blocks stay and take item after item; while one ends, the tiles of the next are on their way. The
// tiles come from the cache but for the newest key, which is taken from qkv; so the cache is read
// before the kernel that makes qkv has ended.
//
// The parts of a row merge through scratch: the last block of a row to finish (a counter tells)
// adds them up in order of the keys. Which block takes an item changes no bit.
#include <algorithm>

#include "kernels/cuda/attention_device.h"

namespace sluice {
namespace {

constexpr int kTileKeys = 16;
constexpr int kHeads = 8;  // Query heads of a block
constexpr int kMaxSplits = 64;
constexpr int kBlocksPerSm = 2;  // Parts are made for so many
constexpr int kMinTiles = 4;     // Fewer tiles are not worth a part
constexpr float kLowest = -1e30f;

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
      Mma<T>(s[0], q[j][0], 0, q[j][1], 0, b[0], b[1]);
      Mma<T>(s[1], q[j][0], 0, q[j][1], 0, b[2], b[3]);
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
    const uint32_t p0 = Pack<T>(p[0], p[1]);
    const uint32_t p1 = Pack<T>(p[2], p[3]);
#pragma unroll
    for (int j = 0; j < kHeadDim / 16; ++j) {
      uint32_t a[4];
      LoadMatricesTransposed(a, shared + TileShape<kHeadDim>::kBytes + fragment + 32 * j);
      Mma<T>(out[j], a[0], a[1], a[2], a[3], p0, p1);
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

template <typename T>
struct alignas(8) Four {
  T values[4];
};

// Elements d to d + 3 of a head whose elements are at `head`, turned if they belong to the first
// 2 * half_dim; cos and sin are the row's.
template <typename T>
__device__ __forceinline__ Four<T> LoadTurned(const T* head, int d, const float* cos,
                                              const float* sin, int half_dim) {
  if (half_dim == 0) return *reinterpret_cast<const Four<T>*>(head + d);
  Four<T> out;
  if (half_dim % 4 == 0) {
    if (d >= 2 * half_dim) return *reinterpret_cast<const Four<T>*>(head + d);
    const int first = d < half_dim ? d : d - half_dim;
    const Four<T> a = *reinterpret_cast<const Four<T>*>(head + first);
    const Four<T> b = *reinterpret_cast<const Four<T>*>(head + first + half_dim);
    const float4 c = *reinterpret_cast<const float4*>(cos + first);
    const float4 s = *reinterpret_cast<const float4*>(sin + first);
    const float cosines[4] = {c.x, c.y, c.z, c.w};
    const float sines[4] = {s.x, s.y, s.z, s.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 turned = Turn(ToFloat(a.values[i]), ToFloat(b.values[i]), cosines[i], sines[i]);
      out.values[i] = FromFloat<T>(d < half_dim ? turned.x : turned.y);
    }
    return out;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int element = d + i;
    const int first = element % half_dim;
    out.values[i] = head[element];
    if (element >= 2 * half_dim) continue;
    const float2 turned =
        Turn(ToFloat(head[first]), ToFloat(head[first + half_dim]), cos[first], sin[first]);
    out.values[i] = FromFloat<T>(element < half_dim ? turned.x : turned.y);
  }
  return out;
}

// What the warps of a block share.
template <typename T, int kHeadDim, int kWarps>
struct BlockState {
  // The item's q, the newest k and the newest v. 16 bytes behind every row for the banks.
  alignas(16) T rows[kHeads + 2][kHeadDim + 8];
  float max[kWarps][kHeads];
  float sum[kWarps][kHeads];
  const float* outputs[kWarps];  // [kHeads, head_dim + 4], null from a warp without tiles
  float weights[kHeads][kMaxSplits];
  int next;  // Item after the next
  bool last;
};

// Brings q, and for the last part the newest k and v, to state->rows; writes the latter to the cache.
template <typename T, int kHeadDim, int kWarps>
__device__ __forceinline__ void LoadRows(const DecodeParams& p, const Work<kWarps>& work,
                                         BlockState<T, kHeadDim, kWarps>* state) {
  constexpr int kFours = kHeadDim / 4;
  const int heads = min(kHeads, p.group - work.first_head);
  const T* qkv = static_cast<const T*>(p.qkv) + work.row * p.qkv_stride;
  const int half_dim = p.new_keys == NewKeys::kTurnAndWrite ? p.step.half_dim : 0;
  const float* cos = p.step.cos + static_cast<int64_t>(work.row) * half_dim;
  const float* sin = p.step.sin + static_cast<int64_t>(work.row) * half_dim;
  const bool newest = work.split == work.splits - 1;
  const bool write = newest && p.new_keys != NewKeys::kReady && work.first_head == 0;
  for (int i = threadIdx.x; i < (heads + (newest ? 2 : 0)) * kFours; i += kWarps * 32) {
    const int which = i / kFours;
    const int d = i % kFours * 4;
    int head = work.kv_head * p.group + work.first_head + which;
    if (which >= heads) {
      head = p.num_kv_heads * (p.group + which - heads) + work.kv_head;
    }
    const Four<T> four = LoadTurned(qkv + static_cast<int64_t>(head) * kHeadDim, d, cos, sin,
                                    which <= heads ? half_dim : 0);
    const int to = which < heads ? which : kHeads + which - heads;
    *reinterpret_cast<Four<T>*>(&state->rows[to][d]) = four;
    if (which < heads || !write) continue;
    T* cache = static_cast<T*>(which == heads ? p.k : p.v);
    const size_t row = KvRow(work.table, work.position, work.kv_head, p.num_kv_heads, p.block_size);
    *reinterpret_cast<Four<T>*>(cache + row * kHeadDim + d) = four;
  }
}

// Lane l: elements 16 j + 2 (l % 4) + {0, 1} and those + 8 of head l / 4.
template <typename T, int kHeadDim>
__device__ __forceinline__ void LoadQuery(const T (*q)[kHeadDim + 8],
                                          uint32_t (&out)[kHeadDim / 16][2]) {
  const auto* pairs = reinterpret_cast<const uint32_t*>(q[threadIdx.x % 32 / 4]) + threadIdx.x % 4;
#pragma unroll
  for (int j = 0; j < kHeadDim / 16; ++j) {
    out[j][0] = pairs[8 * j];
    out[j][1] = pairs[8 * j + 4];
  }
}

// Floats of one part: see DecodeParams::partials.
__host__ __device__ constexpr int PartFloats(int head_dim) { return kHeads * (head_dim + 2); }

template <typename T>
__device__ __forceinline__ void StoreFour(T* out, float4 values) {
  *reinterpret_cast<uint2*>(out) = {Pack<T>(values.x, values.y), Pack<T>(values.z, values.w)};
}
__device__ __forceinline__ void AddScaled(float4* sum, float weight, float4 values) {
  sum->x += weight * values.x;
  sum->y += weight * values.y;
  sum->z += weight * values.z;
  sum->w += weight * values.w;
}

// weights[head][s]: what part s of a row counts for.
template <int kHeadDim>
__device__ __forceinline__ void WeighParts(const float* parts, int splits, int head,
                                           float* weights) {
  constexpr int kPart = PartFloats(kHeadDim);
  const float* first = parts + kHeads * kHeadDim + 2 * head;
  float max[kMaxSplits / 32], sum[kMaxSplits / 32];
  float highest = kLowest;
#pragma unroll
  for (int i = 0; i < kMaxSplits / 32; ++i) {
    const int s = threadIdx.x % 32 + 32 * i;
    float2 both = {kLowest, 0.0f};
    if (s < splits) both = __ldcg(reinterpret_cast<const float2*>(first + s * kPart));
    max[i] = both.x;
    sum[i] = both.y;
    highest = fmaxf(highest, both.x);
  }
#pragma unroll
  for (int i = 16; i > 0; i /= 2) {
    highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, i));
  }
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kMaxSplits / 32; ++i) {
    max[i] = Exp2(max[i] - highest);
    total += max[i] * sum[i];
  }
#pragma unroll
  for (int i = 16; i > 0; i /= 2) total += __shfl_xor_sync(0xffffffffu, total, i);
#pragma unroll
  for (int i = 0; i < kMaxSplits / 32; ++i) {
    weights[threadIdx.x % 32 + 32 * i] = max[i] / total;
  }
}

// Adds up the parts of a row; `parts` is the first.
template <typename T, int kHeadDim, int kThreads>
__device__ __forceinline__ void MergeParts(const float* parts, int splits, int heads,
                                           float (*weights)[kMaxSplits], T* out) {
  constexpr int kBatch = 8;  // Loads in flight
  constexpr int kPart = PartFloats(kHeadDim);
  const auto load = [&](int s, int e) {
    return __ldcg(reinterpret_cast<const float4*>(parts + s * kPart + 4 * e));
  };
  const int count = heads * kHeadDim / 4;
  float4 values[kBatch];
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
    if (i < splits && threadIdx.x < count) values[i] = load(i, threadIdx.x);
  }
  for (int head = threadIdx.x / 32; head < heads; head += kThreads / 32) {
    WeighParts<kHeadDim>(parts, splits, head, weights[head]);
  }
  __syncthreads();
  for (int e = threadIdx.x; e < count; e += kThreads) {
    const float* weight = weights[4 * e / kHeadDim];
    float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int first = 0; first < splits; first += kBatch) {
      if (e != threadIdx.x || first > 0) {
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          if (first + i < splits) values[i] = load(first + i, e);
        }
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (first + i < splits) AddScaled(&sum, weight[first + i], values[i]);
      }
    }
    StoreFour(out + 4 * e, sum);
  }
}

// Leaves the warp's result for CombineWarps, the output at `shared`.
template <typename T, int kHeadDim, int kWarps>
__device__ __forceinline__ void ShareResult(const WarpState<T, kHeadDim>& result, int heads,
                                            float* shared, BlockState<T, kHeadDim, kWarps>* state) {
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  float sum = result.sum;
  sum += __shfl_xor_sync(0xffffffffu, sum, 1);
  sum += __shfl_xor_sync(0xffffffffu, sum, 2);
  if (lane % 4 == 0) {
    state->max[warp][lane / 4] = result.max;
    state->sum[warp][lane / 4] = sum;
  }
  if (lane == 0) state->outputs[warp] = shared;
  if (shared == nullptr) return;
#pragma unroll
  for (int j = 0; j < kHeadDim / 16; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int head = 2 * (lane % 4) + i % 2;
      if (head < heads) {
        shared[head * (kHeadDim + 4) + 16 * j + lane / 4 + i / 2 * 8] = result.out[j][i];
      }
    }
  }
}

// Adds up the results of the warps: to `out` where the row is not cut, to `part` otherwise.
template <typename T, int kHeadDim, int kWarps>
__device__ __forceinline__ void CombineWarps(const BlockState<T, kHeadDim, kWarps>& state,
                                             int heads, T* out, float* part) {
  for (int e = threadIdx.x; e < heads * kHeadDim / 4; e += kWarps * 32) {
    const int head = 4 * e / kHeadDim;
    const int column = 4 * e % kHeadDim;
    float highest = state.max[0][head];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) highest = fmaxf(highest, state.max[w][head]);
    float4 value = {0.0f, 0.0f, 0.0f, 0.0f};
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      if (state.outputs[w] == nullptr) continue;
      const float weight = Exp2(state.max[w][head] - highest);
      const float* from = state.outputs[w] + head * (kHeadDim + 4) + column;
      AddScaled(&value, weight, *reinterpret_cast<const float4*>(from));
      total += weight * state.sum[w][head];
    }
    if (part == nullptr) {
      const float inverse = 1.0f / total;
      StoreFour(out + 4 * e,
                float4{value.x * inverse, value.y * inverse, value.z * inverse, value.w * inverse});
    } else {
      *reinterpret_cast<float4*>(part + 4 * e) = value;
      if (column == 0) {
        *reinterpret_cast<float2*>(part + kHeads * kHeadDim + 2 * head) = {highest, total};
      }
    }
  }
}

// Adds one. What the block wrote before its barrier can be read by whoever finds the sum.
__device__ __forceinline__ int AddInOrder(int32_t* counter) {
  int before;
  asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;"
               : "=r"(before)
               : "l"(counter)
               : "memory");
  return before;
}

// The end of an item, from the warps' results on. Every warp may go on filling its ring except for
// the stage that its result is in, until this returns.
template <typename T, int kHeadDim, int kWarps>
__device__ __forceinline__ void FinishItem(const DecodeParams& p, int item,
                                           const Work<kWarps>& work,
                                           BlockState<T, kHeadDim, kWarps>* state) {
  const int heads = min(kHeads, p.group - work.first_head);
  T* out = static_cast<T*>(p.out) + work.row * p.out_stride +
           static_cast<int64_t>(work.kv_head * p.group + work.first_head) * kHeadDim;
  const int unit = item / p.splits;
  float* parts = p.partials + static_cast<int64_t>(unit) * p.splits * PartFloats(kHeadDim);
  const bool cut = work.splits > 1;
  __syncthreads();
  CombineWarps(*state, heads, out, cut ? parts + work.split * PartFloats(kHeadDim) : nullptr);
  __syncthreads();
  if (!cut) return;
  if (threadIdx.x == 0) {
    state->last = AddInOrder(p.arrived + unit) == work.splits - 1;
    if (state->last) p.arrived[unit] = 0;
  }
  __syncthreads();
  if (state->last) {
    MergeParts<T, kHeadDim, kWarps * 32>(parts, work.splits, heads, state->weights, out);
  }
}

// Output of a padding row.
template <typename T, int kHeadDim, int kWarps>
__device__ __forceinline__ void WriteZeros(const DecodeParams& p, const Work<kWarps>& work) {
  const int heads = min(kHeads, p.group - work.first_head);
  T* out = static_cast<T*>(p.out) + work.row * p.out_stride +
           static_cast<int64_t>(work.kv_head * p.group + work.first_head) * kHeadDim;
  for (int e = threadIdx.x; e < heads * kHeadDim / 4; e += kWarps * 32) {
    StoreFour(out + 4 * e, float4{0.0f, 0.0f, 0.0f, 0.0f});
  }
}

// Puts the newest key and value into a tile, where the copy left zeros.
template <typename T, int kHeadDim>
__device__ __forceinline__ void InsertNewest(const T (*rows)[kHeadDim + 8], uint8_t* to) {
  __syncwarp();
  for (int d = threadIdx.x % 32 * 4; d < kHeadDim; d += 128) {
    *reinterpret_cast<Four<T>*>(to + 2 * d) = *reinterpret_cast<const Four<T>*>(&rows[0][d]);
    *reinterpret_cast<Four<T>*>(to + TileShape<kHeadDim>::kBytes + 2 * d) =
        *reinterpret_cast<const Four<T>*>(&rows[1][d]);
  }
}

template <typename T, int kHeadDim, int kWarps, int kStages>
__global__ void __launch_bounds__(kWarps * 32, 2) DecodeKernel(const DecodeParams p) {
  using Shape = TileShape<kHeadDim>;
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ BlockState<T, kHeadDim, kWarps> state;
  LetNextStart();

  const int lane = threadIdx.x % 32;
  const uint32_t fragment = (lane % 8 + lane / 16 * 8) * Shape::kStride + lane / 8 % 2 * 16;
  uint8_t* ring = shared + threadIdx.x / 32 * (kStages * Shape::kStageBytes);
  const uint32_t ring_address = SharedAddress(ring);
  const auto stage_at = [&](int stage) {
    return ring_address + stage % kStages * Shape::kStageBytes;
  };
  const auto blocks = static_cast<int>(gridDim.x);
  int item = blockIdx.x;
  int next_item = item + blocks;
  Work<kWarps> work(p, item);
  // The warp's tiles of all items go round the ring; tile i of the item lies in stage `first` + i.
  // kStages - 1 of them are on their way, each in a group of its own.
  int first = 0;
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    if (i < work.count) Fetch<T, kHeadDim>(p, work.Tile(p, i), stage_at(i));
    CommitCopies();
  }
  WaitForPrevious();

  while (item < p.items) {
    int taken = next_item + blocks;
    if (p.items > 2 * blocks && threadIdx.x == 0) taken = 2 * blocks + atomicAdd(p.queue, 1);
    if (work.split < work.splits) LoadRows(p, work, &state);
    Work<kWarps> next(p, next_item);
    __syncthreads();
    uint32_t q[kHeadDim / 16][2];
    LoadQuery<T, kHeadDim>(state.rows, q);
    WarpState<T, kHeadDim> result;
    for (int i = 0; i < work.count; ++i) {
      const int ahead = i + kStages - 1;
      const bool own = ahead < work.count;
      if (own || ahead - work.count < next.count) {
        const TileSource source = own ? work.Tile(p, ahead) : next.Tile(p, ahead - work.count);
        Fetch<T, kHeadDim>(p, source, stage_at(first + ahead));
      }
      CommitCopies();
      WaitForCopies<kStages - 1>();
      const int stage = (first + i) % kStages;
      const int tile = work.first + i * kWarps;
      if (tile == work.tiles - 1) {
        InsertNewest<T, kHeadDim>(
            state.rows + kHeads,
            ring + stage * Shape::kStageBytes + work.position % kTileKeys * Shape::kStride);
      }
      __syncwarp();
      result.Add(q, stage_at(stage), fragment, tile * kTileKeys, work.position + 1, p.scale);
      __syncwarp();
    }
    const int heads = min(kHeads, p.group - work.first_head);
    first = (first + work.count) % kStages;
    if (threadIdx.x == 0) state.next = taken;
    if (work.split < work.splits) {
      // The stage of the last tile is free until the next tile is consumed.
      const int stage = (first + kStages - 1) % kStages;
      auto* of_stage = reinterpret_cast<float*>(ring + stage * Shape::kStageBytes);
      ShareResult(result, heads, work.count > 0 ? of_stage : nullptr, &state);
      FinishItem(p, item, work, &state);
    } else {
      if (work.position < 0 && work.split == 0) WriteZeros<T, kHeadDim>(p, work);
      __syncthreads();
    }
    // A short item had no time to start these.
    const int missing = min(kStages - 1 - work.count, next.count);
    if (missing > 0) {
#pragma unroll 1
      for (int i = 0; i < missing; ++i) {
        Fetch<T, kHeadDim>(p, next.Tile(p, i), stage_at(first + i));
      }
      CommitCopies();
      WaitForCopies<0>();
    }
    item = next_item;
    next_item = state.next;
    work = next;
  }
  if (p.items > 2 * blocks && threadIdx.x == 0) {
    if (atomicAdd(p.queue + 1, 1) == blocks - 1) p.queue[0] = p.queue[1] = 0;
  }
}

int Chunks(const AttentionShape& shape) {
  return (shape.num_heads / shape.num_kv_heads + kHeads - 1) / kHeads;
}

// Rows are cut only while all parts together are no more than this: a block that has several items
// does better without the way through scratch.
int64_t MaxParts(int num_sms) { return static_cast<int64_t>(kBlocksPerSm) * num_sms; }
constexpr int kQueueInts = 4;

template <typename T, int kHeadDim, int kWarps, int kStages>
void LaunchDecode(const LaunchContext& context, const DecodeParams& params) {
  constexpr int kShared = kWarps * kStages * TileShape<kHeadDim>::kStageBytes;
  auto* kernel = &DecodeKernel<T, kHeadDim, kWarps, kStages>;
  AllowShared(kernel, kShared);
  int blocks_per_sm = 0;
  SLUICE_CUDA_CHECK(
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_per_sm, kernel, kWarps * 32, kShared));
  const int blocks = std::min(params.items, std::max(1, blocks_per_sm) * context.num_sms);
  Launch(context, kernel, dim3(blocks), dim3(kWarps * 32), kShared, params);
}

}  // namespace

bool AttentionSupports(const AttentionShape& shape) {
  const int dims[] = {32, 64, 80, 96, 128, 256};
  return (shape.dtype == DType::kF16 || shape.dtype == DType::kBF16) && shape.num_kv_heads > 0 &&
         shape.num_heads > 0 && shape.num_heads % shape.num_kv_heads == 0 && shape.block_size > 0 &&
         std::find(std::begin(dims), std::end(dims), shape.head_dim) != std::end(dims);
}

int64_t DecodeScratchBytes(const AttentionShape& shape, int num_sms) {
  return 4 * (kQueueInts + MaxParts(num_sms) * (1 + PartFloats(shape.head_dim)));
}

void DecodeAttention(const LaunchContext& context, const DeviceStep& step,
                     const AttentionShape& shape, const void* qkv, int64_t qkv_stride,
                     const KvLayer& kv, void* out, int64_t out_stride, void* scratch,
                     NewKeys new_keys) {
  if (step.num_decode_rows == 0) return;
  DecodeParams params = {};
  params.step = step;
  params.qkv = qkv;
  params.k = kv.k;
  params.v = kv.v;
  params.out = out;
  params.qkv_stride = qkv_stride;
  params.out_stride = out_stride;
  params.queue = static_cast<int32_t*>(scratch);
  params.arrived = params.queue + kQueueInts;
  params.partials = static_cast<float*>(scratch) + kQueueInts + MaxParts(context.num_sms);
  params.num_kv_heads = shape.num_kv_heads;
  params.block_size = shape.block_size;
  params.group = shape.num_heads / shape.num_kv_heads;
  params.chunks = Chunks(shape);
  params.scale = shape.scale * kLog2E;
  params.new_keys = new_keys;
  const int64_t units =
      static_cast<int64_t>(shape.num_kv_heads) * params.chunks * step.num_decode_rows;
  params.splits =
      static_cast<int>(std::clamp<int64_t>(MaxParts(context.num_sms) / units, 1, kMaxSplits));
  params.items = static_cast<int>(units * params.splits);
  ForShape(shape, [&]<typename T, int kHeadDim>() {
    if constexpr (kHeadDim == 256) {
      return LaunchDecode<T, kHeadDim, 2, 2>(context, params);
    } else {
      if constexpr (kHeadDim == 128) {
        // Cards before sm_90, but for sm_80, have 99 KiB.
        if (context.max_shared_bytes < 112 << 10) {
          return LaunchDecode<T, kHeadDim, 4, 2>(context, params);
        }
      }
      LaunchDecode<T, kHeadDim, 4, 3>(context, params);
    }
  });
}

}  // namespace sluice
