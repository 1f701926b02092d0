// Flash decode. A block takes one part of the keys of one row and one KV head, and of its query
// heads up to eight. Each warp owns every kWarps-th tile of 16 keys and a ring of tiles in shared
// memory that it fills itself, so that nothing waits for another warp before the end.
//
//   S [8 heads, 16 keys] = Q K^T:  mma with Q as the 16-row operand, of which 8 rows exist
//   O^T [head_dim, 8 heads] += V^T P^T:  V^T as the 16-row operand, so no row is wasted; the
//   accumulator of S is, packed, already the fragment that P^T has to be
//
// The tiles come from the cache but for the newest key, which is taken from qkv; so the cache is
// read before the kernel that makes qkv has ended.
//
// The parts of a row merge through scratch: the last block of a row to finish (a counter tells)
// adds them up in order of the keys.
#include <algorithm>

#include "kernels/cuda/attention_device.h"

namespace sluice {
namespace {

constexpr int kTileKeys = 16;
constexpr int kHeads = 8;  // Query heads of a block
constexpr int kMaxSplits = 64;
constexpr int kBlocksPerSm = 4;  // As many parts are made as keep so many blocks on each SM busy
constexpr int kMinTiles = 4;     // Fewer tiles are not worth a part
constexpr float kLowest = -1e30f;

struct DecodeParams {
  DeviceStep step;
  const void* qkv;
  void* k;
  void* v;
  void* out;
  int64_t qkv_stride, out_stride;
  float* partials;    // [row, unit, split] of [kHeads, head_dim], then [kHeads] max, sum
  int32_t* counters;  // [row, unit]
  int num_kv_heads, block_size, group;
  int chunks;   // Units of one KV head: ceil(group / kHeads)
  float scale;  // Times log2(e)
  NewKeys new_keys;
};

template <int kHeadDim>
struct Tile {
  // 16 bytes behind every row make the eight rows of a matrix fall into different banks.
  static constexpr int kStride = kHeadDim * 2 + 16;
  static constexpr int kBytes = kTileKeys * kStride;
  static constexpr int kStageBytes = 2 * kBytes;  // K, V
};

// The tiles of one warp: which they are, and their way into the ring.
template <typename T, int kHeadDim, int kWarps>
struct TileReader {
  const T* k;
  const T* v;
  const int32_t* table;
  int first;  // Tile; the warp's i-th is first + i * kWarps
  int end;
  int length;  // Keys in the cache
  int kv_head, num_kv_heads, block_size;
  uint32_t rows = 0;  // Lane j: cache row at which tile 32 * n + j begins

