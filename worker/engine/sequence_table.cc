#include "worker/engine/sequence_table.h"

#include <utility>

#include "kernels/core/check.h"

namespace sluice::worker {

using internal::v1::SequenceSlice;

SequenceTable::SequenceTable(const Options& options)
    : options_(options), owners_(options.num_blocks, nullptr), free_blocks_(options.num_blocks) {}

const Sequence* SequenceTable::Find(uint64_t seq_id) const {
  const auto found = sequences_.find(seq_id);
  return found == sequences_.end() ? nullptr : found->second.get();
}

Sequence* SequenceTable::Find(uint64_t seq_id) {
  return const_cast<Sequence*>(std::as_const(*this).Find(seq_id));
}

std::unique_ptr<Sequence> SequenceTable::NewSequence() {
  if (!spare_.empty()) {
    std::unique_ptr<Sequence> sequence = std::move(spare_.back());
    spare_.pop_back();
    return sequence;
  }
  auto sequence = std::make_unique<Sequence>();
  const uint64_t blocks =
      (uint64_t{options_.max_model_len} + options_.block_size - 1) / options_.block_size;
  sequence->block_table.reserve(blocks);
  // One more than positions: the token that the last position samples.
  if (options_.keep_history) sequence->tokens.reserve(uint64_t{options_.max_model_len} + 1);
  return sequence;
}

void SequenceTable::Release(uint64_t seq_id) {
  const auto found = sequences_.find(seq_id);
  if (found == sequences_.end()) return;
  std::unique_ptr<Sequence> sequence = std::move(found->second);
  sequences_.erase(found);
  for (const uint32_t block : sequence->block_table) owners_[block] = nullptr;
  free_blocks_ += static_cast<uint32_t>(sequence->block_table.size());
  sequence->block_table.clear();
  sequence->tokens.clear();
  sequence->held_row.clear();
  sequence->sampling.Clear();
  sequence->next_pos = 0;
  sequence->sampled_step = kNoStep;
  sequence->sampled_id.reset();
  spare_.push_back(std::move(sequence));
}

void SequenceTable::ReleaseAll() {
  while (!sequences_.empty()) Release(sequences_.begin()->first);
}

Sequence* SequenceTable::Apply(uint64_t step, const SequenceSlice& slice) {
  std::unique_ptr<Sequence>& entry = sequences_[slice.seq_id()];
  if (entry == nullptr) {
    entry = NewSequence();
    entry->seq_id = slice.seq_id();
    entry->prompt_len = slice.prompt_len();
    if (options_.keep_history) entry->sampling = slice.sampling();
  }
  Sequence* sequence = entry.get();
  SLUICE_CHECK(sequence->next_pos == slice.start_pos()) << "slice was not checked";
  for (const uint32_t block : slice.new_block_ids()) {
    SLUICE_CHECK(owners_[block] == nullptr) << "block " << block << " is taken";
    owners_[block] = sequence;
    --free_blocks_;
    sequence->block_table.push_back(block);
  }
  if (options_.keep_history) {
    // What was sampled for start_pos is there already; ids that the controller names win over it.
    if (slice.sampled_by_step() == kNoStep) {
      sequence->tokens.resize(slice.start_pos());
      sequence->tokens.insert(sequence->tokens.end(), slice.token_ids().begin(),
                              slice.token_ids().end());
    }
  }
  sequence->next_pos += slice.num_tokens();
  sequence->sampled_step = slice.sample() ? step : kNoStep;
  sequence->sampled_id.reset();
  return sequence;
}

void SequenceTable::AddSampled(uint64_t step, uint64_t seq_id, uint32_t token_id) {
  Sequence* sequence = Find(seq_id);
  if (sequence == nullptr || step == kNoStep || sequence->sampled_step != step) return;
  sequence->sampled_id = token_id;
  if (!options_.keep_history) return;
  sequence->tokens.resize(sequence->next_pos);
  sequence->tokens.push_back(token_id);
}

}  // namespace sluice::worker
