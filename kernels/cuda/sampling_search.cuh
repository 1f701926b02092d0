// The block-wide search of SampleRows: sums, scans, and the candidate at which a sum over candidates
// in order crosses a number, found without sorting: a histogram over the distance from the highest
// logit, then a ranking of the few candidates of the bin where the sum crosses. Included by
// sampling.cu only.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/cuda/sampling.cuh"

namespace sluice {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kBins = 2048;  // Two a thread
constexpr int kListed = 1024;
constexpr float kBinsPerUnit = 64.0f;  // Of the distance from the highest: 32 units in all
constexpr float kUnit = 0x1p44f;       // Weights are counted in 1 / kUnit; 2^18 of them fit 64 bits

struct Shared {
  uint32_t low[kBins];  // The sums of the bins, 64 bits in two halves
  uint32_t high[kBins];
  uint64_t list[kListed];      // Keys of the crossing bin
  uint64_t measures[kListed];  // What they add
  uint64_t partial[kWarps];
  uint64_t before, found;
  uint32_t count, lowest, highest, bin;
};

// One row at work.
struct Row {
  const SampleArgs& args;
  const DeviceSamplingRow& row;
  float* values;  // [vocab]
  int vocab;
  Shared& shared;
};

// function(id, value) for values [0, vocab) that fall to this thread; several loads in flight.
template <typename Function>
__device__ __forceinline__ void ForValues(const float* values, int vocab,
                                          const Function& function) {
  constexpr int kBatch = 8;
  int begin = threadIdx.x;
  for (; begin + (kBatch - 1) * kThreads < vocab; begin += kBatch * kThreads) {
    float batch[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) batch[j] = values[begin + j * kThreads];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) function(begin + j * kThreads, batch[j]);
  }
  for (; begin < vocab; begin += kThreads) function(begin, values[begin]);
}

// --- The block at large ----------------------------------------------------------------------

__device__ __forceinline__ uint64_t WarpSum(uint64_t value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
  return value;
}

__device__ __forceinline__ uint64_t BlockSum(uint64_t value, Shared& shared) {
  value = WarpSum(value);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared.partial[threadIdx.x / 32] = value;
  __syncthreads();
  return WarpSum(shared.partial[threadIdx.x % 32]);
}

__device__ __forceinline__ uint64_t BlockMax(uint64_t value, Shared& shared) {
  value = WarpMax(value);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared.partial[threadIdx.x / 32] = value;
  __syncthreads();
  return WarpMax(shared.partial[threadIdx.x % 32]);
}

// Sum of the lanes up to this one.
__device__ __forceinline__ uint64_t WarpScan(uint64_t value) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint64_t other = __shfl_up_sync(~0u, value, step);
    if (static_cast<int>(threadIdx.x % 32) >= step) value += other;
  }
  return value;
}

// Sum of measure(id) over [begin, end) for one warp; several at once.
template <typename Measure>
__device__ __forceinline__ uint64_t WarpMeasure(int begin, int end, const Measure& measure) {
  uint64_t sum = 0;
#pragma unroll 4
  for (int i = begin + static_cast<int>(threadIdx.x % 32); i < end; i += 32) sum += measure(i);
  return WarpSum(sum);
}

// The lowest id at which the sum of measure(id) over ids exceeds target(the sum over all), which is
// below the sum over all.
template <typename Measure, typename Target>
__device__ __forceinline__ uint32_t Locate(int vocab, const Measure& measure, const Target& target,
                                           Shared& shared) {
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  uint64_t left = 0;  // Of the target, from `begin` on
  int begin = 0;
  int end = vocab;
  for (bool first = true; first || end - begin > 32; first = false) {
    // A piece a warp; go on with the one that crosses.
    const int piece = (end - begin + kWarps - 1) / kWarps;
    const uint64_t sum =
        WarpMeasure(begin + warp * piece, min(end, begin + (warp + 1) * piece), measure);
    __syncthreads();
    if (lane == 0) shared.partial[warp] = sum;
    __syncthreads();
    const uint64_t scan = WarpScan(shared.partial[lane]);
    if (first) left = target(__shfl_sync(~0u, scan, 31));
    const int crossing = __ffs(static_cast<int>(__ballot_sync(~0u, scan > left))) - 1;
    if (crossing < 0) return end - 1;  // Never: target is below the sum
    if (crossing > 0) left -= __shfl_sync(~0u, scan, crossing - 1);
    begin += crossing * piece;
    end = min(end, begin + piece);
  }
  const uint64_t scan = WarpScan(begin + lane < end ? measure(begin + lane) : 0);
  const int crossing = __ffs(static_cast<int>(__ballot_sync(~0u, scan > left))) - 1;
  return begin + (crossing < 0 ? end - begin - 1 : crossing);
}