  // Starts the copies of tile i to `shared`; i goes up from 0 in steps of one.
  __device__ __forceinline__ void Fetch(int i, uint32_t shared) {
    constexpr int kChunks = kHeadDim / 8;  // Of 16 bytes, in a row
    const int lane = threadIdx.x % 32;
    if (i % 32 == 0) {
      const int tile = first + (i + lane) * kWarps;
      if (tile < end) rows = KvRow(table, tile * kTileKeys, kv_head, num_kv_heads, block_size);
    }
    const uint32_t tile_row = __shfl_sync(0xffffffffu, rows, i % 32);
    const int key = (first + i * kWarps) * kTileKeys;
    const bool whole = block_size % kTileKeys == 0;
#pragma unroll
    for (int j = 0; j < kChunks / 2; ++j) {
      const int row = (lane + 32 * j) / kChunks;
      const int column = (lane + 32 * j) % kChunks;
      const bool exists = key + row < length;
      uint32_t from = tile_row + row;
      if (!whole) {
        from = KvRow(table, min(key + row, max(length - 1, 0)), kv_head, num_kv_heads, block_size);
      }
      const size_t offset = static_cast<size_t>(from) * kHeadDim + column * 8;
      const uint32_t to = shared + row * Tile<kHeadDim>::kStride + column * 16;
      CopyAsync16(to, k + offset, exists);
      CopyAsync16(to + Tile<kHeadDim>::kBytes, v + offset, exists);
    }
  }
};

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
      LoadMatricesTransposed(a, shared + Tile<kHeadDim>::kBytes + fragment + 32 * j);
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

// Element d of a head whose elements are at `head`, turned if it belongs to the first 2 * half_dim;
// cos and sin are the row's.
template <typename T>
__device__ __forceinline__ T TurnedElement(const T* head, int d, const float* cos, const float* sin,
                                           int half_dim) {
  if (d >= 2 * half_dim) return head[d];
  const int i = d < half_dim ? d : d - half_dim;
  const float2 turned = Turn(ToFloat(head[i]), ToFloat(head[i + half_dim]), cos[i], sin[i]);
  return FromFloat<T>(d < half_dim ? turned.x : turned.y);
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

// What the warps of a block share.
template <typename T, int kHeadDim, int kWarps>
struct BlockState {
  T q[kHeads][kHeadDim + 8];  // Zero for heads that the block has not
  T k[kHeadDim];              // The newest key and value
  T v[kHeadDim];
  float max[kWarps][kHeads];
  float sum[kWarps][kHeads];
  float weights[kHeads][kMaxSplits];
  bool last;
};

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

template <typename T, int kHeadDim, int kWarps, int kStages>
__global__ void __launch_bounds__(kWarps * 32) DecodeKernel(const DecodeParams p) {
  constexpr int kThreads = kWarps * 32;
  constexpr int kRing = kStages * Tile<kHeadDim>::kStageBytes;
  static_assert(kRing >= kHeads * (kHeadDim + 4) * 4);
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ BlockState<T, kHeadDim, kWarps> state;
  LetNextStart();

  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int row = p.step.decode_rows[blockIdx.z];
  const int position = p.step.positions[row];
  const int kv_head = blockIdx.y / p.chunks;
  const int first_head = blockIdx.y % p.chunks * kHeads;  // Within the KV head's
  const int heads = min(kHeads, p.group - first_head);
  const int64_t q_column = static_cast<int64_t>(kv_head * p.group + first_head) * kHeadDim;
  T* out = static_cast<T*>(p.out) + row * p.out_stride + q_column;
  if (position < 0) {
    WaitForPrevious();
    if (blockIdx.x > 0) return;
    for (int e = threadIdx.x; e < heads * kHeadDim; e += kThreads) out[e] = FromFloat<T>(0.0f);
    return;
  }
  const int tiles = position / kTileKeys + 1;
  const int splits = min(static_cast<int>(gridDim.x), (tiles + kMinTiles - 1) / kMinTiles);
  const int split = blockIdx.x;
  if (split >= splits) return;

  TileReader<T, kHeadDim, kWarps> reader;
  reader.k = static_cast<const T*>(p.k);
  reader.v = static_cast<const T*>(p.v);
  reader.table = p.step.block_tables + p.step.sequences[row] * p.step.block_table_stride;
  reader.first = tiles * split / splits + warp;
  reader.end = tiles * (split + 1) / splits;
  reader.length = position;
  reader.kv_head = kv_head;
  reader.num_kv_heads = p.num_kv_heads;
  reader.block_size = p.block_size;
  const int count = max(0, (reader.end - reader.first + kWarps - 1) / kWarps);
  uint8_t* own = shared + warp * kRing;
  const uint32_t ring = SharedAddress(own);
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    if (i < count) reader.Fetch(i, ring + i * Tile<kHeadDim>::kStageBytes);
    CommitCopies();
  }
  WaitForPrevious();

  const T* qkv = static_cast<const T*>(p.qkv) + row * p.qkv_stride;
  const int half_dim = p.new_keys == NewKeys::kTurnAndWrite ? p.step.half_dim : 0;
  const float* cos = p.step.cos + static_cast<int64_t>(row) * half_dim;
  const float* sin = p.step.sin + static_cast<int64_t>(row) * half_dim;
#pragma unroll
  for (int e = threadIdx.x; e < kHeads * kHeadDim; e += kThreads) {
    const int head = e / kHeadDim;
    const T* from = qkv + q_column + head * kHeadDim;
    state.q[head][e % kHeadDim] =
        head < heads ? TurnedElement(from, e % kHeadDim, cos, sin, half_dim) : FromFloat<T>(0.0f);
  }
  if (split == splits - 1) {  // The block that has the newest key
    const T* from = qkv + static_cast<int64_t>(p.num_kv_heads * p.group + kv_head) * kHeadDim;
    const size_t to =
        static_cast<size_t>(KvRow(reader.table, position, kv_head, p.num_kv_heads, p.block_size)) *
        kHeadDim;
    const bool write = p.new_keys != NewKeys::kReady && first_head == 0;
    for (int d = threadIdx.x; d < kHeadDim; d += kThreads) {
      state.k[d] = TurnedElement(from, d, cos, sin, half_dim);
      state.v[d] = from[p.num_kv_heads * kHeadDim + d];
      if (!write) continue;
      static_cast<T*>(p.k)[to + d] = state.k[d];
      static_cast<T*>(p.v)[to + d] = state.v[d];
    }
  }
  __syncthreads();
  uint32_t q[kHeadDim / 16][2];
  LoadQuery<T, kHeadDim>(state.q, q);
  const uint32_t fragment =
      (lane % 8 + lane / 16 * 8) * Tile<kHeadDim>::kStride + lane / 8 % 2 * 16;

  WarpState<T, kHeadDim> warp_state;
  int stage = 0;
  for (int i = 0; i < count; ++i) {
    const int next = i + kStages - 1;
    const int next_stage = stage == 0 ? kStages - 1 : stage - 1;
    if (next < count) reader.Fetch(next, ring + next_stage * Tile<kHeadDim>::kStageBytes);
    CommitCopies();
    WaitForCopies<kStages - 1>();
    const int tile = reader.first + i * kWarps;
    if (tile == tiles - 1) {  // Puts the newest key where the copy left zeros
      uint8_t* to = own + stage * Tile<kHeadDim>::kStageBytes +
                    position % kTileKeys * Tile<kHeadDim>::kStride;
      __syncwarp();
      for (int d = lane; d < kHeadDim; d += 32) {
        reinterpret_cast<T*>(to)[d] = state.k[d];
        reinterpret_cast<T*>(to + Tile<kHeadDim>::kBytes)[d] = state.v[d];
      }
    }
    __syncwarp();
    warp_state.Add(q, ring + stage * Tile<kHeadDim>::kStageBytes, fragment, tile * kTileKeys,
                   position + 1, p.scale);
    __syncwarp();
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }

  // The warps' results, each in its own ring: [kHeads, head_dim + 4] floats.
  constexpr int kOutStride = kHeadDim + 4;
  float sum = warp_state.sum;
  sum += __shfl_xor_sync(0xffffffffu, sum, 1);
  sum += __shfl_xor_sync(0xffffffffu, sum, 2);
  if (lane % 4 == 0) {
    state.max[warp][lane / 4] = warp_state.max;
    state.sum[warp][lane / 4] = sum;
  }
  auto* own_out = reinterpret_cast<float*>(own);
#pragma unroll
  for (int j = 0; j < kHeadDim / 16; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int head = 2 * (lane % 4) + i % 2;
      if (head < heads) {
        own_out[head * kOutStride + 16 * j + lane / 4 + i / 2 * 8] = warp_state.out[j][i];
      }
    }
  }
  __syncthreads();
  const int64_t unit = static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y;
  float* parts = p.partials + unit * gridDim.x * PartFloats(kHeadDim);
  float* part = parts + split * PartFloats(kHeadDim);
  for (int e = threadIdx.x; e < heads * kHeadDim / 4; e += kThreads) {
    const int head = 4 * e / kHeadDim;
    const int column = 4 * e % kHeadDim;
    float highest = state.max[0][head];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) highest = fmaxf(highest, state.max[w][head]);
    float4 value = {0.0f, 0.0f, 0.0f, 0.0f};
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float weight = Exp2(state.max[w][head] - highest);
      const auto* of_warp = reinterpret_cast<const float*>(shared + w * kRing);
      AddScaled(&value, weight,
                *reinterpret_cast<const float4*>(of_warp + head * kOutStride + column));
      total += weight * state.sum[w][head];
    }
    if (splits == 1) {
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
  if (splits == 1) return;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    state.last = atomicAdd(p.counters + unit, 1) == splits - 1;
    __threadfence();
    if (state.last) p.counters[unit] = 0;
  }
  __syncthreads();
  if (state.last) MergeParts<T, kHeadDim, kThreads>(parts, splits, heads, state.weights, out);
}

