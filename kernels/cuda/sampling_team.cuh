// The blocks that sample one row together: one, or a cluster that reads each other's shared memory.
// Sums, scans, and the id at which a running sum crosses a number. All sums are of integers, so the
// size of a team changes no result. Included by sampling.cu only.
#pragma once

#include <cstdint>

#include "kernels/cuda/sampling.cuh"

namespace sluice {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kBins = 2048;  // Two a thread
constexpr int kListed = 1024;
constexpr int kLargestTeam = 8;  // What every Hopper card takes

struct alignas(16) Shared {
  uint2 bins[kBins];           // Sums of 64 bits: low and high half
  uint64_t list[kListed];      // Keys of candidates of this block's ids
  uint64_t measures[kListed];  // What they add to a sum
  uint64_t all_keys[kListed];  // The same of the whole team
  uint64_t all_measures[kListed];
  uint64_t partial[kWarps];
  uint64_t slots[2][kLargestTeam];
  uint64_t before, found;
  uint32_t count, lowest, highest, bin, located;
};

// One row at work, in one of its blocks: ids [first, last) of the vocabulary.
template <int kTeam>
struct Row {
  const SampleArgs& args;
  const DeviceSamplingRow& row;
  float* values;  // [last - first]
  int first, last;
  int rank;  // Of this block in the team
  Shared& shared;
  int phase = 0;

  __device__ __forceinline__ float& Value(int id) const { return values[id - first]; }
  __device__ __forceinline__ bool IsMine(uint32_t id) const {
    return id >= static_cast<uint32_t>(first) && id < static_cast<uint32_t>(last);
  }

  // Shared memory of another block of the team.
  __device__ __forceinline__ Shared& Of(int other) const {
    if constexpr (kTeam == 1) return shared;
    uint64_t address = reinterpret_cast<uint64_t>(&shared);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm("mapa.u64 %0, %0, %1;" : "+l"(address) : "r"(other));
#endif
    return *reinterpret_cast<Shared*>(address);
  }

  // All threads of the team; what they wrote to shared memory is seen by all.
  __device__ __forceinline__ void Sync() const {
    if constexpr (kTeam == 1) {
      __syncthreads();
    } else {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
      asm volatile(
          "barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
              : "memory");
#endif
    }
  }

  // Lane i gets the value of block i, which is the same in all of its threads; the others get 0.
  __device__ __forceinline__ uint64_t Exchange(uint64_t value) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if constexpr (kTeam == 1) return lane == 0 ? value : 0;
    if (threadIdx.x < kTeam) Of(static_cast<int>(threadIdx.x)).slots[phase][rank] = value;
    Sync();
    const uint64_t theirs = lane < kTeam ? shared.slots[phase][lane] : 0;
    phase ^= 1;  // The next exchange must not overtake the readers of this one
    return theirs;
  }

  __device__ __forceinline__ uint64_t Sum(uint64_t value) {
    value = WarpSum(value);
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared.partial[threadIdx.x / 32] = value;
    __syncthreads();
    value = WarpSum(shared.partial[threadIdx.x % 32]);
    return kTeam == 1 ? value : WarpSum(Exchange(value));
  }

  __device__ __forceinline__ uint64_t Max(uint64_t value) {
    value = WarpMax(value);
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared.partial[threadIdx.x / 32] = value;
    __syncthreads();
    value = WarpMax(shared.partial[threadIdx.x % 32]);
    return kTeam == 1 ? value : WarpMax(Exchange(value));
  }
};

// function(id, value) for the ids [first, last) that fall to this thread, values[0] being that of
// first; several loads in flight.
template <typename Function>
__device__ __forceinline__ void ForValues(const float* values, int first, int last,
                                          const Function& function) {
  constexpr int kBatch = 8;
  const int count = last - first;
  int i = static_cast<int>(threadIdx.x);
  for (; i + (kBatch - 1) * kThreads < count; i += kBatch * kThreads) {
    float batch[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) batch[j] = values[i + j * kThreads];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) function(first + i + j * kThreads, batch[j]);
  }
  for (; i < count; i += kThreads) function(first + i, values[i]);
}

// Copies the lists of all blocks behind each other to shared.all_keys and all_measures; gives their
// length. REQUIRES: at most kListed in all, and row.Sync() after the last entry.
template <int kTeam>
__device__ __forceinline__ uint32_t CollectLists(const Row<kTeam>& row) {
  uint32_t begin = 0;
  for (int i = 0; i < kTeam; ++i) {
    const Shared& other = row.Of(i);
    const uint32_t count = other.count;
    if (threadIdx.x < count) {
      row.shared.all_keys[begin + threadIdx.x] = other.list[threadIdx.x];
      row.shared.all_measures[begin + threadIdx.x] = other.measures[threadIdx.x];
    }
    begin += count;
  }
  __syncthreads();
  return begin;
}

// Splits [begin, end) into a piece a warp; lane i gets the sum of measure(id) over pieces 0 to i.
template <typename Measure>
__device__ __forceinline__ uint64_t PieceScan(int begin, int end, const Measure& measure,
                                              Shared& shared) {
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int piece = (end - begin + kWarps - 1) / kWarps;
  const int last = min(end, begin + (warp + 1) * piece);
  uint64_t sum = 0;
#pragma unroll 4
  for (int id = begin + warp * piece + lane; id < last; id += 32) sum += measure(id);
  sum = WarpSum(sum);
  __syncthreads();
  if (lane == 0) shared.partial[warp] = sum;
  __syncthreads();
  return WarpScan(shared.partial[lane]);
}

// The lowest id at which the sum of measure(id) over ids exceeds target(the sum over all), which is
// below the sum over all.
template <int kTeam, typename Measure, typename Target>
__device__ __forceinline__ uint32_t Locate(Row<kTeam>& row, const Measure& measure,
                                           const Target& target) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  uint64_t scan = PieceScan(row.first, row.last, measure, row.shared);
  const uint64_t blocks = WarpScan(row.Exchange(__shfl_sync(~0u, scan, 31)));
  uint64_t left = target(__shfl_sync(~0u, blocks, 31));
  const int owner = FirstAbove(blocks, left);
  if (owner == row.rank) {  // The block that has the id goes on alone
    if (owner > 0) left -= __shfl_sync(~0u, blocks, owner - 1);
    int begin = row.first;
    int end = row.last;
    for (;;) {
      const int piece = (end - begin + kWarps - 1) / kWarps;
      const int crossing = FirstAbove(scan, left);
      if (crossing > 0) left -= __shfl_sync(~0u, scan, crossing - 1);
      begin += crossing * piece;
      end = min(end, begin + piece);
      if (end - begin <= 32) break;
      scan = PieceScan(begin, end, measure, row.shared);
    }
    scan = WarpScan(begin + lane < end ? measure(begin + lane) : 0);
    const uint32_t id = begin + FirstAbove(scan, left);
    if (threadIdx.x < kTeam) row.Of(static_cast<int>(threadIdx.x)).located = id;
  }
  row.Sync();
  return row.shared.located;
}

}  // namespace sluice
