#include <algorithm>

#include "kernels/cuda/element.cuh"
#include "kernels/cuda/elementwise.h"
#include "kernels/cuda/launch.h"

namespace sluice {
namespace {

constexpr int kMaxThreads = 1024;

// Sum over the block, the same in all threads, in a fixed order. `lanes` is shared, of 32 floats;
// it may be used again after the next __syncthreads.
__device__ float BlockSum(float value, float* lanes) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
  const int warps = static_cast<int>(blockDim.x) / 32;
  if (warps == 1) return value;
  if (threadIdx.x % 32 == 0) lanes[threadIdx.x / 32] = value;
  __syncthreads();
  value = static_cast<int>(threadIdx.x % 32) < warps ? lanes[threadIdx.x % 32] : 0.0f;
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
  return value;
}

__device__ float Normalized(const NormRowsArgs& args, float x, float mean, float inverse,
                            int64_t column) {
  if (args.kind == NormKind::kNone) return x;
  float value = (x - mean) * inverse;
  if (args.weight != nullptr) value *= args.weight[column];
  if (args.bias != nullptr) value += args.bias[column];
  return value;
}

// y = norm(x), column by column in the order of perm.
template <typename T>
__device__ void WriteNormalized(const NormRowsArgs& args, const T* x, float mean, float inverse,
                                T* y) {
  for (int64_t i = threadIdx.x; i < args.cols; i += blockDim.x) {
    const int64_t from = args.perm == nullptr ? i : args.perm[i];
    Store(Normalized(args, ToFloat(x[from]), mean, inverse, from), y + i);
  }
}

// What row m of y is made of.
template <typename T>
__device__ const T* NormInput(const NormRowsArgs& args, int64_t m) {
  const int64_t row = args.row_index == nullptr ? m : args.row_index[m];
  return static_cast<const T*>(args.x) + row * args.x_stride;
}

// A block a row; any shape. Reads x up to three times, all but the first from cache.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads) NormAnyKernel(const NormRowsArgs args) {
  __shared__ float lanes[2][32];
  LetNextStart();
  WaitForPrevious();
  const T* x = NormInput<T>(args, blockIdx.x);
  float mean = 0.0f;
  float inverse = 0.0f;
  if (args.kind == NormKind::kLayer) {
    float sum = 0.0f;
    for (int64_t i = threadIdx.x; i < args.cols; i += blockDim.x) sum += ToFloat(x[i]);
    mean = BlockSum(sum, lanes[0]) / static_cast<float>(args.cols);
  }
  if (args.kind != NormKind::kNone) {
    float squares = 0.0f;
    for (int64_t i = threadIdx.x; i < args.cols; i += blockDim.x) {
      const float centred = ToFloat(x[i]) - mean;
      squares += centred * centred;
    }
    squares = BlockSum(squares, lanes[1]);
    inverse = 1.0f / sqrtf(squares / static_cast<float>(args.cols) + args.eps);
  }
  WriteNormalized(args, x, mean, inverse, static_cast<T*>(args.y) + blockIdx.x * args.y_stride);
}

// kWide floats, which may begin at any of them.
__device__ void LoadAny(const float* from, float* to) {
  if (reinterpret_cast<uintptr_t>(from) % 16 == 0) {
    Load<kWide>(from, to);
  } else {
    for (int i = 0; i < kWide; ++i) to[i] = from[i];
  }
}

