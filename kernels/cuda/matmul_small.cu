#include <algorithm>

#include "kernels/cuda/epilogue.cuh"
#include "kernels/cuda/fragment.cuh"
#include "kernels/cuda/matmul.h"

namespace sluice {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kDepth = 6;  // Records of a warp under way
constexpr int kBlocksPerSm = 2;
constexpr int kReduceFloats = kWarps * kTileRows * kSmallRows;

// Bytes of a row of x in shared memory: a warp reads 64 bytes of each of 8 rows at once, which
// meets all banks when rows are 64 bytes off a multiple of 128.
__host__ __device__ constexpr int XRowBytes(int k) { return (k + 127) / 128 * 256 + 64; }

struct SharedLayout {
  int ring, reduce, table, norm, x, total;
};
__host__ __device__ SharedLayout LayoutOf(int record_bytes, int k, int rows, NormKind norm) {
  SharedLayout layout{};
  layout.reduce = kWarps * kDepth * record_bytes;
  layout.table = layout.reduce + 2 * kReduceFloats * 4;
  layout.norm = layout.table + 1024;  // Weight, then bias
  const int norm_vectors = norm == NormKind::kNone ? 0 : norm == NormKind::kRms ? 1 : 2;
  layout.x = layout.norm + norm_vectors * ((k + 3) / 4 * 16);
  layout.total = layout.x + rows * XRowBytes(k);
  return layout;
}

// The records that one warp copies, in order: records warp, warp + kWarps, ... of the block's tiles.
// `source` is where the lane reads.
struct RecordWalk {
  const uint8_t* source;
  int tile, record;
};

template <typename T, QuantFormat kFormat>
__device__ __forceinline__ RecordWalk BeginWalk(const WeightParams& w, int warp, int lane) {
  // A warp beyond the records of a tile has none at all.
  RecordWalk walk{nullptr, warp < w.records ? static_cast<int>(blockIdx.x) : w.tiles, warp};
  if constexpr (kFormat != QuantFormat::kPlain) {
    walk.source = static_cast<const uint8_t*>(w.data) + lane * 16 +
                  (int64_t{walk.tile} * w.records + warp) * w.record_bytes;
  }
  return walk;
}

template <QuantFormat kFormat>
__device__ __forceinline__ void NextRecord(const WeightParams& w, int warp, RecordWalk& walk) {
  walk.record += kWarps;
  walk.source += kWarps * w.record_bytes;
  if (walk.record < w.records) return;
  const int64_t skipped =
      int64_t{static_cast<int>(gridDim.x) - 1} * w.records + (w.records - walk.record) + warp;
  walk.source += skipped * w.record_bytes;
  walk.record = warp;
  walk.tile += static_cast<int>(gridDim.x);
}

template <typename T, QuantFormat kFormat>
__device__ __forceinline__ void StartRecord(const WeightParams& w, const RecordWalk& at, int lane,
                                            uint8_t* slot) {
  if (at.tile < w.tiles) {
    if constexpr (kFormat == QuantFormat::kPlain) {
      const int low_row = w.order.LowRow(at.tile, lane / 4);
      const int high_row = w.order.HighRow(low_row);
      const T* column = static_cast<const T*>(w.data) + at.record * 32 + lane % 4 * 8;
      CopyAsync16(slot + lane * 16, column + min(low_row, w.order.n - 1) * w.plain_stride);
      CopyAsync16(slot + 512 + lane * 16, column + min(high_row, w.order.n - 1) * w.plain_stride);
    } else {
      CopyAsync16(slot + lane * 16, at.source);
      CopyAsync16(slot + lane * 16 + 512, at.source + 512);
      if (lane * 16 < w.record_bytes - kRecordCodeBytes) {
        CopyAsync16(slot + lane * 16 + kRecordCodeBytes, at.source + kRecordCodeBytes);
      }
    }
  }
  CommitCopies();
}

__device__ float SumOfWarp(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

// Eight elements of a row of x at column i (those at k and beyond are 0).
template <typename T>
__device__ uint4 LoadX(const InputParams& in, const T* row, int i, int k) {
  if (in.perm == nullptr && i + 8 <= k && in.stride % 8 == 0) {
    return *reinterpret_cast<const uint4*>(row + i);
  }
  T values[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    values[j] = T(0.0f);
    if (i + j < k) values[j] = row[in.perm == nullptr ? i + j : in.perm[i + j]];
  }
  return *reinterpret_cast<const uint4*>(values);
}

// x into shared memory, zeros up to a multiple of 128 columns. Several loads are under way at once.
template <typename T>
__device__ void CopyX(const InputParams& in, int k, uint8_t* x) {
  const int vectors = (k + 127) / 128 * 16;  // Of a row
  const int row_bytes = XRowBytes(k);
  constexpr int kAtOnce = 4;
  for (int first = threadIdx.x; first < in.rows * vectors; first += kAtOnce * kThreads) {
    uint4 values[kAtOnce];
    int to[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int at = first + j * kThreads;
      to[j] = -1;
      if (at >= in.rows * vectors) continue;
      const int m = at / vectors, i = (at - m * vectors) * 8;
      const int64_t row = in.row_index == nullptr ? m : in.row_index[m];
      values[j] = LoadX(in, static_cast<const T*>(in.x) + row * in.stride, i, k);
      to[j] = m * row_bytes + i * 2;
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (to[j] >= 0) *reinterpret_cast<uint4*>(x + to[j]) = values[j];
    }
  }
}

// Norm weight (and bias) into shared memory: starts with the weights, long before x is there.
__device__ void StartNorm(const InputParams& in, int k, uint8_t* norm) {
  const int bytes = (k + 3) / 4 * 16;
  for (int which = 0; which < 2; ++which) {
    const float* source = which == 0 ? in.norm_weight : in.norm_bias;
    if (source == nullptr) continue;
    for (int i = threadIdx.x * 16; i < bytes; i += kThreads * 16) {
      CopyAsync16(norm + which * bytes + i, reinterpret_cast<const uint8_t*>(source) + i,
                  min(16, k * 4 - i));
    }
  }
}

// The sum over the warps that share a row: `width` of them, the first is `first`.
__device__ float SumOfWarps(float sum, int first, int width, float* scratch) {
  sum = SumOfWarp(sum);
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = sum;
  __syncthreads();
  float total = 0.0f;
  for (int i = 0; i < width; ++i) total += scratch[first + i];
  return total;
}

// Eight of the norm's weights (or biases) from column i on; `none` when there are none.
__device__ void NormValues(const InputParams& in, const float* values, int i, int k, float none,
                           float (&out)[8]) {
  if (values != nullptr && in.perm == nullptr && i + 8 <= k) {
    *reinterpret_cast<float4*>(out) = *reinterpret_cast<const float4*>(values + i);
    *reinterpret_cast<float4*>(out + 4) = *reinterpret_cast<const float4*>(values + i + 4);
    return;
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    out[j] = none;
    if (values != nullptr && i + j < k)
      out[j] = values[in.perm == nullptr ? i + j : in.perm[i + j]];
  }
}

// x becomes norm(x), in shared memory. Each row has kWarps / (rows up to a power of two) warps.
template <typename T>
__device__ void NormX(const InputParams& in, int k, const float* weight, const float* bias,
                      uint8_t* x, float* scratch) {
  int width = kWarps;
  while (width > 1 && kWarps / width < in.rows) width /= 2;
  const int warp = threadIdx.x / 32, m = warp / width, first = m * width;
  const bool mine = m < in.rows;
  uint8_t* row = x + m * XRowBytes(k);
  const int begin = ((warp - first) * 32 + static_cast<int>(threadIdx.x) % 32) * 8;
  const int step = width * 32 * 8;
  float mean = 0.0f;
  if (in.norm == NormKind::kLayer) {
    float sum = 0.0f;
    for (int i = begin; mine && i < k; i += step) {
      const uint4 eight = *reinterpret_cast<const uint4*>(row + i * 2);
      for (const uint32_t pair : {eight.x, eight.y, eight.z, eight.w}) {
        const float2 two = Numeric<T>::ToFloat2(pair);
        sum += two.x + two.y;  // Zeros behind k
      }
    }
    mean = SumOfWarps(sum, first, width, scratch) / static_cast<float>(k);
  }
  float squares = 0.0f;
  for (int i = begin; mine && i < k; i += step) {
    const auto* eight = reinterpret_cast<const T*>(row + i * 2);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float off = Numeric<T>::ToFloat(eight[j]) - mean;
      squares += i + j < k ? off * off : 0.0f;
    }
  }
  squares = SumOfWarps(squares, first, width, scratch);
  const float factor = rsqrtf(squares / static_cast<float>(k) + in.eps);
  for (int i = begin; mine && i < k; i += step) {
    auto* eight = reinterpret_cast<T*>(row + i * 2);
    float weights[8], biases[8];
    NormValues(in, in.norm_weight == nullptr ? nullptr : weight, i, k, 1.0f, weights);
    NormValues(in, in.norm_bias == nullptr ? nullptr : bias, i, k, 0.0f, biases);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (i + j >= k) break;
      float value = (Numeric<T>::ToFloat(eight[j]) - mean) * factor;
      if (in.norm == NormKind::kRms) value = Numeric<T>::ToFloat(Numeric<T>::FromFloat(value));
      eight[j] = Numeric<T>::FromFloat(value * weights[j] + biases[j]);
    }
  }
}

