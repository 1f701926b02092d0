// The part of Scheduler that forms steps: which microbatch slot is next and what goes into it.
#include <algorithm>
#include <utility>

#include "services/controller/scheduler.h"

namespace sluice::controller {

using internal::v1::SequenceSlice;
using internal::v1::StepHeader;

namespace {

constexpr uint32_t kMaxStepsOfSlot = 2;

}  // namespace

Scheduler::Slot* Scheduler::SlotWithFewest() {
  return &*std::min_element(slots_.begin(), slots_.end(), [](const Slot& a, const Slot& b) {
    return a.members.size() < b.members.size();
  });
}

// Keeps the decodes even when sequences have ended: a slot with more members than another is a
// bubble in each round.
void Scheduler::Rebalance() {
  while (true) {
    Slot* fewest = SlotWithFewest();
    Slot* most = &*std::max_element(slots_.begin(), slots_.end(), [](const Slot& a, const Slot& b) {
      return a.members.size() < b.members.size();
    });
    if (most->members.size() < fewest->members.size() + 2) {
      return;
    }
    fewest->members.push_back(most->members.back());
    most->members.pop_back();
  }
}

bool Scheduler::HasWork(const Slot& slot) const {
  return !prefilling_.empty() || std::any_of(slot.members.begin(), slot.members.end(),
                                             [](const Sequence* s) { return s->CanDecode(); });
}

// The slot with the fewest steps in flight, then the one that has waited longest.
std::optional<uint32_t> Scheduler::PickSlot() const {
  std::optional<uint32_t> best;
  if (in_flight_.size() >= slots_.size() + 1) {
    return best;
  }
  for (uint32_t i = 0; i < slots_.size(); ++i) {
    const Slot& slot = slots_[i];
    if (slot.in_flight >= kMaxStepsOfSlot || !HasWork(slot)) {
      continue;
    }
    if (!best || std::make_pair(slot.in_flight, slot.last_step) <
                     std::make_pair(slots_[*best].in_flight, slots_[*best].last_step)) {
      best = i;
    }
  }
  return best;
}

bool Scheduler::NextStep(TimePoint now, StepHeader* step) {
  step->Clear();
  const std::optional<uint32_t> slot = PickSlot();
  if (!slot && (releases_.empty() || !in_flight_.empty())) {
    return false;  // Releases wait for the steps in flight: most often one more follows
  }
  step->set_epoch(limits_.epoch);
  step->set_step(++steps_);
  for (const uint64_t seq_id : std::exchange(releases_, {})) {
    step->add_released_seq_ids(seq_id);
  }
  if (!slot) {
    return true;
  }
  step->set_slot(*slot);
  SentStep sent;
  sent.step = steps_;
  sent.slot = *slot;
  sent.sent = now;
  AddDecodes(&slots_[*slot], &sent, step);
  AddChunks(&sent, step);
  ++slots_[*slot].in_flight;
  slots_[*slot].last_step = steps_;
  in_flight_.push_back(std::move(sent));
  return true;
}

void Scheduler::AddDecodes(Slot* slot, SentStep* sent, StepHeader* step) {
  for (Sequence* sequence : slot->members) {
    if (!sequence->CanDecode()) {
      continue;
    }
    SequenceSlice* slice = step->add_sequences();
    slice->set_seq_id(sequence->seq_id);
    slice->set_start_pos(static_cast<uint32_t>(sequence->spec->prompt.size()) +
                         sequence->samples_sent - 1);
    slice->set_num_tokens(1);
    if (sequence->outstanding() == 0) {
      slice->add_token_ids(sequence->tokens.back());
    } else {
      slice->set_sampled_by_step(sequence->last_sample_step);
    }
    slice->set_sample(true);
    slice->set_token_index(sequence->samples_sent++);
    sequence->last_sample_step = sent->step;
    sent->sampled.push_back(sequence->seq_id);
    ++sent->rows;
  }
}

void Scheduler::AddChunks(SentStep* sent, StepHeader* step) {
  while (!prefilling_.empty() && sent->rows < limits_.max_batch_tokens &&
         static_cast<uint32_t>(step->sequences_size()) < limits_.max_batch_size) {
    Sequence* sequence = prefilling_.front();
    const uint32_t left =
        static_cast<uint32_t>(sequence->spec->prompt.size()) - sequence->prompt_sent;
    AddChunk(sequence, std::min(left, limits_.max_batch_tokens - sent->rows), sent, step);
    if (!sequence->PromptDone()) {
      return;
    }
    prefilling_.pop_front();
    SlotWithFewest()->members.push_back(sequence);
  }
}

void Scheduler::AddChunk(Sequence* sequence, uint32_t rows, SentStep* sent, StepHeader* step) {
  const RequestSpec& spec = *sequence->spec;
  SequenceSlice* slice = step->add_sequences();
  slice->set_seq_id(sequence->seq_id);
  slice->set_start_pos(sequence->prompt_sent);
  slice->set_num_tokens(rows);
  const auto begin = spec.prompt.begin() + sequence->prompt_sent;
  slice->mutable_token_ids()->Add(begin, begin + rows);
  if (sequence->prompt_sent == 0) {
    slice->mutable_new_block_ids()->Add(sequence->blocks.begin(), sequence->blocks.end());
    slice->set_prompt_len(static_cast<uint32_t>(spec.prompt.size()));
    *slice->mutable_sampling() = spec.sampling;
    slice->mutable_sampling()->set_choice(sequence->choice);
    if (sequence->choice != 0) {
      slice->mutable_sampling()->set_num_prompt_logprobs(-1);
    }
    Request& request = requests_.at(sequence->handle);
    if (!request.started) {
      request.started = true;
      Emit(SchedulerEvent::Kind::kStarted, sequence->handle);
    }
  }
  sequence->prompt_sent += rows;
  sent->rows += rows;
  if (sequence->PromptDone()) {
    slice->set_sample(true);
    slice->set_token_index(0);
    sequence->samples_sent = 1;
    sequence->last_sample_step = sent->step;
    sent->sampled.push_back(sequence->seq_id);
  }
}

}  // namespace sluice::controller