// A block takes every gridDim.x-th row, which lies in registers: kChunks times kWide columns a
// thread. So do the weights, which are read while earlier kernels still run, and with one chunk the
// bias. cols is a multiple of kWide, and all rows begin at multiples of 16 bytes.
template <typename T, int kChunks>
__global__ void __launch_bounds__(kMaxThreads) NormWideKernel(const NormRowsArgs args) {
  __shared__ float lanes[2][32];
  LetNextStart();
  const auto chunks = static_cast<int>(args.cols / kWide);
  const auto cols = static_cast<float>(args.cols);
  float weight[kChunks][kWide];
  float bias[kWide] = {};
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int chunk = c * blockDim.x + threadIdx.x;
    for (int i = 0; i < kWide; ++i) weight[c][i] = 1.0f;
    if (args.weight != nullptr && chunk < chunks) LoadAny(args.weight + chunk * kWide, weight[c]);
    if (kChunks == 1 && args.bias != nullptr && chunk < chunks) {
      LoadAny(args.bias + chunk * kWide, bias);
    }
  }
  WaitForPrevious();
  for (int64_t m = blockIdx.x; m < args.rows; m += gridDim.x) {
    const T* x = NormInput<T>(args, m);
    float values[kChunks][kWide];
    float sum = 0.0f;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int chunk = c * blockDim.x + threadIdx.x;
      for (int i = 0; i < kWide; ++i) values[c][i] = 0.0f;
      if (chunk < chunks) Load<kWide>(x + chunk * kWide, values[c]);
      for (int i = 0; i < kWide; ++i) sum += values[c][i];
    }
    const float mean = args.kind == NormKind::kLayer ? BlockSum(sum, lanes[0]) / cols : 0.0f;
    float squares = 0.0f;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (static_cast<int>(c * blockDim.x + threadIdx.x) >= chunks) continue;
      for (int i = 0; i < kWide; ++i) squares += (values[c][i] - mean) * (values[c][i] - mean);
    }
    const float inverse = 1.0f / sqrtf(BlockSum(squares, lanes[1]) / cols + args.eps);
    T* y = static_cast<T*>(args.y) + m * args.y_stride;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int chunk = c * blockDim.x + threadIdx.x;
      if (chunk >= chunks) continue;
      if (kChunks > 1 && args.bias != nullptr) LoadAny(args.bias + chunk * kWide, bias);
      for (int i = 0; i < kWide; ++i) {
        values[c][i] = (values[c][i] - mean) * inverse * weight[c][i] + bias[i];
      }
      Write<kWide>(values[c], y + chunk * kWide);
    }
    __syncthreads();  // lanes are used again
  }
}

// A copy of rows, possibly other rows, that lie on 16 bytes.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads) GatherKernel(const NormRowsArgs args) {
  LetNextStart();
  WaitForPrevious();
  const auto* from = reinterpret_cast<const uint4*>(NormInput<T>(args, blockIdx.x));
  auto* to = reinterpret_cast<uint4*>(static_cast<T*>(args.y) + blockIdx.x * args.y_stride);
  for (int64_t i = threadIdx.x; i < args.cols / kWide; i += blockDim.x) to[i] = from[i];
}

template <typename T>
void LaunchNorm(const LaunchContext& context, const NormRowsArgs& args) {
  const bool aligned = IsAligned(args.x, args.x_stride, args.dtype) &&
                       IsAligned(args.y, args.y_stride, args.dtype) && args.cols % kWide == 0 &&
                       args.perm == nullptr;
  const int64_t chunks = CeilDiv(args.cols, kWide);
  // Few rows: more threads a row, to be done sooner. Many: more bytes in flight a thread.
  const int per_thread = chunks <= kMaxThreads && args.rows <= 2 * context.num_sms ? 1 : 2;
  const bool copies = aligned && args.kind == NormKind::kNone;
  const bool fits = aligned && !copies && chunks <= per_thread * kMaxThreads;
  const int64_t wanted = CeilDiv(args.cols, fits || copies ? kWide * per_thread : 4);
  const auto threads =
      static_cast<int>(std::clamp<int64_t>(CeilDiv(wanted, 32) * 32, 32, kMaxThreads));
  // As many blocks as run at once: a block keeps its weights from row to row.
  const int64_t at_once = static_cast<int64_t>(context.num_sms) * (kMaxThreads / threads);
  const int64_t blocks = fits ? std::min(args.rows, at_once) : args.rows;
  auto* kernel = copies ? GatherKernel<T> : NormAnyKernel<T>;
  if (fits) kernel = per_thread == 1 ? NormWideKernel<T, 1> : NormWideKernel<T, 2>;
  Launch(context, kernel, dim3(static_cast<unsigned>(blocks)), dim3(threads), 0, args);
}

}  // namespace

void NormRows(const LaunchContext& context, const NormRowsArgs& args) {
  if (args.rows == 0) return;
  Dispatch(args.dtype, [&](auto type) { LaunchNorm<decltype(type)>(context, args); });
}

}  // namespace sluice
