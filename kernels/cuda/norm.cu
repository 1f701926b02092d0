#include <algorithm>

#include "kernels/cuda/element.cuh"
#include "kernels/cuda/elementwise.h"
#include "kernels/cuda/launch.h"

namespace sluice {
namespace {

constexpr int kNormChunks = 2;  // 16-byte loads that a thread keeps in registers
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

template <typename T>
__device__ const T* NormInput(const NormRowsArgs& args) {
  const int64_t row = args.row_index == nullptr ? blockIdx.x : args.row_index[blockIdx.x];
  return static_cast<const T*>(args.x) + row * args.x_stride;
}

// A block a row; any shape. Reads x up to three times, all but the first from cache.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads) NormAnyKernel(const NormRowsArgs args) {
  __shared__ float lanes[2][32];
  LetNextStart();
  WaitForPrevious();
  const T* x = NormInput<T>(args);
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

__device__ void Prefetch(const float* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// A block a row, which lies in registers: cols is a multiple of kWide, at most kNormChunks * kWide
// * blockDim.x, and all rows begin at multiples of 16 bytes.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads) NormWideKernel(const NormRowsArgs args) {
  __shared__ float lanes[2][32];
  LetNextStart();
  const auto chunks = static_cast<int>(args.cols / kWide);
  for (int chunk = threadIdx.x; chunk < chunks; chunk += blockDim.x) {
    if (args.weight != nullptr) Prefetch(args.weight + chunk * kWide);
    if (args.bias != nullptr) Prefetch(args.bias + chunk * kWide);
  }
  WaitForPrevious();
  const T* x = NormInput<T>(args);
  float values[kNormChunks][kWide];
  float sum = 0.0f;
#pragma unroll
  for (int c = 0; c < kNormChunks; ++c) {
    const int chunk = c * blockDim.x + threadIdx.x;
    if (chunk < chunks) Load<kWide>(x + chunk * kWide, values[c]);
    for (int i = 0; i < kWide; ++i) {
      if (chunk >= chunks) values[c][i] = 0.0f;
      sum += values[c][i];
    }
  }
  const auto cols = static_cast<float>(args.cols);
  const float mean = args.kind == NormKind::kLayer ? BlockSum(sum, lanes[0]) / cols : 0.0f;
  float squares = 0.0f;
#pragma unroll
  for (int c = 0; c < kNormChunks; ++c) {
    if (static_cast<int>(c * blockDim.x + threadIdx.x) >= chunks) continue;
    for (int i = 0; i < kWide; ++i) {
      squares += (values[c][i] - mean) * (values[c][i] - mean);
    }
  }
  float inverse = 0.0f;
  if (args.kind != NormKind::kNone) {
    inverse = 1.0f / sqrtf(BlockSum(squares, lanes[1]) / cols + args.eps);
  }
  T* y = static_cast<T*>(args.y) + blockIdx.x * args.y_stride;
  if (args.perm != nullptr) {
    WriteNormalized(args, x, mean, inverse, y);
    return;
  }
#pragma unroll
  for (int c = 0; c < kNormChunks; ++c) {
    const int chunk = c * blockDim.x + threadIdx.x;
    if (chunk >= chunks) continue;
    for (int i = 0; i < kWide; ++i) {
      values[c][i] = Normalized(args, values[c][i], mean, inverse, chunk * kWide + i);
    }
    Write<kWide>(values[c], y + chunk * kWide);
  }
}

template <typename T>
void LaunchNorm(const LaunchContext& context, const NormRowsArgs& args) {
  const bool aligned = IsAligned(args.x, args.x_stride, args.dtype) &&
                       IsAligned(args.y, args.y_stride, args.dtype) && args.cols % kWide == 0;
  const int64_t wide = CeilDiv(args.cols, kWide * kNormChunks);
  const bool fits = aligned && wide <= kMaxThreads;
  const int64_t wanted = fits ? wide : CeilDiv(args.cols, 4);
  const auto threads =
      static_cast<unsigned>(std::clamp<int64_t>(CeilDiv(wanted, 32) * 32, 32, kMaxThreads));
  Launch(context, fits ? NormWideKernel<T> : NormAnyKernel<T>,
         dim3(static_cast<unsigned>(args.rows)), dim3(threads), 0, args);
}

}  // namespace

void NormRows(const LaunchContext& context, const NormRowsArgs& args) {
  if (args.rows == 0) return;
  Dispatch(args.dtype, [&](auto type) { LaunchNorm<decltype(type)>(context, args); });
}

}  // namespace sluice
