// Answer: one of the n answers of a request, from sampled tokens to messages: text, stop strings,
// log-probabilities. One thread. The tokenizer must outlive it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "proto/sluice/internal/v1/shard.pb.h"
#include "proto/sluice/v1/generation.pb.h"
#include "services/controller/sequence.h"
#include "services/controller/stop_matcher.h"
#include "services/text/tokenizer.h"

namespace sluice::controller {

// How the tokens of a request become its answer.
struct OutputSpec {
  std::vector<std::string> stop;
  bool include_stop = false;  // Stop string or end token stays in the text
  bool skip_special_tokens = true;
  uint32_t min_tokens = 0;    // Stop strings are not looked for before
  int32_t num_logprobs = -1;  // -1: none
  std::string echo_text;      // Put before each answer; empty: none
  std::vector<uint32_t> echo_ids;
};

// Appends `next` to `message`, both of the same answer. Nothing is lost: a slow reader gets fewer,
// larger messages.
void MergeMessage(v1::StreamGenerateResponse&& next, v1::StreamGenerateResponse* message);

// One entry of logprobs.
v1::PositionLogprobs ToLogprobs(const internal::v1::SampledToken& token,
                                const text::Tokenizer& tokenizer);

class Answer {
 public:
  // `spec` must outlive the answer.
  Answer(const text::Tokenizer* tokenizer, const OutputSpec* spec, uint32_t index);

  // Appends a token to `message`. True: a stop string is complete and the answer ends here;
  // matched_stop is set. `ends_text`: an end id, which is shown only with include_stop.
  bool Add(const internal::v1::SampledToken& token, bool ends_text,
           v1::StreamGenerateResponse* message);

  // Writes finish_reason and the text that was held back. Once, after the last Add.
  void Finish(EndReason reason, v1::StreamGenerateResponse* message);

  uint32_t num_tokens() const { return num_tokens_; }
  bool finished() const { return finished_; }

 private:
  const text::Tokenizer* tokenizer_;
  const OutputSpec* spec_;
  uint32_t index_;
  text::StreamDecoder decoder_;
  StopMatcher matcher_;
  uint32_t num_tokens_ = 0;
  bool finished_ = false;
};

}  // namespace sluice::controller
