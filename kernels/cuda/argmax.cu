// ArgmaxRows: several blocks a row, so that one row at batch 1 uses the bandwidth of many
// multiprocessors; the last block of a row writes the result. The highest key wins by an integer
// maximum, whose order does not matter.
#include "kernels/core/check.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/sampling.cuh"

namespace sluice {
namespace {

constexpr int kThreads = 256;
constexpr int kLoads = 4;  // Of 4 floats a thread, all in flight
constexpr int kPerBlock = kThreads * kLoads * 4;

__device__ __forceinline__ uint64_t Checked(float value, uint32_t id) {
  return IsFinite(value) ? KeyOf(value, id) : kBrokenKey;
}

// The highest key of elements [begin, min(begin + kPerBlock, vocab)) that falls to this thread.
__device__ uint64_t BestOfThread(const float* logits, int begin, int vocab) {
  uint64_t best = 0;
  const auto take = [&best](float value, int id) {
    const uint64_t key = Checked(value, static_cast<uint32_t>(id));
    best = key > best ? key : best;
  };
  if (reinterpret_cast<uintptr_t>(logits + begin) % 16 == 0) {
    float values[kLoads][4];
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      const int id = begin + (j * kThreads + static_cast<int>(threadIdx.x)) * 4;
      if (id + 4 <= vocab) {
        *reinterpret_cast<float4*>(values[j]) = *reinterpret_cast<const float4*>(logits + id);
      } else {
        for (int i = 0; i < 4; ++i) values[j][i] = id + i < vocab ? logits[id + i] : 0.0f;
      }
    }
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      const int id = begin + (j * kThreads + static_cast<int>(threadIdx.x)) * 4;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (id + i < vocab) take(values[j][i], id + i);
      }
    }
    return best;
  }
#pragma unroll
  for (int j = 0; j < kLoads * 4; ++j) {
    const int id = begin + j * kThreads + static_cast<int>(threadIdx.x);
    if (id < vocab) take(logits[id], id);
  }
  return best;
}

// Blocks (parts, rows).
__global__ void __launch_bounds__(kThreads) ArgmaxKernel(const SampleArgs args) {
  __shared__ uint64_t warps[kThreads / 32];
  LetNextStart();
  WaitForPrevious();
  const int64_t index = blockIdx.y;
  const DeviceSamplingRow& row = args.rows[index];
  uint64_t best = WarpMax(
      BestOfThread(args.logits + row.row * args.stride, blockIdx.x * kPerBlock, args.vocab));
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = best;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (const uint64_t other : warps) best = other > best ? other : best;
  if (gridDim.x > 1) {
    const SamplingScratchView scratch(args.scratch, args.num_rows, args.vocab);
    auto* key = reinterpret_cast<unsigned long long*>(&scratch.keys[index]);  // NOLINT: atomicMax's
    atomicMax(key, best);
    __threadfence();
    if (atomicAdd(&scratch.tickets[index], 1) != gridDim.x - 1) return;
    __threadfence();
    best = atomicExch(key, 0);
    scratch.tickets[index] = 0;
  }
  WriteToken(args, row, index, IdOf(best), best != kBrokenKey);
  args.out[index].num_top = 0;
}

}  // namespace

void ArgmaxRows(const LaunchContext& context, const SampleArgs& args) {
  if (args.num_rows == 0) return;
  SLUICE_CHECK(args.vocab > 0) << args.vocab;
  const int parts = (args.vocab + kPerBlock - 1) / kPerBlock;
  Launch(context, ArgmaxKernel, dim3(parts, args.num_rows), dim3(kThreads), 0, args);
}

}  // namespace sluice