// --- Weights ---------------------------------------------------------------------------------

// exp((value - highest) / temperature), at most 1, and the same in units.
class Weighting {
 public:
  __device__ __forceinline__ Weighting(float highest, float temperature) {
    highest_ = highest;
    temperature_ = temperature;
    reciprocal_ = __fdiv_rn(1.0f, temperature);
    is_moderate_ = temperature > 0x1p-20f && temperature < 0x1p20f;
  }

  __device__ __forceinline__ float highest() const { return highest_; }
  __device__ __forceinline__ float temperature() const { return temperature_; }

  __device__ __forceinline__ float operator()(float value) const {
    float distance = value - highest_;
    if (!is_moderate_) return expf(__fdiv_rn(distance, temperature_));
    // The quotient rounded to nearest, without what __fdiv_rn does for extremes: a guess, and a
    // step of Newton's on its exact remainder. Beyond -3e8 the weight is 0 whatever the quotient.
    distance = fmaxf(distance, -3e8f);
    const float guess = __fmul_rn(distance, reciprocal_);
    const float remainder = __fmaf_rn(-guess, temperature_, distance);
    return expf(__fmaf_rn(remainder, reciprocal_, guess));
  }
  __device__ __forceinline__ uint64_t Units(float value) const {
    return __float2ull_rn((*this)(value)*kUnit);
  }

 private:
  float highest_, temperature_, reciprocal_;
  bool is_moderate_;
};

// --- The candidate at which a sum crosses ------------------------------------------------------

// A monotone map of values to bins, higher values first. First by distance from the highest, then,
// when one bin has too many, by the leading bits of the values' order between two of them.
struct Bins {
  float highest = 0, scale = 0;
  uint32_t first = ~0u, last = 0;  // Of the order, when narrowed
  int shift = -1;                  // < 0: not narrowed

  // kBins or more: not in any.
  __device__ uint32_t Of(float value) const {
    if (shift < 0) {
      return static_cast<uint32_t>(fminf((highest - value) * scale, kBins - 1.0f));
    }
    const uint32_t order = OrderOf(value);
    return order > first || order < last ? kBins : (first - order) >> shift;
  }
  __device__ void Narrow(uint32_t low, uint32_t high) {
    first = high;
    last = low;
    shift = max(0, 32 - __clz(static_cast<int>(high - low)) - 11);
  }
};

// What a candidate adds: 1 for top_k, its weight for top_p. -infinity is no candidate.
template <bool kCount>
__device__ __forceinline__ uint64_t MeasureOf(const Weighting& weighting, float value) {
  if constexpr (kCount) return value > -INFINITY ? 1 : 0;
  return weighting.Units(value);
}

__device__ __forceinline__ void AddToBin(Shared& shared, uint32_t bin, uint64_t measure) {
  const auto low = static_cast<uint32_t>(measure);
  const uint32_t before = atomicAdd(&shared.low[bin], low);
  const auto carry = static_cast<uint32_t>(before + low < before);
  const uint32_t high = static_cast<uint32_t>(measure >> 32) + carry;
  if (high != 0) atomicAdd(&shared.high[bin], high);
}

// shared.bin: the bin at which the sum of bins reaches wanted, kBins when none does; shared.before:
// the sum before it.
__device__ __forceinline__ void FindBin(Shared& shared, uint64_t wanted) {
  const auto sum = [&](uint32_t bin) {
    return static_cast<uint64_t>(shared.high[bin]) << 32 | shared.low[bin];
  };
  const uint32_t bin = 2 * threadIdx.x;
  const uint64_t first = sum(bin);
  const uint64_t both = first + sum(bin + 1);
  uint64_t scan = WarpScan(both);
  if (threadIdx.x == 0) shared.bin = kBins;
  if (threadIdx.x % 32 == 31) shared.partial[threadIdx.x / 32] = scan;
  __syncthreads();
  const uint64_t warps = WarpScan(shared.partial[threadIdx.x % 32]);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (warp > 0) scan += __shfl_sync(~0u, warps, warp - 1);
  const uint64_t before = scan - both;
  if (before < wanted && scan >= wanted) {
    const bool in_first = before + first >= wanted;
    shared.bin = in_first ? bin : bin + 1;
    shared.before = in_first ? before : before + first;
  }
  __syncthreads();
}