int Chunks(const AttentionShape& shape) {
  return (shape.num_heads / shape.num_kv_heads + kHeads - 1) / kHeads;
}

// Parts that fit into scratch: more than one a unit only while all together are no more.
int64_t MaxParts(int num_sms) { return static_cast<int64_t>(kBlocksPerSm) * num_sms; }

template <typename T, int kHeadDim, int kWarps, int kStages>
void LaunchDecode(const LaunchContext& context, const DecodeParams& params, dim3 grid) {
  constexpr int kShared = kWarps * kStages * Tile<kHeadDim>::kStageBytes;
  auto* kernel = &DecodeKernel<T, kHeadDim, kWarps, kStages>;
  AllowShared(kernel, kShared);
  Launch(context, kernel, grid, dim3(kWarps * 32), kShared, params);
}

}  // namespace

bool AttentionSupports(const AttentionShape& shape) {
  const int dims[] = {32, 64, 80, 96, 128, 256};
  return (shape.dtype == DType::kF16 || shape.dtype == DType::kBF16) && shape.num_kv_heads > 0 &&
         shape.num_heads > 0 && shape.num_heads % shape.num_kv_heads == 0 && shape.block_size > 0 &&
         std::find(std::begin(dims), std::end(dims), shape.head_dim) != std::end(dims);
}

int64_t DecodeScratchBytes(const AttentionShape& shape, int num_sms) {
  return MaxParts(num_sms) * 4 * (1 + PartFloats(shape.head_dim));
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
  params.counters = static_cast<int32_t*>(scratch);
  params.partials = static_cast<float*>(scratch) + MaxParts(context.num_sms);
  params.num_kv_heads = shape.num_kv_heads;
  params.block_size = shape.block_size;
  params.group = shape.num_heads / shape.num_kv_heads;
  params.chunks = Chunks(shape);
  params.scale = shape.scale * kLog2E;
  params.new_keys = new_keys;
  const int units = shape.num_kv_heads * params.chunks;
  const int64_t splits = std::clamp<int64_t>(
      MaxParts(context.num_sms) / (static_cast<int64_t>(units) * step.num_decode_rows), 1,
      kMaxSplits);
  const dim3 grid(splits, units, step.num_decode_rows);
  ForShape(shape, [&]<typename T, int kHeadDim>() {
    if constexpr (kHeadDim == 256) {
      LaunchDecode<T, kHeadDim, 2, 2>(context, params, grid);
    } else {
      LaunchDecode<T, kHeadDim, 4, 2>(context, params, grid);
    }
  });
}

}  // namespace sluice
