// What the samplers share in device code: the order of candidates as integers, their weights, and
// how a result is written. Included by .cu files only.
#pragma once

#include <cstdint>

#include "kernels/cuda/sampling.h"

namespace sluice {

// A float as an integer of the same order; both zeros are one.
__device__ __forceinline__ uint32_t OrderOf(float value) {
  const uint32_t bits = __float_as_uint(value + 0.0f);
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}
__device__ __forceinline__ float ValueOf(uint32_t order) {
  return __uint_as_float(order ^ ((order >> 31) - 1u | 0x80000000u));
}

// A candidate as an integer: larger is earlier in order, a higher logit or a lower id at the same.
__device__ __forceinline__ uint64_t KeyOf(float value, uint32_t id) {
  return static_cast<uint64_t>(OrderOf(value)) << 32 | ~id;
}
__device__ __forceinline__ uint32_t IdOf(uint64_t key) { return ~static_cast<uint32_t>(key); }
__device__ __forceinline__ float LogitOf(uint64_t key) {
  return ValueOf(static_cast<uint32_t>(key >> 32));
}

__device__ __forceinline__ bool IsFinite(float value) {
  return (__float_as_uint(value) & 0x7f800000u) != 0x7f800000u;
}
// The key of what is not finite: above all others.
constexpr uint64_t kBrokenKey = ~uint64_t{0};

__device__ __forceinline__ uint64_t WarpMax(uint64_t value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    const uint64_t other = __shfl_xor_sync(~0u, value, step);
    value = other > value ? other : value;
  }
  return value;
}

__device__ __forceinline__ uint64_t WarpSum(uint64_t value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
  return value;
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

// The first lane whose value exceeds left; -1 for none.
__device__ __forceinline__ int FirstAbove(uint64_t value, uint64_t left) {
  return __ffs(static_cast<int>(__ballot_sync(~0u, value > left))) - 1;
}

constexpr float kUnit = 0x1p44f;  // Weights are counted in 1 / kUnit; 2^18 of them fit 64 bits

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

// The scratch of max_rows rows, in this order; see SamplingScratchBytes.
struct SamplingScratchView {
  uint64_t* keys;     // [num_rows]: the highest so far, of ArgmaxRows
  uint32_t* tickets;  // [num_rows]: blocks that are done
  uint32_t* counts;   // [num_rows, vocab]: of each id among the outputs
  float* values;      // [num_rows, vocab]: the logits as penalties and bans leave them
  int64_t vocab;

  __host__ __device__ SamplingScratchView(void* scratch, int64_t num_rows, int64_t vocab_size)
      : keys(static_cast<uint64_t*>(scratch)),
        tickets(reinterpret_cast<uint32_t*>(keys + num_rows)),
        counts(tickets + num_rows),
        values(reinterpret_cast<float*>(counts + num_rows * vocab_size)),
        vocab(vocab_size) {}
};

// One thread writes the head of row `index`'s result and hands the id on.
__device__ __forceinline__ void WriteToken(const SampleArgs& args, const DeviceSamplingRow& row,
                                           int64_t index, uint32_t token_id, bool finite) {
  DeviceSampledToken& out = args.out[index];
  if (!finite) token_id = 0;
  out.token_id = token_id;
  out.finite = finite ? 1 : 0;
  if (row.append_at >= 0) args.ids[row.append_at] = token_id;
  if (row.feed_at >= 0) args.token_ids[row.feed_at] = token_id;
}

}  // namespace sluice
