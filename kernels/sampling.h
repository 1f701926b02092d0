// What Backend::Sample takes and gives for one row of logits. Plain data; spans point into memory
// of the caller.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/types/span.h"

namespace sluice {

// How one sampled row is turned into a token id: a function of (logits, these fields) alone, so
// neither batch mates nor the moment change it. Order: repetition, presence and frequency
// penalties, min_tokens mask, temperature, top_k, top_p, min_p, then a draw with Philox 4x32-10
// keyed by (seed, choice) at counter (token_index). temperature 0 = argmax, ties to the lowest id.
struct SamplingRow {
  int64_t row = 0;                  // Row of the logits
  float temperature = 0.0f;         // >= 0
  int32_t top_k = 0;                // 0 = off
  float top_p = 1.0f;               // (0, 1]
  float min_p = 0.0f;               // [0, 1]
  float repetition_penalty = 1.0f;  // > 0; over prompt and output, as in transformers
  float presence_penalty = 0.0f;    // over output tokens, as in vLLM
  float frequency_penalty = 0.0f;   // over output tokens
  uint64_t seed = 0;
  uint32_t choice = 0;
  uint32_t token_index = 0;               // 0 for the first sampled token
  int32_t num_logprobs = -1;              // -1 none, 0 the sampled token only, n top n besides
  absl::Span<const uint32_t> prompt_ids;  // For repetition_penalty
  absl::Span<const uint32_t> output_ids;  // Sampled so far
  absl::Span<const uint32_t> banned_ids;  // Never sampled: eos and stop ids below min_tokens
};

struct TokenLogprob {
  uint32_t token_id = 0;
  float logprob =
      0.0f;  // Natural log of softmax of the raw logits, before penalties and temperature
};

struct SampledToken {
  uint32_t token_id = 0;
  float logprob = 0.0f;           // Set when num_logprobs >= 0
  std::vector<TokenLogprob> top;  // Highest first, num_logprobs of them
  bool finite = true;  // False: a logit was NaN or infinite; token_id is then meaningless
};

}  // namespace sluice
