#include "kernels/cuda/elementwise.h"

#include <algorithm>

#include "kernels/core/check.h"
#include "kernels/cuda/element.cuh"
#include "kernels/cuda/launch.h"

namespace sluice {
namespace {

constexpr int kThreads = 256;

// --- Embedding -------------------------------------------------------------------------------

template <int kCount, typename Source>
__device__ void LoadTable(const EmbeddingTable& table, int64_t offset, float* values) {
  Load<kCount>(static_cast<const Source*>(table.data) + offset, values);
}

// Blocks (columns, row). out = row ids[m] of table, added to what is there when kAdd.
template <typename T, int kCount, bool kAdd>
__global__ void __launch_bounds__(kThreads)
    EmbedKernel(const uint32_t* ids, const EmbeddingTable table, T* out, int64_t stride) {
  LetNextStart();
  WaitForPrevious();
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kCount;
  if (column >= table.cols) return;
  const uint32_t id = ids[blockIdx.y];
  const int64_t offset = (id < table.rows ? id : 0) * table.stride + column;
  float values[kCount];
  if (table.dtype == DType::kF16) {
    LoadTable<kCount, __half>(table, offset, values);
  } else if (table.dtype == DType::kBF16) {
    LoadTable<kCount, __nv_bfloat16>(table, offset, values);
  } else {
    LoadTable<kCount, float>(table, offset, values);
  }
  T* to = out + blockIdx.y * stride + column;
  if constexpr (kAdd) {
    float before[kCount];
    Load<kCount>(to, before);
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] += before[i];
  }
  Write<kCount>(values, to);
}

// --- Activation ------------------------------------------------------------------------------

__device__ float Activate(Activation act, float x) {
  switch (act) {
    case Activation::kNone:
      return x;
    case Activation::kRelu:
      return fmaxf(x, 0.0f);
    case Activation::kSilu:
      return x / (1.0f + expf(-x));
    case Activation::kGelu:
      return 0.5f * x * (1.0f + erff(x * 0.70710678f));
    case Activation::kGeluTanh:
      return x / (1.0f + expf(-2.0f * 0.79788456f * (x + 0.044715f * x * x * x)));
  }
  return x;
}

// Blocks (columns, rows). The last dimension walks: grids are at most 65535 high.
template <typename T, int kCount>
__global__ void __launch_bounds__(kThreads) GateUpKernel(const GateUpArgs args) {
  LetNextStart();
  WaitForPrevious();
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kCount;
  if (column >= args.cols) return;
  for (int64_t row = blockIdx.y; row < args.rows; row += gridDim.y) {
    const T* gate = static_cast<const T*>(args.wide) + row * args.wide_stride + column;
    float values[kCount];
    float up[kCount];
    Load<kCount>(gate, values);
    Load<kCount>(gate + args.cols, up);
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = Activate(args.act, values[i]) * up[i];
    Write<kCount>(values, static_cast<T*>(args.y) + row * args.y_stride + column);
  }
}

template <typename X, typename T, int kCount>
__global__ void __launch_bounds__(kThreads) BiasActivationKernel(const BiasActivationArgs args) {
  LetNextStart();
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kCount;
  if (column >= args.cols) return;
  float bias[kCount] = {};
  if (args.bias != nullptr) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) bias[i] = args.bias[column + i];
  }
  WaitForPrevious();
  for (int64_t row = blockIdx.y; row < args.rows; row += gridDim.y) {
    T* y = static_cast<T*>(args.y) + row * args.y_stride + column;
    float values[kCount];
    Load<kCount>(static_cast<const X*>(args.x) + row * args.x_stride + column, values);
    float before[kCount] = {};
    if (args.accumulate) Load<kCount>(y, before);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      values[i] = Activate(args.act, values[i] + bias[i]) + before[i];
    }
    Write<kCount>(values, y);
  }
}

// --- Rotary table ----------------------------------------------------------------------------

__global__ void __launch_bounds__(kThreads) RopeTableKernel(const RopeTableArgs args) {
  LetNextStart();
  WaitForPrevious();
  const int64_t count = args.rows * args.half_dim;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += step) {
    const int64_t row = i / args.half_dim;
    const int32_t position = args.positions[row];
    float cosine = 1.0f;
    float sine = 0.0f;
    if (position >= 0) {
      const int64_t at = row * args.inv_freq_row_stride + i % args.half_dim;
      const float angle = __fmul_rn(static_cast<float>(position), args.inv_freq[at]);
      double exact_sine;
      double exact_cosine;
      sincos(static_cast<double>(angle), &exact_sine, &exact_cosine);
      cosine = __fmul_rn(static_cast<float>(exact_cosine), args.scale);
      sine = __fmul_rn(static_cast<float>(exact_sine), args.scale);
    }
    args.cos[i] = cosine;
    args.sin[i] = sine;
  }
}