// acc += record * x of its columns. `x` points to the row of x of this lane's column of the B
// operand, at the lane's first column.
template <typename T, QuantFormat kFormat>
__device__ __forceinline__ void MultiplyRecord(const WeightParams& w, const uint8_t* record,
                                               const uint8_t* x, const uint32_t* pair_table,
                                               int lane, float (&acc)[4]) {
  constexpr bool kScaled = kFormat == QuantFormat::kInt4Offset;
  constexpr bool kGranules = kFormat != QuantFormat::kPlain;
  using Codes = Fragment<T, kFormat, kScaled>;
  Codes codes;
  codes.Load(record, lane);
  GranuleState state{};
  const uint8_t* granule = record + kRecordCodeBytes;
  float parts[2][4] = {};  // Sums of a granule, or of all; two chains
#pragma unroll
  for (int block = 0; block < Codes::kSteps / 2; ++block) {
    if (kGranules && (2 * block & (w.steps_per_granule - 1)) == 0) {
      state = LoadGranule<T, kFormat>(granule, lane / 4);
      granule += GranuleBytes(kFormat);
    }
    const uint4 b = *reinterpret_cast<const uint4*>(x + block * 64);
    uint32_t a[4];
    codes.Step(2 * block, state, pair_table, a);
    Mma<T>(parts[0], a, b.x, b.y);
    codes.Step(2 * block + 1, state, pair_table, a);
    Mma<T>(parts[1], a, b.z, b.w);
    if (kGranules && !kScaled && (2 * block + 2 & (w.steps_per_granule - 1)) == 0) {
      const float low = Numeric<T>::ToFloat2(state.scale_low).x;
      const float high = Numeric<T>::ToFloat2(state.scale_high).x;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        acc[i] += (parts[0][i] + parts[1][i]) * (i < 2 ? low : high);
        parts[0][i] = parts[1][i] = 0.0f;
      }
    }
  }
  if constexpr (!kGranules || kScaled) {
#pragma unroll
    for (int i = 0; i < 4; ++i) acc[i] += parts[0][i] + parts[1][i];
  }
}

