// A StageEngine for tests of the protocol: each stage adds 1 to every word of a row, so that the
// token that comes out tells which stages a row has passed, and a row that was damaged on its way
// is noticed.
#pragma once

#include <cstring>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>

#include "worker/engine/stage_engine.h"

namespace sluice::worker {

// With `stages` stages, the token sampled for an input id t is t + stages.
class FakeEngine final : public StageEngine {
 public:
  // `words`: uint32 words of a row.
  FakeEngine(internal::v1::ShardAssignment assignment, int64_t words)
      : assignment_(std::move(assignment)), words_(words) {}

  absl::Status Reconfigure(const internal::v1::ShardAssignment& assignment) override {
    assignment_ = assignment;
    sampled_.clear();
    ++reconfigured;
    return absl::OkStatus();
  }
  int64_t hidden_row_bytes() const override { return words_ * 4; }
  DType hidden_dtype() const override { return DType::kI32; }
  void AddSampled(const internal::v1::TokenFrame& frame) override {
    for (const auto& token : frame.tokens()) {
      sampled_[{frame.step(), token.seq_id()}] = token.token_id();
    }
  }
  bool HasInputs(const internal::v1::StepHeader& header) const override {
    for (const auto& sequence : header.sequences()) {
      if (sequence.sampled_by_step() != 0 &&
          sampled_.count({sequence.sampled_by_step(), sequence.seq_id()}) == 0) {
        return false;
      }
    }
    return true;
  }

  absl::Status Step(const StepInput& input, StepOutput* output) override {
    const bool first = assignment_.stage() == 0;
    const bool last = assignment_.stage() + 1 == assignment_.stages();
    std::vector<uint32_t> rows;
    if (first) {
      for (const auto& sequence : input.header->sequences()) {
        AppendIds(sequence, &rows);
      }
    } else {
      rows.resize(input.hidden_bytes / 4);
      std::memcpy(rows.data(), input.hidden_states, input.hidden_bytes);
    }
    for (uint32_t& word : rows) {
      ++word;
    }
    for (size_t i = 0; i < rows.size(); ++i) {
      if (rows[i] != rows[i - i % words_]) {
        return absl::InternalError("a row was damaged");
      }
      if (rows[i] == kPoison) {
        return absl::InvalidArgumentError("poisoned row");
      }
    }
    if (last) {
      Sample(*input.header, rows, &output->tokens);
    } else {
      output->hidden_states.resize(rows.size() * 4);
      std::memcpy(output->hidden_states.data(), rows.data(), rows.size() * 4);
    }
    return absl::OkStatus();
  }

  StageMemory memory() const override { return {100, 200, 300}; }
  const internal::v1::ShardAssignment& assignment() const override { return assignment_; }

  std::vector<float> LogitsForTest() override { return {}; }

  static constexpr uint32_t kPoison = 666;  // A row of it fails the step
  int reconfigured = 0;

 private:
  void AppendIds(const internal::v1::SequenceSlice& sequence, std::vector<uint32_t>* rows) {
    for (uint32_t i = 0; i < sequence.num_tokens(); ++i) {
      const uint32_t id = sequence.sampled_by_step() != 0
                              ? sampled_.at({sequence.sampled_by_step(), sequence.seq_id()})
                              : sequence.token_ids(static_cast<int>(i));
      rows->insert(rows->end(), words_, id);
    }
  }
  void Sample(const internal::v1::StepHeader& header, const std::vector<uint32_t>& rows,
              internal::v1::TokenFrame* frame) {
    int64_t row = 0;
    for (const auto& sequence : header.sequences()) {
      row += sequence.num_tokens();
      if (sequence.sample()) {
        auto* token = frame->add_tokens();
        token->set_seq_id(sequence.seq_id());
        token->set_token_index(sequence.token_index());
        token->set_token_id(rows[(row - 1) * words_]);
        sampled_[{header.step(), sequence.seq_id()}] = token->token_id();
      }
    }
  }

  internal::v1::ShardAssignment assignment_;
  const int64_t words_;
  std::map<std::pair<uint64_t, uint64_t>, uint32_t> sampled_;
};

// Wants one tensor "layers.<i>.weight" for each layer of the assignment.
class FakeLoader final : public StageEngine::Loader {
 public:
  FakeLoader(internal::v1::ShardAssignment assignment, int64_t words)
      : assignment_(std::move(assignment)), words_(words) {}
  absl::Status Add(const std::string& name, QuantizedMatrix tensor) override {
    return names_.insert(name).second ? absl::OkStatus()
                                      : absl::InvalidArgumentError(name + " came twice");
  }
  absl::StatusOr<std::unique_ptr<StageEngine>> Finish() override {
    for (uint32_t i = assignment_.layers().begin(); i < assignment_.layers().end(); ++i) {
      if (names_.count("layers." + std::to_string(i) + ".weight") == 0) {
        return absl::FailedPreconditionError("layer " + std::to_string(i) + " is missing");
      }
    }
    return std::unique_ptr<StageEngine>(new FakeEngine(assignment_, words_));
  }

 private:
  const internal::v1::ShardAssignment assignment_;
  const int64_t words_;
  std::set<std::string> names_;
};

// A step of one sequence with the given ids; `sampled_by` instead of ids when not 0.
inline internal::v1::StepHeader OneSequenceStep(uint64_t epoch, uint64_t step,
                                                const std::vector<uint32_t>& ids,
                                                uint64_t sampled_by = 0) {
  internal::v1::StepHeader header;
  header.set_epoch(epoch);
  header.set_step(step);
  auto* sequence = header.add_sequences();
  sequence->set_seq_id(1);
  sequence->set_sample(true);
  sequence->set_token_index(static_cast<uint32_t>(step - 1));
  sequence->set_num_tokens(sampled_by != 0 ? 1 : static_cast<uint32_t>(ids.size()));
  sequence->set_sampled_by_step(sampled_by);
  *sequence->mutable_token_ids() = {ids.begin(), ids.end()};
  return header;
}

inline internal::v1::ShardAssignment FakeAssignment(uint32_t stage, uint32_t stages) {
  internal::v1::ShardAssignment assignment;
  assignment.set_model_digest("digest");
  assignment.set_stage(stage);
  assignment.set_stages(stages);
  assignment.mutable_layers()->set_begin(stage * 2);
  assignment.mutable_layers()->set_end(stage * 2 + 2);
  assignment.set_has_embedding(stage == 0);
  assignment.set_has_head(stage + 1 == stages);
  assignment.set_max_batch_tokens(64);
  assignment.set_max_batch_size(8);
  return assignment;
}

}  // namespace sluice::worker
