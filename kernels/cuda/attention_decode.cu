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

#include "kernels/cuda/attention_decode_merge.cuh"

namespace sluice {
namespace {

constexpr int kBlocksPerSm = 2;  // Parts are made for so many

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

// A warp's ring of tiles. The tiles of all items go round it; tile i of the current item lies in
// stage first + i, and kStages - 1 tiles from the current one on are on their way, each in a group
// of its own.
template <int kHeadDim, int kStages>
struct Ring {
  uint8_t* bytes;
  int first = 0;

  __device__ uint8_t* Stage(int i) const {
    return bytes + (first + i) % kStages * TileShape<kHeadDim>::kStageBytes;
  }
};

// Attends to the warp's tiles of `work`; where there are no more, starts those of `next`.
template <typename T, int kHeadDim, int kWarps, int kStages>
__device__ __forceinline__ void AttendTiles(const DecodeParams& p, Work<kWarps>* work,
                                            Work<kWarps>* next, const Ring<kHeadDim, kStages>& ring,
                                            const T (*rows)[kHeadDim + 8],
                                            WarpState<T, kHeadDim>* result) {
  using Shape = TileShape<kHeadDim>;
  const int lane = threadIdx.x % 32;
  const uint32_t fragment = (lane % 8 + lane / 16 * 8) * Shape::kStride + lane / 8 % 2 * 16;
  uint32_t q[kHeadDim / 16][2];
  LoadQuery<T, kHeadDim>(rows, q);
  for (int i = 0; i < work->count; ++i) {
    const int ahead = i + kStages - 1;
    const bool own = ahead < work->count;
    if (own || ahead - work->count < next->count) {
      const TileSource source = own ? work->Tile(p, ahead) : next->Tile(p, ahead - work->count);
      Fetch<T, kHeadDim>(p, source, SharedAddress(ring.Stage(ahead)));
    }
    CommitCopies();
    WaitForCopies<kStages - 1>();
    uint8_t* stage = ring.Stage(i);
    const int tile = work->first + i * kWarps;
    if (tile == work->tiles - 1) {
      InsertNewest<T, kHeadDim>(rows + kHeads, stage + work->position % kTileKeys * Shape::kStride);
    }
    __syncwarp();
    result->Add(q, SharedAddress(stage), fragment, tile * kTileKeys, work->position + 1, p.scale);
    __syncwarp();
  }
}

template <typename T, int kHeadDim, int kWarps, int kStages>
__global__ void __launch_bounds__(kWarps * 32, 2) DecodeKernel(const DecodeParams p) {
  constexpr int kRingBytes = kStages * TileShape<kHeadDim>::kStageBytes;
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ BlockState<T, kHeadDim, kWarps> state;
  LetNextStart();

  const auto blocks = static_cast<int>(gridDim.x);
  int item = blockIdx.x;
  int next_item = item + blocks;
  Work<kWarps> work(p, item);
  Ring<kHeadDim, kStages> ring = {shared + threadIdx.x / 32 * kRingBytes};
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    if (i < work.count) Fetch<T, kHeadDim>(p, work.Tile(p, i), SharedAddress(ring.Stage(i)));
    CommitCopies();
  }
  WaitForPrevious();

  while (item < p.items) {
    int taken = next_item + blocks;
    if (p.items > 2 * blocks && threadIdx.x == 0) taken = 2 * blocks + atomicAdd(p.queue, 1);
    if (work.split < work.splits) LoadRows(p, work, &state);
    Work<kWarps> next(p, next_item);
    __syncthreads();
    WarpState<T, kHeadDim> result;
    AttendTiles<T>(p, &work, &next, ring, state.rows, &result);
    ring.first = (ring.first + work.count) % kStages;
    if (threadIdx.x == 0) state.next = taken;
    if (work.split < work.splits) {
      // The stage of the last tile is free until the next tile is consumed.
      auto* free_stage = reinterpret_cast<float*>(ring.Stage(kStages - 1));
      ShareResult(result, min(kHeads, p.group - work.first_head),
                  work.count > 0 ? free_stage : nullptr, &state);
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
        Fetch<T, kHeadDim>(p, next.Tile(p, i), SharedAddress(ring.Stage(i)));
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