template <typename T, QuantFormat kFormat>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    SmallKernel(const __grid_constant__ MatMulParams p) {
  extern __shared__ __align__(128) uint8_t shared[];
  const int slot_bytes = kFormat == QuantFormat::kPlain ? kRecordCodeBytes : p.w.record_bytes;
  const SharedLayout layout = LayoutOf(slot_bytes, p.w.k, p.in.rows, p.in.norm);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint8_t* ring = shared + warp * kDepth * slot_bytes;
  auto* reduce = reinterpret_cast<float*>(shared + layout.reduce);
  auto* pair_table = reinterpret_cast<uint32_t*>(shared + layout.table);

  LetNextStart();
  StartNorm(p.in, p.w.k, shared + layout.norm);
  CommitCopies();
  RecordWalk ahead = BeginWalk<T, kFormat>(p.w, warp, lane);
  for (int i = 0; i < kDepth; ++i) {
    StartRecord<T, kFormat>(p.w, ahead, lane, ring + i * slot_bytes);
    NextRecord<kFormat>(p.w, warp, ahead);
  }
  if constexpr (kFormat == QuantFormat::kTable4) FillPairTable<T>(p.w.table, pair_table);
  WaitForPrevious();
  CopyX<T>(p.in, p.w.k, shared + layout.x);
  if (p.in.norm != NormKind::kNone) {
    WaitForCopies<kDepth>();  // The norm's weights
    __syncthreads();
    const auto* weight = reinterpret_cast<const float*>(shared + layout.norm);
    NormX<T>(p.in, p.w.k, weight, weight + (p.w.k + 3) / 4 * 4, shared + layout.x, reduce);
  }
  __syncthreads();

  const int x_row = min(lane / 4, p.in.rows - 1);  // Columns beyond the rows of x are not stored
  const uint8_t* x = shared + layout.x + x_row * XRowBytes(p.w.k) + lane % 4 * 16;
  int slot = 0, buffer = 0;
  for (int tile = static_cast<int>(blockIdx.x); tile < p.w.tiles;
       tile += static_cast<int>(gridDim.x)) {
    float acc[4] = {};
    for (int record = warp; record < p.w.records; record += kWarps) {
      WaitForCopies<kDepth - 1>();
      __syncwarp();
      MultiplyRecord<T, kFormat>(p.w, ring + slot * slot_bytes,
                                 x + record * RecordColumns(kFormat) * 2, pair_table, lane, acc);
      __syncwarp();
      StartRecord<T, kFormat>(p.w, ahead, lane, ring + slot * slot_bytes);
      NextRecord<kFormat>(p.w, warp, ahead);
      slot = slot + 1 == kDepth ? 0 : slot + 1;
    }
    // [row][column of the B operand], one plane a warp. Two buffers: the one of this tile is
    // written again only after the barrier of the next.
    float* plane = reduce + buffer * kReduceFloats + warp * kTileRows * kSmallRows;
    auto* low = reinterpret_cast<float2*>(plane + lane / 4 * kSmallRows + lane % 4 * 2);
    low[0] = make_float2(acc[0], acc[1]);
    low[8 * kSmallRows / 2] = make_float2(acc[2], acc[3]);
    __syncthreads();
    if (threadIdx.x < 64) {
      const int token = threadIdx.x / 8, g = threadIdx.x % 8;
      if (token < p.in.rows) {
        const float* sums = reduce + buffer * kReduceFloats + g * kSmallRows + token;
        float low_sum = 0.0f, high_sum = 0.0f;
#pragma unroll
        for (int i = 0; i < kWarps; ++i) {
          low_sum += sums[i * kTileRows * kSmallRows];
          high_sum += sums[i * kTileRows * kSmallRows + 8 * kSmallRows];
        }
        Finish<T>(p.out, p.w.order, token, p.w.order.LowRow(tile, g), low_sum, high_sum);
      }
    }
    buffer ^= 1;
  }
  WaitForCopies<0>();
}

