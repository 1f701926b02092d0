// FakeStage: the workers of a pipeline as the scheduler sees them. Checks each step against the
// contract of shard.proto, as a real stage would, and "samples" tokens that depend on the
// sequence's own tokens alone.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "proto/sluice/internal/v1/shard.pb.h"

namespace sluice::controller {

class FakeStage {
 public:
  struct Limits {
    uint64_t epoch = 1;
    uint32_t stages = 1;
    uint32_t num_blocks = 0;
    uint32_t block_size = 0;
    uint32_t max_batch_tokens = 0;
    uint32_t max_batch_size = 0;
  };

  explicit FakeStage(const Limits& limits) : limits_(limits) {}

  // The token that follows `history` in choice `choice`: 3 .. kVocabSize - 1 (below 3 are control
  // tokens).
  static uint32_t NextToken(const std::vector<uint32_t>& history, uint32_t choice) {
    uint64_t hash = 1469598103934665603ull + choice;
    for (const uint32_t id : history) {
      hash = (hash ^ id) * 1099511628211ull;
    }
    return 3 + static_cast<uint32_t>((hash >> 33) % (kVocabSize - 3));
  }

  // Runs a step. `errors` collects broken rules.
  internal::v1::TokenFrame Run(const internal::v1::StepHeader& step);

  static constexpr uint32_t kVocabSize = 50;
  std::vector<std::string> errors;
  size_t num_tables() const { return sequences_.size(); }

 private:
  struct State {
    std::vector<uint32_t> blocks;
    std::vector<uint32_t> history;  // Prompt and samples, as inputs or sampled
    uint32_t position = 0;          // KV written up to here
    uint32_t prompt_len = 0;
    uint32_t samples = 0;
    uint64_t last_sample_step = 0;
    internal::v1::SamplingParams sampling;
  };

  void Expect(bool ok, const std::string& rule, const internal::v1::StepHeader& step) {
    if (!ok) {
      errors.push_back(absl::StrCat("step ", step.step(), ": ", rule));
    }
  }
  void RunSlice(const internal::v1::SequenceSlice& slice, const internal::v1::StepHeader& step,
                internal::v1::TokenFrame* frame);
  void CheckInputs(const internal::v1::SequenceSlice& slice, const internal::v1::StepHeader& step,
                   State* state);

  Limits limits_;
  uint64_t last_step_ = 0;
  std::map<uint64_t, State> sequences_;
  uint64_t highest_seq_id_ = 0;
};

inline internal::v1::TokenFrame FakeStage::Run(const internal::v1::StepHeader& step) {
  Expect(step.epoch() == limits_.epoch, "epoch", step);
  Expect(step.step() == last_step_ + 1, "step numbers rise by one", step);
  last_step_ = step.step();
  Expect(step.slot() < limits_.stages, "slot below the number of stages", step);
  Expect(static_cast<uint32_t>(step.sequences_size()) <= limits_.max_batch_size, "batch size",
         step);
  for (const uint64_t seq_id : step.released_seq_ids()) {
    Expect(sequences_.erase(seq_id) == 1, "released sequence is known", step);
  }
  internal::v1::TokenFrame frame;
  frame.set_epoch(step.epoch());
  frame.set_step(step.step());
  frame.set_slot(step.slot());
  uint32_t rows = 0;
  for (const internal::v1::SequenceSlice& slice : step.sequences()) {
    rows += slice.num_tokens();
    RunSlice(slice, step, &frame);
  }
  Expect(rows <= limits_.max_batch_tokens, "token budget", step);
  std::map<uint32_t, uint64_t> owner;
  for (const auto& [seq_id, state] : sequences_) {
    for (const uint32_t block : state.blocks) {
      Expect(block < limits_.num_blocks, "block id inside the pool", step);
      Expect(owner.emplace(block, seq_id).second, "a block has one owner", step);
    }
  }
  return frame;
}

inline void FakeStage::RunSlice(const internal::v1::SequenceSlice& slice,
                                const internal::v1::StepHeader& step,
                                internal::v1::TokenFrame* frame) {
  const bool is_new = sequences_.count(slice.seq_id()) == 0;
  State& state = sequences_[slice.seq_id()];
  if (is_new) {
    Expect(slice.seq_id() > highest_seq_id_, "sequence ids are never used again", step);
    highest_seq_id_ = std::max(highest_seq_id_, slice.seq_id());
    Expect(slice.has_sampling() && slice.prompt_len() > 0, "first slice has sampling", step);
    state.sampling = slice.sampling();
    state.prompt_len = slice.prompt_len();
  } else {
    Expect(!slice.has_sampling(), "sampling comes once", step);
  }
  for (const uint32_t block : slice.new_block_ids()) {
    state.blocks.push_back(block);
  }
  Expect(slice.num_tokens() >= 1, "rows", step);
  Expect(slice.start_pos() == state.position, "positions are dense", step);
  CheckInputs(slice, step, &state);
  state.position += slice.num_tokens();
  Expect(state.position <= state.blocks.size() * limits_.block_size, "rows have blocks", step);
  if (slice.sample()) {
    Expect(slice.token_index() == state.samples, "token indices are dense", step);
    Expect(state.position >= state.prompt_len, "sampled after the prompt", step);
    internal::v1::SampledToken* token = frame->add_tokens();
    token->set_seq_id(slice.seq_id());
    token->set_token_index(state.samples++);
    token->set_token_id(NextToken(state.history, state.sampling.choice()));
    state.history.push_back(token->token_id());
    state.last_sample_step = step.step();
  }
}

inline void FakeStage::CheckInputs(const internal::v1::SequenceSlice& slice,
                                   const internal::v1::StepHeader& step, State* state) {
  if (slice.sampled_by_step() != 0) {
    Expect(slice.num_tokens() == 1 && slice.token_ids().empty(), "one row runs ahead", step);
    Expect(slice.sampled_by_step() == state->last_sample_step, "runs ahead of its last sample",
           step);
    return;
  }
  Expect(static_cast<uint32_t>(slice.token_ids_size()) == slice.num_tokens(), "ids", step);
  for (int i = 0; i < slice.token_ids_size(); ++i) {
    const size_t position = state->position + static_cast<size_t>(i);
    if (position < state->prompt_len) {
      state->history.push_back(slice.token_ids(i));
    } else {
      Expect(position < state->history.size() && state->history[position] == slice.token_ids(i),
             "id of the last sample", step);
    }
  }
}

}  // namespace sluice::controller
