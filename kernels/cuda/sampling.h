// From rows of logits to token ids on the device, as kernels/sampling.h defines it; the reference is
// kernels/cpu/sampling.h. Only what DeviceSampledToken holds leaves the device.
//
// Equal to the CPU: penalties, bans, argmax, top_k, ties and the random draw are the same operations
// in the same order. The weights exp((logit - highest) / temperature) differ from the C library's in
// the last place of a float at most, and are summed in 2^-44ths of the highest (exact, so that no
// order of adding matters) where the CPU adds doubles. A different token comes out only when a
// draw, or the edge of top_p, falls between the two sums: about one token in 10 million; and when
// min_p is within a last place of a weight.
//
// Deterministic: nothing depends on other rows, or on the order in which threads run.
#pragma once

#include <cstdint>

namespace sluice {

struct LaunchContext;

inline constexpr int32_t kMaxTopLogprobs = 20;

// Plain data in device memory, one a request. The lists are ids[begin .. begin + num) of
// SampleArgs::ids. For the rest see SamplingRow.
struct DeviceSamplingRow {
  int64_t row = 0;
  uint64_t seed = 0;
  uint32_t choice = 0;
  uint32_t token_index = 0;
  float temperature = 0.0f;
  int32_t top_k = 0;
  float top_p = 1.0f;
  float min_p = 0.0f;
  float repetition_penalty = 1.0f;
  float presence_penalty = 0.0f;
  float frequency_penalty = 0.0f;
  int32_t num_logprobs = -1;  // At most kMaxTopLogprobs
  int32_t prompt_begin = 0;
  int32_t num_prompt = 0;
  int32_t output_begin = 0;
  int32_t num_output = 0;
  int32_t banned_begin = 0;
  int32_t num_banned = 0;
  // Where the sampled id goes besides: to ids[append_at] (the list of outputs of the next step) and
  // to token_ids[feed_at] (the input of the next step); -1 for neither. 0 when not finite.
  int32_t append_at = -1;
  int32_t feed_at = -1;
  int32_t forced_id = -1;  // >= 0: not sampled, only scored (Backend::Score)
  int32_t reserved = 0;
};

struct DeviceSampledToken {
  uint32_t token_id;
  uint32_t finite;  // 0: a logit was NaN or infinite, or nothing is left to sample; token_id is 0
  float logprob;    // Set when num_logprobs >= 0
  uint32_t num_top;
  uint32_t top_ids[kMaxTopLogprobs];  // Highest first
  float top_logprobs[kMaxTopLogprobs];
};

struct SampleArgs {
  const float* logits = nullptr;  // [any, vocab]; only read
  int64_t stride = 0;
  int32_t vocab = 0;
  const DeviceSamplingRow* rows = nullptr;  // [num_rows]
  int32_t num_rows = 0;
  uint32_t* ids = nullptr;
  uint32_t* token_ids = nullptr;      // Null when no row feeds
  DeviceSampledToken* out = nullptr;  // [num_rows]
  // SamplingScratchBytes(num_rows or more, vocab) bytes at a multiple of 16, all zero before the
  // first use; every call leaves it as it must be for the next.
  void* scratch = nullptr;
};

int64_t SamplingScratchBytes(int64_t max_rows, int64_t vocab);

// REQUIRES: all rows have temperature 0, no penalties, no banned ids, no logprobs, no forced id.
void ArgmaxRows(const LaunchContext& context, const SampleArgs& args);

// Any rows. A block a row.
void SampleRows(const LaunchContext& context, const SampleArgs& args);

}  // namespace sluice
