#include "tests/worker/engine/test_pipeline.h"

#include <algorithm>
#include <random>

#include "kernels/core/check.h"

namespace sluice::worker {

using internal::v1::SamplingParams;
using internal::v1::SequenceSlice;
using internal::v1::ShardAssignment;
using internal::v1::StepHeader;
using internal::v1::TokenFrame;

std::unique_ptr<StageEngine> LoadStage(const SmallModel& model, const ShardAssignment& assignment,
                                       Backend* backend) {
  auto loader = StageEngine::NewLoader(assignment, backend);
  SLUICE_CHECK(loader.ok()) << loader.status();
  for (const std::string& name : model.NamesFor(assignment)) {
    const absl::Status status = (*loader)->Add(name, ToMatrix(model.at(name)));
    SLUICE_CHECK(status.ok()) << status;
  }
  auto engine = (*loader)->Finish();
  SLUICE_CHECK(engine.ok()) << engine.status();
  return *std::move(engine);
}

SamplingParams GreedyParams() {
  SamplingParams params;
  params.set_top_p(1);
  params.set_repetition_penalty(1);
  params.set_num_logprobs(-1);
  params.set_num_prompt_logprobs(-1);
  return params;
}

TestSequence MakeSequence(uint64_t seq_id, const std::vector<uint32_t>& prompt) {
  TestSequence sequence;
  sequence.seq_id = seq_id;
  sequence.tokens = prompt;
  sequence.prompt_len = static_cast<uint32_t>(prompt.size());
  return sequence;
}

TestPipeline::TestPipeline(const std::vector<ShardAssignment>& assignments, const Load& load,
                           const MakeBackend& make_backend)
    : outputs_(assignments.size()) {
  for (const ShardAssignment& assignment : assignments) AddStage(assignment, load, make_backend);
}

TestPipeline::TestPipeline(const SmallModel& model, uint32_t stages, const Change& change)
    : outputs_(stages) {
  for (uint32_t stage = 0; stage < stages; ++stage) {
    ShardAssignment assignment = MakeAssignment(model, stage, stages);
    if (change) change(&assignment);
    const Load load = [&model](const ShardAssignment& wanted, Backend* backend) {
      return LoadStage(model, wanted, backend);
    };
    AddStage(assignment, load, /*make_backend=*/nullptr);
  }
}

void TestPipeline::AddStage(const ShardAssignment& assignment, const Load& load,
                            const MakeBackend& make_backend) {
  if (make_backend != nullptr) {
    backends_.push_back(make_backend(engines_.size()));
  } else {
    const int num_threads = 1 + static_cast<int>(engines_.size() % 2);  // They must change no bit
    auto backend = MakeCpuBackend(num_threads);
    SLUICE_CHECK(backend.ok()) << backend.status();
    backends_.push_back(*std::move(backend));
  }
  engines_.push_back(load(assignment, backends_.back().get()));
  block_size_ = assignment.block_size();
  free_blocks_.resize(assignment.num_blocks());
  for (uint32_t i = 0; i < free_blocks_.size(); ++i) free_blocks_[i] = i;
  std::shuffle(free_blocks_.begin(), free_blocks_.end(), std::mt19937(assignment.stages()));
}

SequenceSlice TestPipeline::NextSlice(TestSequence* sequence, uint32_t num_tokens, bool sample,
                                      uint64_t ahead_of_step) {
  SequenceSlice slice;
  slice.set_seq_id(sequence->seq_id);
  slice.set_start_pos(sequence->pos);
  slice.set_num_tokens(num_tokens);
  slice.set_sample(sample);
  if (sequence->pos == 0) {
    *slice.mutable_sampling() = sequence->sampling;
    slice.set_prompt_len(sequence->prompt_len);
  }
  if (ahead_of_step != 0) {
    slice.set_sampled_by_step(ahead_of_step);
  } else {
    for (uint32_t i = 0; i < num_tokens; ++i) {
      slice.add_token_ids(sequence->tokens.at(sequence->pos + i));
    }
  }
  sequence->pos += num_tokens;
  if (sample) slice.set_token_index(sequence->pos - sequence->prompt_len);
  while (sequence->blocks.size() * block_size_ < sequence->pos) {
    sequence->blocks.push_back(free_blocks_.back());
    slice.add_new_block_ids(free_blocks_.back());
    free_blocks_.pop_back();
  }
  return slice;
}

void TestPipeline::FreeBlocks(TestSequence* sequence) {
  free_blocks_.insert(free_blocks_.end(), sequence->blocks.begin(), sequence->blocks.end());
  sequence->blocks.clear();
}

absl::StatusOr<TokenFrame> TestPipeline::Run(StepHeader header) {
  if (header.step() == 0) header.set_step(last_step_ + 1);
  const std::vector<uint8_t>* hidden = nullptr;
  for (size_t stage = 0; stage < engines_.size(); ++stage) {
    StageEngine::StepInput input;
    input.header = &header;
    if (hidden != nullptr) {
      input.hidden_states = hidden->data();
      input.hidden_bytes = hidden->size();
    }
    SLUICE_CHECK(engines_[stage]->HasInputs(header)) << "step " << header.step();
    const absl::Status status = engines_[stage]->Step(input, &outputs_[stage]);
    if (!status.ok()) return status;
    hidden = &outputs_[stage].hidden_states;
  }
  last_step_ = header.step();
  const TokenFrame& tokens = outputs_.back().tokens;
  if (engines_.size() > 1) engines_[0]->AddSampled(tokens);
  return tokens;
}

TokenFrame TestPipeline::RunSlice(TestSequence* sequence, uint32_t num_tokens, bool sample) {
  StepHeader header;
  *header.add_sequences() = NextSlice(sequence, num_tokens, sample);
  auto frame = Run(header);
  SLUICE_CHECK(frame.ok()) << frame.status();
  if (sample) sequence->tokens.push_back(frame->tokens(0).token_id());
  return *std::move(frame);
}

std::vector<uint32_t> TestPipeline::Generate(TestSequence* sequence, uint32_t chunk,
                                             uint32_t num_outputs) {
  while (sequence->pos < sequence->prompt_len) {
    const uint32_t count = std::min(chunk, sequence->prompt_len - sequence->pos);
    RunSlice(sequence, count, sequence->pos + count == sequence->prompt_len);
  }
  while (sequence->num_outputs() < num_outputs) RunSlice(sequence, 1, /*sample=*/true);
  return {sequence->tokens.begin() + sequence->prompt_len, sequence->tokens.end()};
}

}  // namespace sluice::worker
