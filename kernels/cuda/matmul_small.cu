#include <algorithm>

#include "kernels/cuda/epilogue.cuh"
#include "kernels/cuda/fragment.cuh"
#include "kernels/cuda/matmul.h"

namespace sluice {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kDepth = 4;  // Records of a warp under way
constexpr int kBlocksPerSm = 3;
// Sums of a tile: [warp][token][row], strides such that neither writing nor adding up meets a bank
// twice.
constexpr int kTokenFloats = 20;
constexpr int kPlaneFloats = 8 * kTokenFloats + 4;
constexpr int kReduceFloats = kWarps * kPlaneFloats;

// Bytes of a row of x in shared memory: a warp reads 64 bytes of each of 8 rows at once, which
// meets all banks when rows are 64 bytes off a multiple of 128.
__host__ __device__ constexpr int XRowBytes(int k) { return (k + 127) / 128 * 256 + 64; }

struct SharedLayout {
  int ring, reduce, table, norm, sums, x, total;
};
// granules: of a row of W when sums of x over each are wanted, else 0.
__host__ __device__ SharedLayout LayoutOf(int record_bytes, int k, int rows, NormKind norm,
                                          int granules) {
  SharedLayout layout{};
  layout.reduce = kWarps * kDepth * record_bytes;
  layout.table = layout.reduce + 2 * kReduceFloats * 4;
  layout.norm = layout.table + 1024;  // Weight, then bias
  const int norm_vectors = norm == NormKind::kNone ? 0 : norm == NormKind::kRms ? 1 : 2;
  layout.sums = layout.norm + norm_vectors * ((k + 3) / 4 * 16);
  layout.x = layout.sums + granules * kSmallRows * 4;
  layout.total = layout.x + rows * XRowBytes(k);
  return layout;
}

// int4_zero takes codes as they come and puts them right by the sum of x (RawOffset).
template <QuantFormat kFormat>
__host__ __device__ int SumGranules(const WeightParams& w) {
  if (kFormat != QuantFormat::kInt4Zero) return 0;
  return w.records * (RecordColumns(kFormat) / 16 / w.steps_per_granule);
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

// sums[granule][row of x]: the sum of x over the columns of a granule. Eight lanes a sum.
template <typename T>
__device__ void SumX(const InputParams& in, int granules, int columns, const uint8_t* x, int k,
                     float* sums) {
  const int lane = threadIdx.x % 8, sums_at_once = kThreads / 8;
  for (int first = 0; first < granules * in.rows; first += sums_at_once) {  // All lanes of a warp
    const int at = first + static_cast<int>(threadIdx.x) / 8;
    const int granule = at / in.rows, m = at - granule * in.rows;
    const uint8_t* row = x + m * XRowBytes(k) + granule * columns * 2;
    float sum = 0.0f;
    for (int i = lane * 4; i < columns && granule < granules; i += 32) {
      const uint2 four = *reinterpret_cast<const uint2*>(row + i * 2);
      const float2 first_two = Numeric<T>::ToFloat2(four.x), others = Numeric<T>::ToFloat2(four.y);
      sum += (first_two.x + first_two.y) + (others.x + others.y);
    }
#pragma unroll
    for (int offset = 4; offset > 0; offset /= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    }
    if (lane == 0 && granule < granules) sums[granule * kSmallRows + m] = sum;
  }
}

// acc += scale * part, part being the sums of a granule; sums of x of the same.
template <typename T, QuantFormat kFormat>
__device__ __forceinline__ void EndGranule(const GranuleState& state, float2 x_sums,
                                           float (&parts)[2][4], float (&acc)[4]) {
  float low = Numeric<T>::ToFloat2(state.scale_low).x;
  float high = Numeric<T>::ToFloat2(state.scale_high).x;
  float back_low = 0.0f, back_high = 0.0f;
  if constexpr (kFormat == QuantFormat::kInt4Zero) {
    const RawOffset raw_low = RawOffsetOf<T>(false), raw_high = RawOffsetOf<T>(true);
    back_low = -(raw_low.offset + raw_low.factor * static_cast<float>(state.second_low));
    back_high = -(raw_high.offset + raw_high.factor * static_cast<float>(state.second_high));
    low *= raw_low.inverse_factor;
    high *= raw_high.inverse_factor;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float part = parts[0][i] + parts[1][i];
    if constexpr (kFormat == QuantFormat::kInt4Zero) {
      part += (i % 2 == 0 ? x_sums.x : x_sums.y) * (i < 2 ? back_low : back_high);
    }
    acc[i] += part * (i < 2 ? low : high);
    parts[0][i] = parts[1][i] = 0.0f;
  }
}

// acc += record * x of its columns. `x` points to the row of x of this lane's column of the B
// operand, at the lane's first column; x_sums to the sums of this lane's rows of x over the record's
// granules. kSteps: of a granule when it is known, else 0.
template <typename T, QuantFormat kFormat, int kSteps>
__device__ __forceinline__ void MultiplyRecord(const WeightParams& w, const uint8_t* record,
                                               const uint8_t* x, const float* x_sums,
                                               const uint32_t* pair_table, int lane,
                                               float (&acc)[4]) {
  constexpr bool kScaled = kFormat == QuantFormat::kInt4Offset;
  constexpr bool kGranules = kFormat != QuantFormat::kPlain;
  using Codes = Fragment<T, kFormat, kScaled>;
  Codes codes;
  codes.Load(record, lane);
  GranuleState state{};
  const uint8_t* granule = record + kRecordCodeBytes;
  const int mask = (kSteps > 0 ? kSteps : w.steps_per_granule) - 1;
  float2 sums{};
  float parts[2][4] = {};  // Sums of a granule, or of all; two chains
#pragma unroll
  for (int block = 0; block < Codes::kSteps / 2; ++block) {
    if (kGranules && (2 * block & mask) == 0) {
      state = LoadGranule<T, kFormat, kScaled>(granule, lane / 4);
      granule += GranuleBytes(kFormat);
      if constexpr (kFormat == QuantFormat::kInt4Zero) {
        sums = *reinterpret_cast<const float2*>(x_sums);
        x_sums += kSmallRows;
      }
    }
    const uint4 b = *reinterpret_cast<const uint4*>(x + block * 64);
    uint32_t a[4];
    codes.Step(2 * block, state, pair_table, a);
    Mma<T>(parts[0], a, b.x, b.y);
    codes.Step(2 * block + 1, state, pair_table, a);
    Mma<T>(parts[1], a, b.z, b.w);
    if (kGranules && !kScaled && (2 * block + 2 & mask) == 0) {
      EndGranule<T, kFormat>(state, sums, parts, acc);
    }
  }
  if constexpr (!kGranules || kScaled) {
#pragma unroll
    for (int i = 0; i < 4; ++i) acc[i] += parts[0][i] + parts[1][i];
  }
}

template <typename T, QuantFormat kFormat, int kSteps>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    SmallKernel(const __grid_constant__ MatMulParams p) {
  extern __shared__ __align__(128) uint8_t shared[];
  const int slot_bytes = kFormat == QuantFormat::kPlain ? kRecordCodeBytes : p.w.record_bytes;
  const SharedLayout layout =
      LayoutOf(slot_bytes, p.w.k, p.in.rows, p.in.norm, SumGranules<kFormat>(p.w));
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
  auto* x_sums = reinterpret_cast<float*>(shared + layout.sums);
  const int record_granules =
      kFormat == QuantFormat::kPlain ? 0 : RecordColumns(kFormat) / 16 / p.w.steps_per_granule;
  if constexpr (kFormat == QuantFormat::kInt4Zero) {
    SumX<T>(p.in, SumGranules<kFormat>(p.w), 16 * p.w.steps_per_granule, shared + layout.x, p.w.k,
            x_sums);
    __syncthreads();
  }
  x_sums += lane % 4 * 2;

  // Warp i ends the work on token i: four lanes a pair of rows, each adds up two planes.
  Epilogue<T> epilogue(p.out, p.w.order);
  const bool ends = warp < p.in.rows;
  if (ends) epilogue.SetToken(warp);

  const int x_row = min(lane / 4, p.in.rows - 1);  // Columns beyond the rows of x are not stored
  const uint8_t* x = shared + layout.x + x_row * XRowBytes(p.w.k) + lane % 4 * 16;
  int slot = 0, buffer = 0;
  for (int tile = static_cast<int>(blockIdx.x); tile < p.w.tiles;
       tile += static_cast<int>(gridDim.x)) {
    if (ends) {
      epilogue.SetRows(p.w.order.LowRow(tile, lane / 4));
      epilogue.Prefetch();
    }
    float acc[4] = {};
    for (int record = warp; record < p.w.records; record += kWarps) {
      WaitForCopies<kDepth - 1>();
      __syncwarp();
      MultiplyRecord<T, kFormat, kSteps>(
          p.w, ring + slot * slot_bytes, x + record * RecordColumns(kFormat) * 2,
          x_sums + record * record_granules * kSmallRows, pair_table, lane, acc);
      __syncwarp();
      StartRecord<T, kFormat>(p.w, ahead, lane, ring + slot * slot_bytes);
      NextRecord<kFormat>(p.w, warp, ahead);
      slot = slot + 1 == kDepth ? 0 : slot + 1;
    }
    // Two buffers: the one of this tile is written again only after the barrier of the next.
    float* sums = reduce + buffer * kReduceFloats;
    float* mine = sums + warp * kPlaneFloats + lane % 4 * 2 * kTokenFloats + lane / 4;
    mine[0] = acc[0], mine[kTokenFloats] = acc[1];
    mine[8] = acc[2], mine[kTokenFloats + 8] = acc[3];
    __syncthreads();
    if (ends) {
      const float* two = sums + lane % 4 * 2 * kPlaneFloats + warp * kTokenFloats + lane / 4;
      float low = two[0] + two[kPlaneFloats], high = two[8] + two[kPlaneFloats + 8];
#pragma unroll
      for (int offset = 1; offset < 4; offset *= 2) {
        low += __shfl_xor_sync(0xffffffffu, low, offset);
        high += __shfl_xor_sync(0xffffffffu, high, offset);
      }
      if (lane % 4 == 0) epilogue.Store(low, high);
    }
    buffer ^= 1;
  }
  WaitForCopies<0>();
}

template <typename T, QuantFormat kFormat, int kSteps>
void LaunchSteps(const LaunchContext& context, const MatMulParams& params) {
  const int64_t shared = SmallMatMulShared(kFormat, params.w, params.in.rows, params.in.norm);
  const auto kernel = SmallKernel<T, kFormat, kSteps>;
  static const bool allowed = [&] {
    SLUICE_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           context.max_shared_bytes));
    return true;
  }();
  SLUICE_CHECK(allowed && shared <= context.max_shared_bytes) << shared;
  const auto fitting = static_cast<int>((context.max_shared_bytes + 1024) / (shared + 1024));
  const int per_sm = std::clamp(fitting, 1, kBlocksPerSm);
  const int blocks = std::min(params.w.tiles, context.num_sms * per_sm);
  Launch(context, kernel, dim3(blocks), dim3(kThreads), shared, params);
}

// One granule a record (groups of 128 columns and more) has a kernel of its own.
template <typename T, QuantFormat kFormat>
void LaunchSmall(const LaunchContext& context, const MatMulParams& params) {
  constexpr int kRecordSteps = RecordColumns(kFormat) / 16;
  constexpr bool kCommon = kFormat == QuantFormat::kInt4Zero || kFormat == QuantFormat::kInt8;
  if (kCommon && params.w.steps_per_granule == kRecordSteps) {
    LaunchSteps<T, kFormat, kCommon ? kRecordSteps : 0>(context, params);
  } else {
    LaunchSteps<T, kFormat, 0>(context, params);
  }
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
  const int granules =
      format == QuantFormat::kInt4Zero ? SumGranules<QuantFormat::kInt4Zero>(w) : 0;
  return LayoutOf(slot, w.k, rows, norm, granules).total;
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
