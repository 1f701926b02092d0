// What the scheduler knows about a request and about each of its answers. Plain data, owned by the
// scheduler's thread.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "proto/sluice/internal/v1/shard.pb.h"

namespace sluice::controller {

// Of the monotonic clock: timers never depend on the wall clock.
using TimePoint = std::chrono::steady_clock::time_point;

enum class EndReason { kStop, kLength, kCancelled };

// A request that has been checked: the scheduler trusts it.
struct RequestSpec {
  std::vector<uint32_t> prompt;  // At least one id
  uint32_t max_tokens = 1;       // >= 1; prompt + max_tokens <= max_model_len
  uint32_t n = 1;                // Answers
  internal::v1::SamplingParams
      sampling;  // `choice` is set for each answer; prompt scores are asked for answer 0 only
  std::vector<uint32_t> end_ids;  // End-of-text and stop ids, sorted
  TimePoint deadline = TimePoint::max();
};

// One answer: a token stream that is being generated.
struct Sequence {
  uint64_t handle = 0;  // Of its request
  uint32_t choice = 0;
  const RequestSpec* spec = nullptr;
  uint64_t seq_id = 0;  // 0: not admitted
  std::vector<uint32_t> blocks;
  uint32_t prompt_sent = 0;       // Prompt tokens that are in a step
  uint32_t samples_sent = 0;      // Tokens that a sent step samples: the next has this index
  uint64_t last_sample_step = 0;  // Step that samples the newest of them
  std::vector<uint32_t>
      tokens;  // Log of what came back: index -> id, dense; written before anything is shown
  bool ended = false;

  bool PromptDone() const { return prompt_sent == spec->prompt.size(); }
  // Tokens that were asked for and are not back.
  uint32_t outstanding() const { return samples_sent - static_cast<uint32_t>(tokens.size()); }
  // A decode can be sent: its input is known, or is what a step in flight samples.
  bool CanDecode() const {
    return PromptDone() && samples_sent >= 1 && samples_sent < spec->max_tokens &&
           outstanding() < 2;
  }
};

}  // namespace sluice::controller
