// What the two samplers share in device code: the order of candidates as integers, and how a result
// is written. Included by .cu files only.
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