// The first candidate in order, among those not after `last`, at which the sum of measures reaches a
// number. The whole block works on one.
template <bool kCount>
class Crossing {
 public:
  __device__ Crossing(const Row& row, const Weighting& weighting, uint64_t last)
      : row_(row), shared_(row.shared), weighting_(weighting), last_(last) {
    bins_.highest = weighting.highest();
    bins_.scale = kCount ? kBinsPerUnit : fminf(kBinsPerUnit / weighting.temperature(), 1e30f);
  }

  // The key of the candidate at which the sum reaches wanted (> 0), or 0 when it never does.
  __device__ uint64_t Find(uint64_t wanted) {
    for (;;) {
      FillBins();
      FindBin(shared_, wanted);
      const uint32_t bin = shared_.bin;
      if (bin == kBins) return 0;
      wanted -= shared_.before;
      ListBin(bin);
      if (shared_.count <= kListed) return Rank(wanted);
      if (shared_.lowest == shared_.highest) return Among(shared_.lowest, wanted);
      bins_.Narrow(shared_.lowest, shared_.highest);
    }
  }

 private:
  template <typename Function>
  __device__ void ForCandidates(const Function& function) {
    ForValues(row_.values, row_.vocab, [&](int id, float value) {
      const uint64_t key = KeyOf(value, id);
      if (key < last_) return;
      const uint32_t bin = bins_.Of(value);
      if (bin < kBins) function(key, bin, value);
    });
  }

  __device__ void FillBins() {
    __syncthreads();
    for (int i = threadIdx.x; i < kBins; i += kThreads) shared_.low[i] = shared_.high[i] = 0;
    if (threadIdx.x == 0) {
      shared_.count = shared_.highest = 0;
      shared_.lowest = ~0u;
      shared_.found = 0;
    }
    __syncthreads();
    ForCandidates([&](uint64_t, uint32_t bin, float value) {
      const uint64_t measure = MeasureOf<kCount>(weighting_, value);
      if (measure != 0) AddToBin(shared_, bin, measure);
    });
    __syncthreads();
  }

  // The first kListed of a bin, in any order; the count and the extremes of all of it.
  __device__ void ListBin(uint32_t wanted_bin) {
    ForCandidates([&](uint64_t key, uint32_t bin, float value) {
      if (bin != wanted_bin) return;
      const uint64_t measure = MeasureOf<kCount>(weighting_, value);
      if (measure == 0) return;
      const uint32_t slot = atomicAdd(&shared_.count, 1);
      if (slot < kListed) {
        shared_.list[slot] = key;
        shared_.measures[slot] = measure;
      }
      atomicMin(&shared_.lowest, static_cast<uint32_t>(key >> 32));
      atomicMax(&shared_.highest, static_cast<uint32_t>(key >> 32));
    });
    __syncthreads();
  }

  // Of those in the list.
  __device__ uint64_t Rank(uint64_t wanted) {
    const uint32_t count = shared_.count;
    if (threadIdx.x < count) {
      const uint64_t key = shared_.list[threadIdx.x];
      uint64_t sum = 0;
      for (uint32_t j = 0; j < count; ++j) {
        if (shared_.list[j] >= key) sum += shared_.measures[j];
      }
      if (sum >= wanted && sum - shared_.measures[threadIdx.x] < wanted) shared_.found = key;
    }
    __syncthreads();
    return shared_.found;
  }

  // Of those that share one value: in the order of ids.
  __device__ uint64_t Among(uint32_t order, uint64_t wanted) {
    const float value = ValueOf(order);
    const auto is_one = [&](int i) {
      const uint64_t key = KeyOf(row_.values[i], i);
      return static_cast<uint64_t>(static_cast<uint32_t>(key >> 32) == order && key >= last_);
    };
    const uint64_t each = MeasureOf<kCount>(weighting_, value);
    const uint32_t id = Locate(
        row_.vocab, is_one, [&](uint64_t) { return (wanted - 1) / each; }, shared_);
    return KeyOf(value, id);
  }

  const Row& row_;
  Shared& shared_;
  const Weighting weighting_;
  const uint64_t last_;
  Bins bins_;
};

}  // namespace sluice
