// StepChecker: decides whether a step from outside may be applied to a stage's sequences, before
// anything changes. What it accepts cannot fail afterwards.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "proto/sluice/internal/v1/shard.pb.h"
#include "worker/engine/sequence_table.h"

namespace sluice::worker {

class StepChecker {
 public:
  // `hidden_row_bytes`: of one row of hidden states.
  StepChecker(const internal::v1::ShardAssignment& assignment, uint64_t hidden_row_bytes);

  // INVALID_ARGUMENT names the field, its index and the rule:
  //   step          above last_step
  //   sequences     at most max_batch_size, each seq_id once, rows at most max_batch_tokens
  //   slices        first one at position 0 with prompt_len (and sampling, on the last stage),
  //   others contiguous;
  //                 within max_model_len and the block table
  //   ids           below vocab_size, one a row, or one sampled id that is known
  //   blocks        in the pool and free, released_seq_ids counted as gone
  //   hidden_bytes  rows * hidden_row_bytes after stage 0, none on stage 0
  absl::Status Check(const internal::v1::StepHeader& header, uint64_t hidden_bytes,
                     uint64_t last_step, const SequenceTable& table);

  // False while a slice's sampled id may still arrive on the ring; true when all are there, and
  // also when the step can never be run, so that Check() refuses it instead of the caller waiting
  // for ever.
  bool HasInputs(const internal::v1::StepHeader& header, const SequenceTable& table) const;

 private:
  absl::Status CheckBatch(const internal::v1::StepHeader& header, uint64_t hidden_bytes);
  absl::Status CheckSlice(const internal::v1::SequenceSlice& slice, const Sequence* sequence) const;
  absl::Status CheckFirstSlice(const internal::v1::SequenceSlice& slice) const;
  absl::Status CheckIds(const internal::v1::SequenceSlice& slice, const Sequence* sequence) const;
  absl::Status CheckBlocks(const internal::v1::SequenceSlice& slice, const Sequence* sequence,
                           const SequenceTable& table);
  bool IsReleased(uint64_t seq_id) const;
  bool NeedsIds() const { return assignment_.has_embedding() || assignment_.has_head(); }

  const internal::v1::ShardAssignment assignment_;
  const uint64_t hidden_row_bytes_;
  std::vector<uint64_t> released_;  // Sorted; scratch of Check
  std::vector<uint64_t> seq_ids_;   // Sorted; scratch of Check
  std::vector<uint64_t> taken_in_;  // By block id: the Check() call that gave it away
  uint64_t check_number_ = 0;
};

// INVALID_ARGUMENT names the field of `sampling` that is out of its range.
absl::Status CheckSampling(const internal::v1::SamplingParams& sampling, uint32_t vocab_size);

}  // namespace sluice::worker