// --- Host ------------------------------------------------------------------------------------

constexpr int64_t kMaxGridHeight = 65535;

// A block of kThreads takes kThreads * kCount columns of one row, or of every gridDim.y-th.
dim3 ElementGrid(int64_t rows, int64_t cols, int count) {
  return dim3(static_cast<unsigned>(CeilDiv(cols, kThreads * count)),
              static_cast<unsigned>(std::min(rows, kMaxGridHeight)));
}

template <typename T, bool kAdd>
void LaunchEmbed(const LaunchContext& context, const uint32_t* ids, int64_t rows,
                 const EmbeddingTable& table, const ActivationRows& out) {
  const bool wide = IsAligned(table.data, table.stride, table.dtype) &&
                    IsAligned(out.data, out.stride, out.dtype) && table.cols % kWide == 0;
  SLUICE_CHECK(rows <= kMaxGridHeight) << rows;
  Launch(context, wide ? EmbedKernel<T, kWide, kAdd> : EmbedKernel<T, 1, kAdd>,
         ElementGrid(rows, table.cols, wide ? kWide : 1), dim3(kThreads), 0, ids, table,
         static_cast<T*>(out.data), out.stride);
}

template <typename X, typename T>
void LaunchBiasActivation(const LaunchContext& context, const BiasActivationArgs& args) {
  const bool wide = IsAligned(args.x, args.x_stride, args.x_dtype) &&
                    IsAligned(args.y, args.y_stride, args.dtype) && args.cols % kWide == 0;
  Launch(context, wide ? BiasActivationKernel<X, T, kWide> : BiasActivationKernel<X, T, 1>,
         ElementGrid(args.rows, args.cols, wide ? kWide : 1), dim3(kThreads), 0, args);
}

template <typename T>
void LaunchGateUp(const LaunchContext& context, const GateUpArgs& args) {
  // The half that begins at column `cols` is aligned when cols is a multiple of kWide.
  const bool wide = IsAligned(args.wide, args.wide_stride, args.dtype) &&
                    IsAligned(args.y, args.y_stride, args.dtype) && args.cols % kWide == 0;
  Launch(context, wide ? GateUpKernel<T, kWide> : GateUpKernel<T, 1>,
         ElementGrid(args.rows, args.cols, wide ? kWide : 1), dim3(kThreads), 0, args);
}

}  // namespace

void EmbedRows(const LaunchContext& context, const DeviceStep& step, const EmbeddingTable& table,
               const ActivationRows& out) {
  if (step.rows == 0) return;
  Dispatch(out.dtype, [&](auto type) {
    LaunchEmbed<decltype(type), /*kAdd=*/false>(context, step.token_ids, step.rows, table, out);
  });
}

void AddEmbeddingRows(const LaunchContext& context, const DeviceStep& step,
                      const EmbeddingTable& table, const ActivationRows& x) {
  if (step.rows == 0) return;
  Dispatch(x.dtype, [&](auto type) {
    LaunchEmbed<decltype(type), /*kAdd=*/true>(context, step.table_rows, step.rows, table, x);
  });
}

void GateUp(const LaunchContext& context, const GateUpArgs& args) {
  if (args.rows == 0) return;
  Dispatch(args.dtype, [&](auto type) { LaunchGateUp<decltype(type)>(context, args); });
}

void AddBiasActivation(const LaunchContext& context, const BiasActivationArgs& args) {
  if (args.rows == 0) return;
  SLUICE_CHECK(args.x_dtype == args.dtype || args.x_dtype == DType::kF32) << NameOf(args.x_dtype);
  Dispatch(args.dtype, [&](auto type) {
    using T = decltype(type);
    if (args.x_dtype == DType::kF32) {
      LaunchBiasActivation<float, T>(context, args);
    } else {
      LaunchBiasActivation<T, T>(context, args);
    }
  });
}

void RopeTable(const LaunchContext& context, const RopeTableArgs& args) {
  const int64_t count = args.rows * args.half_dim;
  if (count == 0) return;
  const int64_t blocks = std::min<int64_t>(CeilDiv(count, kThreads), 8 * context.num_sms);
  Launch(context, RopeTableKernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, args);
}

}  // namespace sluice
