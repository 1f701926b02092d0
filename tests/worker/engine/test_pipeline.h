// TestPipeline: the stages of a small model in one process, with hidden states and sampled ids
// handed on as the worker's links do. TestSequence: what a controller knows of a sequence; makes
// its slices.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "tests/worker/engine/small_model.h"
#include "worker/engine/stage_engine.h"

namespace sluice::worker {

// Loads one stage; ends the test program when that fails.
std::unique_ptr<StageEngine> LoadStage(const SmallModel& model,
                                       const internal::v1::ShardAssignment& assignment,
                                       Backend* backend);

// Argmax, no penalties, no log-probabilities.
internal::v1::SamplingParams GreedyParams();

struct TestSequence {
  uint64_t seq_id = 1;
  std::vector<uint32_t> tokens;  // The prompt, then what was sampled
  uint32_t prompt_len = 0;
  internal::v1::SamplingParams sampling = GreedyParams();
  uint32_t pos = 0;
  std::vector<uint32_t> blocks;

  uint32_t num_outputs() const { return static_cast<uint32_t>(tokens.size()) - prompt_len; }
};

TestSequence MakeSequence(uint64_t seq_id, const std::vector<uint32_t>& prompt);

class TestPipeline {
 public:
  using Change = std::function<void(internal::v1::ShardAssignment*)>;

  using Load =
      std::function<std::unique_ptr<StageEngine>(const internal::v1::ShardAssignment&, Backend*)>;

  // The backend of a stage; without one, the CPU's.
  using MakeBackend = std::function<std::unique_ptr<Backend>(size_t stage)>;

  // One stage an assignment, first to last.
  TestPipeline(const std::vector<internal::v1::ShardAssignment>& assignments, const Load& load,
               const MakeBackend& make_backend = nullptr);
  // `change` may alter each stage's assignment before it is loaded.
  TestPipeline(const SmallModel& model, uint32_t stages, const Change& change = nullptr);

  // The next num_tokens tokens of `sequence`, or (ahead_of_step) the one that this step samples.
  // Gives it blocks in an order that is not the pool's.
  internal::v1::SequenceSlice NextSlice(TestSequence* sequence, uint32_t num_tokens, bool sample,
                                        uint64_t ahead_of_step = 0);
  void FreeBlocks(TestSequence* sequence);

  // Runs the step on all stages, first to last; the ring brings the ids to stage 0. Sets
  // header.step when it is 0.
  absl::StatusOr<internal::v1::TokenFrame> Run(internal::v1::StepHeader header);

  // One slice in one step. With `sample`, the sampled id is appended to sequence->tokens.
  internal::v1::TokenFrame RunSlice(TestSequence* sequence, uint32_t num_tokens, bool sample);
  // Prefill in chunks of `chunk` tokens, then greedy or sampled decode until num_outputs tokens are
  // there.
  std::vector<uint32_t> Generate(TestSequence* sequence, uint32_t chunk, uint32_t num_outputs);

  StageEngine& stage(size_t index) { return *engines_[index]; }
  StageEngine& last() { return *engines_.back(); }
  Backend& backend(size_t index) { return *backends_[index]; }
  uint64_t last_step() const { return last_step_; }

 private:
  void AddStage(const internal::v1::ShardAssignment& assignment, const Load& load,
                const MakeBackend& make_backend);

  std::vector<std::unique_ptr<Backend>> backends_;
  std::vector<std::unique_ptr<StageEngine>> engines_;
  std::vector<StageEngine::StepOutput> outputs_;
  std::vector<uint32_t> free_blocks_;
  uint32_t block_size_ = 0;
  uint64_t last_step_ = 0;
};

}  // namespace sluice::worker
