// The candidate at which a sum over candidates, highest first, crosses a number: the edge of top_k
// (each counts 1) and of top_p (each counts its weight). Found without sorting, by a histogram over
// the distance from the highest logit and a ranking of the few candidates of the bin where the sum
// crosses. Included by sampling.cu only.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/cuda/sampling_team.cuh"

namespace sluice {

constexpr float kBinsPerUnit = 64.0f;  // Of the distance from the highest: 32 units in all

// A monotone map of values to bins, higher values first. First by distance from the highest, then,
// when one bin has too many, by the leading bits of the values' order between two of them.
struct Bins {
  float highest = 0, scale = 0;
  uint32_t first = ~0u, last = 0;  // Of the order, when narrowed
  int shift = -1;                  // < 0: not narrowed

  // kBins or more: not in any.
  __device__ __forceinline__ uint32_t Of(float value) const {
    if (shift < 0) return static_cast<uint32_t>(fminf((highest - value) * scale, kBins - 1.0f));
    const uint32_t order = OrderOf(value);
    return order > first || order < last ? kBins : (first - order) >> shift;
  }
  __device__ __forceinline__ void Narrow(uint32_t low, uint32_t high) {
    first = high;
    last = low;
    shift = max(0, 32 - __clz(static_cast<int>(high - low)) - 11);
  }
};

// Exact whatever the order: low and high half, with the carry of just this addition.
__device__ __forceinline__ void AddToBin(uint2& bin, uint64_t measure) {
  const auto low = static_cast<uint32_t>(measure);
  const uint32_t before = atomicAdd(&bin.x, low);
  const auto carry = static_cast<uint32_t>(before + low < before);
  const uint32_t high = static_cast<uint32_t>(measure >> 32) + carry;
  if (high != 0) atomicAdd(&bin.y, high);
}

// The first candidate in order, among those not after `last`, at which the sum of measures reaches a
// number. The whole team works on one.
template <int kTeam, bool kCount>
class Crossing {
 public:
  __device__ __forceinline__ Crossing(Row<kTeam>& row, const Weighting& weighting, uint64_t last)
      : row_(row), shared_(row.shared), weighting_(weighting), last_(last) {
    bins_.highest = weighting.highest();
    bins_.scale = kCount ? kBinsPerUnit : fminf(kBinsPerUnit / weighting.temperature(), 1e30f);
  }

  // The key of the candidate at which the sum reaches wanted (> 0), or 0 when it never does.
  __device__ uint64_t Find(uint64_t wanted) {
    for (;;) {
      FillBins();
      FindBin(wanted);
      const uint32_t bin = shared_.bin;
      if (bin == kBins) return 0;
      wanted -= shared_.before;
      ListBin(bin);
      uint32_t count = 0;
      uint32_t lowest = ~0u;
      uint32_t highest = 0;
      for (int i = 0; i < kTeam; ++i) {
        const Shared& other = row_.Of(i);
        count += other.count;
        lowest = min(lowest, other.lowest);
        highest = max(highest, other.highest);
      }
      if (count <= kListed) return Rank(wanted);
      if (lowest == highest) return Among(lowest, wanted);
      bins_.Narrow(lowest, highest);
    }
  }

 private:
  // 1 for top_k, the weight for top_p. -infinity is no candidate.
  __device__ __forceinline__ uint64_t MeasureOf(float value) const {
    if constexpr (kCount) return value > -INFINITY ? 1 : 0;
    return weighting_.Units(value);
  }

  template <typename Function>
  __device__ __forceinline__ void ForCandidates(const Function& function) {
    ForValues(row_.values, row_.first, row_.last, [&](int id, float value) {
      const uint64_t key = KeyOf(value, id);
      if (key < last_) return;
      const uint32_t bin = bins_.Of(value);
      if (bin < kBins) function(key, bin, value);
    });
  }

