#include "worker/engine/step_checker.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "kernels/core/status_macros.h"

namespace sluice::worker {
namespace {

using internal::v1::SamplingParams;
using internal::v1::SequenceSlice;
using internal::v1::ShardAssignment;
using internal::v1::StepHeader;

template <typename... Parts>
absl::Status Invalid(const Parts&... parts) {
  return absl::InvalidArgumentError(absl::StrCat(parts...));
}

}  // namespace

absl::Status CheckSampling(const SamplingParams& sampling, uint32_t vocab_size) {
  const auto bad = [](const char* field, double value, const char* rule) {
    return Invalid("sampling.", field, " = ", value, " must be ", rule);
  };
  const auto finite = [](float value) { return std::isfinite(value); };
  if (!finite(sampling.temperature()) || sampling.temperature() < 0) {
    return bad("temperature", sampling.temperature(), "finite and >= 0");
  }
  if (sampling.top_k() > uint32_t{1} << 30) return bad("top_k", sampling.top_k(), "<= 2^30");
  if (!(sampling.top_p() > 0 && sampling.top_p() <= 1)) {
    return bad("top_p", sampling.top_p(), "in (0, 1]");
  }
  if (!(sampling.min_p() >= 0 && sampling.min_p() <= 1)) {
    return bad("min_p", sampling.min_p(), "in [0, 1]");
  }
  if (!finite(sampling.repetition_penalty()) || sampling.repetition_penalty() <= 0) {
    return bad("repetition_penalty", sampling.repetition_penalty(), "finite and > 0");
  }
  if (!finite(sampling.presence_penalty())) {
    return bad("presence_penalty", sampling.presence_penalty(), "finite");
  }
  if (!finite(sampling.frequency_penalty())) {
    return bad("frequency_penalty", sampling.frequency_penalty(), "finite");
  }
  const int64_t most = vocab_size;
  if (sampling.num_logprobs() < -1 || sampling.num_logprobs() > most) {
    return bad("num_logprobs", sampling.num_logprobs(), "in -1..vocab_size");
  }
  if (sampling.num_prompt_logprobs() < -1 || sampling.num_prompt_logprobs() > most) {
    return bad("num_prompt_logprobs", sampling.num_prompt_logprobs(), "in -1..vocab_size");
  }
  for (const uint32_t id : sampling.banned_until_min()) {
    if (id >= vocab_size) return bad("banned_until_min", id, "below vocab_size");
  }
  return absl::OkStatus();
}

StepChecker::StepChecker(const ShardAssignment& assignment, uint64_t hidden_row_bytes)
    : assignment_(assignment),
      hidden_row_bytes_(hidden_row_bytes),
      taken_in_(assignment.num_blocks(), 0) {
  seq_ids_.reserve(assignment.max_batch_size());
  released_.reserve(assignment.max_batch_size());
}

absl::Status StepChecker::Check(const StepHeader& header, uint64_t hidden_bytes, uint64_t last_step,
                                const SequenceTable& table) {
  if (header.step() <= last_step) {
    return Invalid("step = ", header.step(), " must be above the last one run, ", last_step);
  }
  SLUICE_RETURN_IF_ERROR(CheckBatch(header, hidden_bytes));
  ++check_number_;
  int index = 0;
  for (const SequenceSlice& slice : header.sequences()) {
    const Sequence* sequence = table.Find(slice.seq_id());
    absl::Status status = CheckSlice(slice, sequence);
    if (status.ok()) status = CheckIds(slice, sequence);
    if (status.ok()) status = CheckBlocks(slice, sequence, table);
    if (!status.ok()) {
      return absl::Status(status.code(), absl::StrCat("sequences[", index, "] (seq_id ",
                                                      slice.seq_id(), "): ", status.message()));
    }
    ++index;
  }
  return absl::OkStatus();
}

absl::Status StepChecker::CheckBatch(const StepHeader& header, uint64_t hidden_bytes) {
  if (static_cast<uint64_t>(header.sequences_size()) > assignment_.max_batch_size()) {
    return Invalid("sequences: ", header.sequences_size(), " slices, max_batch_size is ",
                   assignment_.max_batch_size());
  }
  released_.assign(header.released_seq_ids().begin(), header.released_seq_ids().end());
  std::sort(released_.begin(), released_.end());
  uint64_t rows = 0;
  seq_ids_.clear();
  for (const SequenceSlice& slice : header.sequences()) {
    rows += slice.num_tokens();
    seq_ids_.push_back(slice.seq_id());
    if (IsReleased(slice.seq_id())) {
      return Invalid("released_seq_ids: ", slice.seq_id(), " has a slice in the same step");
    }
  }
  std::sort(seq_ids_.begin(), seq_ids_.end());
  const auto twice = std::adjacent_find(seq_ids_.begin(), seq_ids_.end());
  if (twice != seq_ids_.end()) {
    return Invalid("sequences: seq_id ", *twice, " has two slices in one step");
  }
  if (rows > assignment_.max_batch_tokens()) {
    return Invalid("sequences: num_tokens add up to ", rows, ", max_batch_tokens is ",
                   assignment_.max_batch_tokens());
  }
  const uint64_t expected = assignment_.has_embedding() ? 0 : rows * hidden_row_bytes_;
  if (hidden_bytes != expected) {
    return Invalid("hidden_states: ", hidden_bytes, " bytes for ", rows, " rows, must be ",
                   expected);
  }
  return absl::OkStatus();
}

absl::Status StepChecker::CheckSlice(const SequenceSlice& slice, const Sequence* sequence) const {
  if (slice.num_tokens() == 0) return Invalid("num_tokens must be 1 or more");
  if (sequence == nullptr) {
    SLUICE_RETURN_IF_ERROR(CheckFirstSlice(slice));
  } else if (slice.start_pos() != sequence->next_pos) {
    return Invalid("start_pos = ", slice.start_pos(), " must be ", sequence->next_pos,
                   ", where the slice before ended");
  } else if (slice.has_sampling() || slice.prompt_len() != 0) {
    return Invalid("sampling and prompt_len come with the first slice only");
  }
  const uint64_t end = uint64_t{slice.start_pos()} + slice.num_tokens();
  if (end > assignment_.max_model_len()) {
    return Invalid("start_pos + num_tokens = ", end, ", max_model_len is ",
                   assignment_.max_model_len());
  }
  if (slice.sample() && slice.token_index() >= end) {
    return Invalid("token_index = ", slice.token_index(),
                   " must be below start_pos + num_tokens = ", end,
                   ": a prompt has one token at least");
  }
  return absl::OkStatus();
}

absl::Status StepChecker::CheckFirstSlice(const SequenceSlice& slice) const {
  if (slice.start_pos() != 0) {
    return Invalid("start_pos = ", slice.start_pos(),
                   " of a sequence whose first slice was not seen; it begins at 0");
  }
  if (slice.prompt_len() == 0 || slice.prompt_len() > assignment_.max_model_len()) {
    return Invalid("prompt_len = ", slice.prompt_len(),
                   " is out of range 1..max_model_len = ", assignment_.max_model_len());
  }
  if (!assignment_.has_head()) return absl::OkStatus();
  if (!slice.has_sampling()) return Invalid("sampling is missing in the first slice");
  return CheckSampling(slice.sampling(), assignment_.config().vocab_size());
}

absl::Status StepChecker::CheckIds(const SequenceSlice& slice, const Sequence* sequence) const {
  const uint32_t vocab_size = assignment_.config().vocab_size();
  if (slice.sampled_by_step() == SequenceTable::kNoStep) {
    if (static_cast<uint64_t>(slice.token_ids_size()) != slice.num_tokens()) {
      return Invalid("token_ids: ", slice.token_ids_size(),
                     " ids for num_tokens = ", slice.num_tokens());
    }
    for (const uint32_t id : slice.token_ids()) {
      if (id >= vocab_size)
        return Invalid("token_ids: ", id, " is not below vocab_size = ", vocab_size);
    }
    return absl::OkStatus();
  }
  if (slice.token_ids_size() != 0 || slice.num_tokens() != 1) {
    return Invalid("sampled_by_step stands for one token: token_ids must be empty, num_tokens 1");
  }
  if (sequence == nullptr || sequence->sampled_step != slice.sampled_by_step()) {
    return Invalid("sampled_by_step = ", slice.sampled_by_step(), " did not sample position ",
                   slice.start_pos());
  }
  if (!NeedsIds()) return absl::OkStatus();
  if (!sequence->sampled_id.has_value()) {
    return Invalid("sampled_by_step = ", slice.sampled_by_step(), ": its id is not here yet");
  }
  if (*sequence->sampled_id >= vocab_size) {
    return Invalid("sampled_by_step = ", slice.sampled_by_step(), ": its id ",
                   *sequence->sampled_id, " is not below vocab_size = ", vocab_size);
  }
  return absl::OkStatus();
}

absl::Status StepChecker::CheckBlocks(const SequenceSlice& slice, const Sequence* sequence,
                                      const SequenceTable& table) {
  for (const uint32_t block : slice.new_block_ids()) {
    if (block >= assignment_.num_blocks()) {
      return Invalid("new_block_ids: ", block,
                     " is not below num_blocks = ", assignment_.num_blocks());
    }
    const Sequence* owner = table.OwnerOf(block);
    if (taken_in_[block] == check_number_ || (owner != nullptr && !IsReleased(owner->seq_id))) {
      return Invalid("new_block_ids: ", block, " belongs to another sequence or is given twice");
    }
    taken_in_[block] = check_number_;
  }
  const uint64_t block_size = assignment_.block_size();
  const uint64_t blocks = (sequence == nullptr ? 0 : sequence->block_table.size()) +
                          static_cast<uint64_t>(slice.new_block_ids_size());
  const uint64_t end = uint64_t{slice.start_pos()} + slice.num_tokens();
  if (blocks * block_size < end) {
    return Invalid("new_block_ids: ", blocks, " blocks of ", block_size, " tokens do not hold ",
                   end, " tokens");
  }
  const uint64_t most = (assignment_.max_model_len() + block_size - 1) / block_size;
  if (blocks > most) {
    return Invalid("new_block_ids: ", blocks, " blocks, max_model_len needs ", most, " at most");
  }
  return absl::OkStatus();
}

bool StepChecker::IsReleased(uint64_t seq_id) const {
  return std::binary_search(released_.begin(), released_.end(), seq_id);
}

bool StepChecker::HasInputs(const StepHeader& header, const SequenceTable& table) const {
  if (!assignment_.has_embedding()) return true;
  for (const SequenceSlice& slice : header.sequences()) {
    if (slice.sampled_by_step() == SequenceTable::kNoStep) continue;
    const Sequence* sequence = table.Find(slice.seq_id());
    if (sequence != nullptr && sequence->sampled_step == slice.sampled_by_step() &&
        !sequence->sampled_id.has_value()) {
      return false;
    }
  }
  return true;
}

}  // namespace sluice::worker
