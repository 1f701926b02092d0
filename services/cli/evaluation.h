// What a running server's model is worth: how well it predicts a text, how fast, in how much memory.
#pragma once

#include <atomic>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "services/cli/perplexity.h"

namespace sluice::cli {

struct EvalOptions {
  std::string file;     // The text
  uint32_t window = 0;  // 0: 2048, or the longest prompt if that is less
  uint32_t stride = 0;  // 0: a quarter of the window
  // Answers of 64 tokens to the text's first 512, one sequence; the fastest counts. 0: no speeds.
  uint32_t speed_runs = 3;
};

struct EvalResult {
  std::string model;
  std::string format;  // "none", "gptq v1, g64", "bitsandbytes nf4+nested, g64", ...
  uint64_t weight_bytes = 0;
  Perplexity perplexity;
  size_t window = 0, stride = 0;
  uint64_t prompt_tokens = 0;     // Sent to be scored, the overlap of windows included
  double seconds = 0;             // For them, their scores included
  double best_prefill_speed = 0;  // Prompt tokens/s until the first token; 0: not measured
  double best_decode_speed = 0;   // Tokens/s after the first token; 0: not measured
};

// Blocks. `show` gets a line now and then; `stop` ends it soon: CANCELLED.
absl::StatusOr<EvalResult> Evaluate(const std::string& address, const EvalOptions& options,
                                    const std::function<void(const std::string&)>& show,
                                    const std::atomic<bool>& stop);

// A table for people, the differences to the first row in the last column.
std::string EvalTable(const std::vector<EvalResult>& results);

}  // namespace sluice::cli