template <typename T, QuantFormat kFormat>
void LaunchSmall(const LaunchContext& context, const MatMulParams& params) {
  const int64_t shared = SmallMatMulShared(kFormat, params.w, params.in.rows, params.in.norm);
  const auto kernel = SmallKernel<T, kFormat>;
  static const bool allowed = [&] {
    SLUICE_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           context.max_shared_bytes));
    return true;
  }();
  SLUICE_CHECK(allowed && shared <= context.max_shared_bytes) << shared;
  const int per_sm = 2 * (shared + 1024) <= context.max_shared_bytes + 1024 ? kBlocksPerSm : 1;
  const int blocks = std::min(params.w.tiles, context.num_sms * per_sm);
  Launch(context, kernel, dim3(blocks), dim3(kThreads), shared, params);
}

template <typename T>
void DispatchSmall(const LaunchContext& context, QuantFormat format, const MatMulParams& params) {
  switch (format) {
    case QuantFormat::kPlain:
      return LaunchSmall<T, QuantFormat::kPlain>(context, params);
    case QuantFormat::kInt4Zero:
      return LaunchSmall<T, QuantFormat::kInt4Zero>(context, params);
    case QuantFormat::kInt4Offset:
      return LaunchSmall<T, QuantFormat::kInt4Offset>(context, params);
    case QuantFormat::kTable4:
      return LaunchSmall<T, QuantFormat::kTable4>(context, params);
    case QuantFormat::kInt8:
      return LaunchSmall<T, QuantFormat::kInt8>(context, params);
  }
}

}  // namespace

int64_t SmallMatMulShared(QuantFormat format, const WeightParams& w, int rows, NormKind norm) {
  const int slot = format == QuantFormat::kPlain ? kRecordCodeBytes : w.record_bytes;
  return LayoutOf(slot, w.k, rows, norm).total;
}

void SmallMatMul(const LaunchContext& context, DType dtype, QuantFormat format,
                 const MatMulParams& params) {
  SLUICE_CHECK(params.in.rows >= 1 && params.in.rows <= kSmallRows) << params.in.rows;
  if (dtype == DType::kF16) {
    DispatchSmall<__half>(context, format, params);
  } else {
    DispatchSmall<__nv_bfloat16>(context, format, params);
  }
}

}  // namespace sluice
