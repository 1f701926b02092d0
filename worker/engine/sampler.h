// Sampler: the end of the last stage. Turns the rows of a step into sampled ids and prompt scores.
//
// A prompt token at position p is scored by the row of position p - 1. When a chunk ends within the
// prompt, the hidden row at its end is held in the sequence and scores the first token of the next
// chunk.
//
// Logits of at most max_batch_size rows exist at a time.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kernels/backend.h"
#include "proto/sluice/internal/v1/shard.pb.h"
#include "worker/engine/sequence_table.h"
#include "worker/engine/shard.h"

namespace sluice::worker {

class Sampler {
 public:
  // Allocates for steps of max_batch_tokens rows; RESOURCE_EXHAUSTED. `shard` and `backend` must
  // outlive it.
  static absl::StatusOr<std::unique_ptr<Sampler>> Create(
      const internal::v1::ShardAssignment& assignment, const Shard* shard, Backend* backend);

  // Rows that `hidden` of Run() must have room for beyond those of a step: held rows are put there.
  static int64_t ExtraRows(const internal::v1::ShardAssignment& assignment) {
    return assignment.max_batch_size();
  }

  // Fills tokens and prompt_scores of `frame`. hidden [max_batch_tokens + ExtraRows, hidden_size]:
  // the first num_rows rows are the residual stream after the last layer; sequences[i] belongs to
  // header.sequences(i), already advanced. sampled_rows: those that the header wants sampled, the
  // logit_rows that the backend's step began with.
  void Run(const internal::v1::StepHeader& header, absl::Span<Sequence* const> sequences,
           absl::Span<const int64_t> sampled_rows, TensorView hidden, int64_t num_rows,
           internal::v1::TokenFrame* frame);

  // Logits [num_rows, vocab_size] of the first num_rows rows of `hidden`. Allocates.
  std::vector<float> LogitsForTest(TensorView hidden, int64_t num_rows);

  uint64_t bytes() const { return bytes_; }

 private:
  struct ScoredRow {
    int64_t row = 0;        // Of hidden
    uint32_t token_id = 0;  // The prompt's next token
    int32_t num_logprobs = 0;
    internal::v1::PromptScores* scores = nullptr;
  };

  Sampler(const internal::v1::ShardAssignment& assignment, const Shard* shard, Backend* backend);
  void Project(TensorView hidden, int64_t num_rows);
  void ComputeLogits(TensorView hidden, absl::Span<const int64_t> rows);
  void CollectRows(const internal::v1::StepHeader& header, absl::Span<Sequence* const> sequences,
                   TensorView hidden, int64_t num_rows, internal::v1::TokenFrame* frame);
  void CollectScores(const internal::v1::SequenceSlice& slice, int64_t first_row,
                     Sequence* sequence, TensorView hidden, internal::v1::TokenFrame* frame);
  void SampleRows(const internal::v1::StepHeader& header, absl::Span<Sequence* const> sequences,
                  internal::v1::TokenFrame* frame);
  void ScoreRows(TensorView hidden);

  const Shard* const shard_;
  Backend* const backend_;
  const int64_t max_logit_rows_;
  int64_t used_rows_ = 0;  // Rows of hidden in use: those of the step, then held rows
  TensorView logits_;      // [max_logit_rows, vocab_size] float32
  TensorView projected_;   // [rows of hidden, word_embed_dim] behind project_out, else empty
  std::unique_ptr<DeviceBuffer> logits_buffer_, projected_buffer_;
  uint64_t bytes_ = 0;

  absl::Span<const int64_t> sampled_rows_;  // Of the step
  std::vector<SamplingRow> sampling_;
  std::vector<SampledToken> sampled_;
  std::vector<ScoredRow> scored_;
  std::vector<int64_t> scored_rows_;
};

}  // namespace sluice::worker