  __device__ __forceinline__ void FillBins() {
    row_.Sync();
    for (int i = threadIdx.x; i < kBins; i += kThreads) shared_.bins[i] = make_uint2(0, 0);
    if (threadIdx.x == 0) {
      shared_.count = shared_.highest = 0;
      shared_.lowest = ~0u;
      shared_.found = 0;
      shared_.bin = kBins;
    }
    __syncthreads();
    ForCandidates([&](uint64_t, uint32_t bin, float value) {
      const uint64_t measure = MeasureOf(value);
      if (measure != 0) AddToBin(shared_.bins[bin], measure);
    });
    row_.Sync();
  }

  // shared.bin: the bin at which the sum of bins reaches wanted, kBins when none does;
  // shared.before: the sum before it. Each block of the team computes it.
  __device__ __forceinline__ void FindBin(uint64_t wanted) {
    const uint32_t bin = 2 * threadIdx.x;
    uint64_t first = 0;
    uint64_t both = 0;
#pragma unroll
    for (int i = 0; i < kTeam; ++i) {
      const auto two = *reinterpret_cast<const uint4*>(&row_.Of(i).bins[bin]);
      first += static_cast<uint64_t>(two.y) << 32 | two.x;
      both += static_cast<uint64_t>(two.w) << 32 | two.z;
    }
    both += first;
    uint64_t scan = WarpScan(both);
    if (threadIdx.x % 32 == 31) shared_.partial[threadIdx.x / 32] = scan;
    __syncthreads();
    const uint64_t warps = WarpScan(shared_.partial[threadIdx.x % 32]);
    const int warp = static_cast<int>(threadIdx.x) / 32;
    if (warp > 0) scan += __shfl_sync(~0u, warps, warp - 1);
    const uint64_t before = scan - both;
    if (before < wanted && scan >= wanted) {
      const bool in_first = before + first >= wanted;
      shared_.bin = in_first ? bin : bin + 1;
      shared_.before = in_first ? before : before + first;
    }
    __syncthreads();
  }

  // The first kListed of a bin, in any order; the count and the extremes of all of it.
  __device__ __forceinline__ void ListBin(uint32_t wanted_bin) {
    ForCandidates([&](uint64_t key, uint32_t bin, float value) {
      if (bin != wanted_bin) return;
      const uint64_t measure = MeasureOf(value);
      if (measure == 0) return;
      const uint32_t slot = atomicAdd(&shared_.count, 1);
      if (slot < kListed) {
        shared_.list[slot] = key;
        shared_.measures[slot] = measure;
      }
      atomicMin(&shared_.lowest, static_cast<uint32_t>(key >> 32));
      atomicMax(&shared_.highest, static_cast<uint32_t>(key >> 32));
    });
    row_.Sync();
  }

  // Of those in the lists.
  __device__ __forceinline__ uint64_t Rank(uint64_t wanted) {
    const uint32_t count = CollectLists(row_);
    if (threadIdx.x < count) {
      const uint64_t key = shared_.all_keys[threadIdx.x];
      uint64_t sum = 0;
      for (uint32_t j = 0; j < count; ++j) {
        if (shared_.all_keys[j] >= key) sum += shared_.all_measures[j];
      }
      if (sum >= wanted && sum - shared_.all_measures[threadIdx.x] < wanted) shared_.found = key;
    }
    __syncthreads();
    return shared_.found;
  }

  // Of those that share one value: in the order of ids.
  __device__ __forceinline__ uint64_t Among(uint32_t order, uint64_t wanted) {
    const float value = ValueOf(order);
    const auto is_one = [&](int id) {
      const uint64_t key = KeyOf(row_.Value(id), id);
      return static_cast<uint64_t>(static_cast<uint32_t>(key >> 32) == order && key >= last_);
    };
    const uint64_t each = MeasureOf(value);
    return KeyOf(value, Locate(row_, is_one, [&](uint64_t) { return (wanted - 1) / each; }));
  }

  Row<kTeam>& row_;
  Shared& shared_;
  const Weighting weighting_;
  const uint64_t last_;
  Bins bins_;
};

}  // namespace sluice
