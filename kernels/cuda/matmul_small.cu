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
  int ring, reduce, table, x, total;
};
__host__ __device__ SharedLayout LayoutOf(int record_bytes, int k, int rows) {
  SharedLayout layout{};
  layout.reduce = kWarps * kDepth * record_bytes;
  layout.table = layout.reduce + 2 * kReduceFloats * 4;
  layout.x = layout.table + 1024;
  layout.total = layout.x + rows * XRowBytes(k);
  return layout;
}

// The records that one warp works on, in order: records warp, warp + kWarps, ... of the block's
// tiles.
struct RecordWalk {
  int tile, record;
  __device__ __forceinline__ void Next(const WeightParams& w, int warp) {
    record += kWarps;
    if (record >= w.records) {
      record = warp;
      tile += static_cast<int>(gridDim.x);
    }
  }
};

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
      const uint8_t* source = static_cast<const uint8_t*>(w.data) +
                              (int64_t{at.tile} * w.records + at.record) * w.record_bytes;
      for (int byte = lane * 16; byte < w.record_bytes; byte += 512) {
        CopyAsync16(slot + byte, source + byte);
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

// sums[m] becomes the sum over the block. `scratch` has room for kWarps * kSmallRows floats.
__device__ void SumOfBlock(float (&sums)[kSmallRows], int rows, float* scratch) {
  const int warp = threadIdx.x / 32;
  __syncthreads();
#pragma unroll
  for (int m = 0; m < kSmallRows; ++m) {
    if (m >= rows) break;
    const float sum = SumOfWarp(sums[m]);
    if (threadIdx.x % 32 == 0) scratch[m * kWarps + warp] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int m = 0; m < kSmallRows; ++m) {
    if (m >= rows) break;
    float sum = 0.0f;
    for (int i = 0; i < kWarps; ++i) sum += scratch[m * kWarps + i];
    sums[m] = sum;
  }
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

// norm(x) into shared memory, zeros up to a multiple of 128 columns. Each thread works on its own
// columns all the way.
template <typename T>
__device__ void FillX(const InputParams& in, int k, uint8_t* x, float* scratch) {
  const int padded = (k + 127) / 128 * 128;
  const int row_bytes = XRowBytes(k);
  float sums[kSmallRows] = {};
#pragma unroll
  for (int m = 0; m < kSmallRows; ++m) {
    if (m >= in.rows) break;
    const int64_t row = in.row_index == nullptr ? m : in.row_index[m];
    const T* source = static_cast<const T*>(in.x) + row * in.stride;
    for (int i = threadIdx.x * 8; i < padded; i += kThreads * 8) {
      const uint4 eight = LoadX(in, source, i, k);
      *reinterpret_cast<uint4*>(x + m * row_bytes + i * 2) = eight;
      const uint32_t pairs[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 two = Numeric<T>::ToFloat2(pairs[j]);
        sums[m] += in.norm == NormKind::kRms ? two.x * two.x + two.y * two.y : two.x + two.y;
      }
    }
  }
  if (in.norm == NormKind::kNone) return;
  SumOfBlock(sums, in.rows, scratch);
  float means[kSmallRows] = {};
  if (in.norm == NormKind::kLayer) {
#pragma unroll
    for (int m = 0; m < kSmallRows; ++m) {
      if (m >= in.rows) break;
      means[m] = sums[m] / static_cast<float>(k);
      sums[m] = 0.0f;
      for (int i = threadIdx.x * 8; i < padded; i += kThreads * 8) {
        const T* eight = reinterpret_cast<const T*>(x + m * row_bytes + i * 2);
        for (int j = 0; j < 8 && i + j < k; ++j) {
          const float off = Numeric<T>::ToFloat(eight[j]) - means[m];
          sums[m] += off * off;
        }
      }
    }
    SumOfBlock(sums, in.rows, scratch);
  }
#pragma unroll
  for (int m = 0; m < kSmallRows; ++m) {
    if (m >= in.rows) break;
    const float factor = rsqrtf(sums[m] / static_cast<float>(k) + in.eps);
    for (int i = threadIdx.x * 8; i < padded; i += kThreads * 8) {
      T* eight = reinterpret_cast<T*>(x + m * row_bytes + i * 2);
      for (int j = 0; j < 8 && i + j < k; ++j) {
        const int column = in.perm == nullptr ? i + j : in.perm[i + j];
        float value = (Numeric<T>::ToFloat(eight[j]) - means[m]) * factor;
        if (in.norm == NormKind::kRms) value = Numeric<T>::ToFloat(Numeric<T>::FromFloat(value));
        if (in.norm_weight != nullptr) value *= in.norm_weight[column];
        if (in.norm_bias != nullptr) value += in.norm_bias[column];
        eight[j] = Numeric<T>::FromFloat(value);
      }
    }
  }
}

// acc += record * x of its columns. `x` points to the row of x of this lane's column of the B
// operand, at the lane's first column.
template <typename T, QuantFormat kFormat>
__device__ __forceinline__ void MultiplyRecord(const WeightParams& w, const uint8_t* record,
                                               const uint8_t* x, const uint32_t* pair_table,
                                               int lane, float (&acc)[2][4]) {
  using Codes = Fragment<T, kFormat>;
  Codes codes;
  codes.Load(record, lane);
  GranuleState state{};
#pragma unroll
  for (int block = 0; block < Codes::kSteps / 2; ++block) {
    if constexpr (kFormat != QuantFormat::kPlain) {
      if ((2 * block & (w.steps_per_granule - 1)) == 0) {
        const int granule = 2 * block / w.steps_per_granule;
        state = LoadGranule<T, kFormat>(record + kRecordCodeBytes + granule * GranuleBytes(kFormat),
                                        lane / 4);
      }
    }
    const uint4 b = *reinterpret_cast<const uint4*>(x + block * 64);
    uint32_t a[4];
    codes.Step(2 * block, state, pair_table, a);
    Mma<T>(acc[0], a, b.x, b.y);
    codes.Step(2 * block + 1, state, pair_table, a);
    Mma<T>(acc[1], a, b.z, b.w);
  }
}

template <typename T, QuantFormat kFormat>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    SmallKernel(const __grid_constant__ MatMulParams p) {
  extern __shared__ __align__(128) uint8_t shared[];
  const int slot_bytes = kFormat == QuantFormat::kPlain ? kRecordCodeBytes : p.w.record_bytes;
  const SharedLayout layout = LayoutOf(slot_bytes, p.w.k, p.in.rows);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint8_t* ring = shared + warp * kDepth * slot_bytes;
  auto* reduce = reinterpret_cast<float*>(shared + layout.reduce);
  auto* pair_table = reinterpret_cast<uint32_t*>(shared + layout.table);

  LetNextStart();
  // A warp beyond the records of a tile has none at all.
  RecordWalk ahead = {warp < p.w.records ? static_cast<int>(blockIdx.x) : p.w.tiles, warp};
  for (int i = 0; i < kDepth; ++i) {
    StartRecord<T, kFormat>(p.w, ahead, lane, ring + i * slot_bytes);
    ahead.Next(p.w, warp);
  }
  if constexpr (kFormat == QuantFormat::kTable4) FillPairTable<T>(p.w.table, pair_table);
  WaitForPrevious();
  FillX<T>(p.in, p.w.k, shared + layout.x, reduce);
  __syncthreads();

  const int x_row = min(lane / 4, p.in.rows - 1);  // Columns beyond the rows of x are not stored
  const uint8_t* x = shared + layout.x + x_row * XRowBytes(p.w.k) + lane % 4 * 16;
  int slot = 0, buffer = 0;
  for (int tile = static_cast<int>(blockIdx.x); tile < p.w.tiles;
       tile += static_cast<int>(gridDim.x)) {
    float acc[2][4] = {};
    for (int record = warp; record < p.w.records; record += kWarps) {
      WaitForCopies<kDepth - 1>();
      __syncwarp();
      MultiplyRecord<T, kFormat>(p.w, ring + slot * slot_bytes,
                                 x + record * RecordColumns(kFormat) * 2, pair_table, lane, acc);
      __syncwarp();
      StartRecord<T, kFormat>(p.w, ahead, lane, ring + slot * slot_bytes);
      ahead.Next(p.w, warp);
      slot = slot + 1 == kDepth ? 0 : slot + 1;
    }
    // [row][column of the B operand], one plane a warp. Two buffers: the one of this tile is
    // written again only after the barrier of the next.
    float* plane = reduce + buffer * kReduceFloats + warp * kTileRows * kSmallRows;
    auto* low = reinterpret_cast<float2*>(plane + lane / 4 * kSmallRows + lane % 4 * 2);
    low[0] = make_float2(acc[0][0] + acc[1][0], acc[0][1] + acc[1][1]);
    low[8 * kSmallRows / 2] = make_float2(acc[0][2] + acc[1][2], acc[0][3] + acc[1][3]);
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
  const int64_t shared = SmallMatMulShared(kFormat, params.w, params.in.rows);
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

int64_t SmallMatMulShared(QuantFormat format, const WeightParams& w, int rows) {
  const int slot = format == QuantFormat::kPlain ? kRecordCodeBytes : w.record_bytes;
  return LayoutOf(slot, w.k, rows).total;
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
