#include "services/controller/scheduler.h"

#include <algorithm>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/core/fault_point.h"
#include "services/rpc/error_details.h"

namespace sluice::controller {
namespace {

using internal::v1::PromptScores;
using internal::v1::SampledToken;
using internal::v1::TokenFrame;

constexpr int64_t kRetryMs = 1000;
constexpr size_t kDurations = 64;
constexpr size_t kFewDurations = 8;
constexpr std::chrono::seconds kHungAtLeast{2};
constexpr std::chrono::seconds kHungWhileNew{60};
constexpr double kHungFactor = 20.0;

double Median(std::vector<double> values) {
  if (values.empty()) {
    return 0.0;
  }
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

template <typename Container>
void EraseValue(Container* container, Sequence* value) {
  const auto it = std::find(container->begin(), container->end(), value);
  if (it != container->end()) {
    container->erase(it);
  }
}

// The last token is never an input, so its KV needs no room.
uint32_t BlocksNeeded(const RequestSpec& spec, uint32_t block_size) {
  const uint64_t tokens = spec.prompt.size() + spec.max_tokens - 1;
  return static_cast<uint32_t>((tokens + block_size - 1) / block_size);
}

absl::Status QueueFull(uint64_t limit, const char* unit) {
  absl::Status status = absl::ResourceExhaustedError(
      absl::StrCat("the queue is full (", limit, " ", unit, " may wait): try again later"));
  rpc::AttachRetryInfo(kRetryMs, &status);
  rpc::AttachQuotaFailure("queue", absl::StrCat(limit, " ", unit, " may wait"), &status);
  return status;
}

absl::Status TooLate() {
  return absl::DeadlineExceededError("the deadline passed before the answer was complete");
}

absl::Status NotFinite() {
  absl::Status status =
      absl::InternalError("the model yielded a value that is not a finite number for this request");
  rpc::AttachErrorInfo("NOT_FINITE", {}, &status);
  return status;
}

}  // namespace

Scheduler::Scheduler(const SchedulerLimits& limits)
    : limits_(limits), blocks_(limits.num_blocks), slots_(std::max(1u, limits.stages)) {
  limits_.max_batch_size = std::min(limits_.max_batch_size, limits_.max_batch_tokens);
}

Scheduler::~Scheduler() = default;

absl::Status Scheduler::Submit(TimePoint now, uint64_t handle, RequestSpec spec) {
  if (spec.deadline <= now) {
    return TooLate();
  }
  const uint32_t needed = BlocksNeeded(spec, limits_.block_size);
  if (needed > blocks_.total()) {
    return absl::ResourceExhaustedError(absl::StrCat("the request needs ", needed, " KV blocks of ",
                                                     limits_.block_size, " tokens, there are ",
                                                     blocks_.total(), ": lower max_tokens"));
  }
  Request& request = requests_[handle];
  request.spec = std::move(spec);
  for (uint32_t choice = 0; choice < request.spec.n; ++choice) {
    auto sequence = std::make_unique<Sequence>();
    sequence->handle = handle;
    sequence->choice = choice;
    sequence->spec = &request.spec;
    waiting_.push_back(sequence.get());
    request.sequences.push_back(std::move(sequence));
  }
  request.live = request.waiting = request.spec.n;
  ++waiting_requests_;
  waiting_tokens_ += request.spec.prompt.size();
  Admit();
  if (request.waiting > 0 && waiting_requests_ > limits_.max_queue) {
    RemoveRequest(handle);
    return QueueFull(limits_.max_queue, "requests");
  }
  if (request.waiting > 0 && waiting_requests_ > 1 && waiting_tokens_ > limits_.max_queue_tokens) {
    RemoveRequest(handle);
    return QueueFull(limits_.max_queue_tokens, "prompt tokens");
  }
  return absl::OkStatus();
}

SchedulerEvent& Scheduler::Emit(SchedulerEvent::Kind kind, uint64_t handle, uint32_t choice) {
  SchedulerEvent& event = events_.emplace_back();
  event.kind = kind;
  event.handle = handle;
  event.choice = choice;
  return event;
}

// First come, first served: a large request is never overtaken for ever by small ones.
void Scheduler::Admit() {
  while (!waiting_.empty() && by_seq_id_.size() < limits_.max_batch_size) {
    Sequence* sequence = waiting_.front();
    if (!blocks_.Allocate(BlocksNeeded(*sequence->spec, limits_.block_size), &sequence->blocks)) {
      return;
    }
    waiting_.pop_front();
    sequence->seq_id = next_seq_id_++;
    by_seq_id_[sequence->seq_id] = sequence;
    prefilling_.push_back(sequence);
    Request& request = requests_.at(sequence->handle);
    StopsWaiting(&request);
  }
}

// One sequence of the request fewer waits.
void Scheduler::StopsWaiting(Request* request) {
  if (--request->waiting == 0) {
    --waiting_requests_;
    waiting_tokens_ -= request->spec.prompt.size();
  }
}

// Gives back everything the sequence holds; its request keeps it as ended.
void Scheduler::End(Sequence* sequence) {
  if (sequence->ended) {
    return;
  }
  sequence->ended = true;
  Request& request = requests_.at(sequence->handle);
  --request.live;
  if (sequence->seq_id == 0) {
    EraseValue(&waiting_, sequence);
    StopsWaiting(&request);
    return;
  }
  SLUICE_FAULT_POINT("controller.before_release");
  blocks_.Free(sequence->blocks);
  sequence->blocks.clear();
  by_seq_id_.erase(sequence->seq_id);
  EraseValue(&prefilling_, sequence);
  for (Slot& slot : slots_) {
    EraseValue(&slot.members, sequence);
  }
  if (sequence->prompt_sent > 0) {  // Otherwise no worker has heard of it
    releases_.push_back(sequence->seq_id);
  }
}

void Scheduler::RemoveRequest(uint64_t handle) {
  const auto it = requests_.find(handle);
  if (it == requests_.end()) {
    return;
  }
  for (const auto& sequence : it->second.sequences) {
    End(sequence.get());
  }
  requests_.erase(it);
  Rebalance();
  Admit();
}

void Scheduler::FailRequest(uint64_t handle, const absl::Status& status) {
  SchedulerEvent& event = Emit(SchedulerEvent::Kind::kFailed, handle);
  event.status = status;
  RemoveRequest(handle);
}

void Scheduler::Drop(uint64_t handle) { RemoveRequest(handle); }

void Scheduler::Cancel(uint64_t handle) {
  const auto it = requests_.find(handle);
  if (it == requests_.end()) {
    return;
  }
  for (const auto& sequence : it->second.sequences) {
    if (!sequence->ended) {
      SchedulerEvent& event = Emit(SchedulerEvent::Kind::kDone, handle, sequence->choice);
      event.reason = EndReason::kCancelled;
    }
  }
  RemoveRequest(handle);
}

void Scheduler::EndSequence(uint64_t handle, uint32_t choice) {
  const auto it = requests_.find(handle);
  if (it == requests_.end() || choice >= it->second.sequences.size()) {
    return;
  }
  End(it->second.sequences[choice].get());
  if (it->second.live == 0) {
    RemoveRequest(handle);
  } else {
    Rebalance();
    Admit();
  }
}

void Scheduler::Expire(TimePoint now) {
  std::vector<uint64_t> late;
  for (const auto& [handle, request] : requests_) {
    if (request.spec.deadline <= now) {
      late.push_back(handle);
    }
  }
  for (const uint64_t handle : late) {
    FailRequest(handle, TooLate());
  }
}

void Scheduler::FailAll(const absl::Status& status) {
  while (!requests_.empty()) {
    FailRequest(requests_.rbegin()->first, status);  // Newest first: nothing is admitted on the way
  }
}

absl::Status Scheduler::OnFrame(TimePoint now, const TokenFrame& frame) {
  if (frame.epoch() != limits_.epoch || in_flight_.empty() ||
      frame.step() < in_flight_.front().step) {
    return absl::OkStatus();  // Of an older plan, seen before, or a step without rows
  }
  if (frame.step() != in_flight_.front().step) {
    return absl::InternalError(absl::StrCat("the last stage answered step ", frame.step(),
                                            " before step ", in_flight_.front().step));
  }
  const SentStep sent = std::move(in_flight_.front());
  in_flight_.pop_front();
  --slots_[sent.slot].in_flight;
  RecordDuration(now, sent);
  for (const PromptScores& scores : frame.prompt_scores()) {
    const auto it = by_seq_id_.find(scores.seq_id());
    if (it != by_seq_id_.end()) {
      SchedulerEvent& event =
          Emit(SchedulerEvent::Kind::kPromptScores, it->second->handle, it->second->choice);
      event.scores = scores;
    }
  }
  std::set<uint64_t> missing(sent.sampled.begin(), sent.sampled.end());
  for (const SampledToken& token : frame.tokens()) {
    missing.erase(token.seq_id());
    if (absl::Status status = TakeToken(token); !status.ok()) {
      return status;
    }
  }
  for (const uint64_t seq_id : missing) {
    if (by_seq_id_.count(seq_id) != 0) {
      return absl::InternalError(
          absl::StrCat("step ", sent.step, " came back without a token of sequence ", seq_id));
    }
  }
  return absl::OkStatus();
}

absl::Status Scheduler::TakeToken(const SampledToken& token) {
  const auto it = by_seq_id_.find(token.seq_id());
  if (it == by_seq_id_.end() || token.token_index() < it->second->tokens.size()) {
    return absl::OkStatus();  // Past the end of its sequence, or logged before
  }
  Sequence* sequence = it->second;
  if (token.token_index() != sequence->tokens.size() || sequence->outstanding() == 0) {
    return absl::InternalError(absl::StrCat("sequence ", token.seq_id(), " got token ",
                                            token.token_index(), ", expected ",
                                            sequence->tokens.size()));
  }
  if (token.not_finite()) {
    FailRequest(sequence->handle, NotFinite());
    return absl::OkStatus();
  }
  sequence->tokens.push_back(token.token_id());
  const RequestSpec& spec = *sequence->spec;
  const bool is_end =
      token.token_index() >= spec.sampling.min_tokens() &&
      std::binary_search(spec.end_ids.begin(), spec.end_ids.end(), token.token_id());
  SchedulerEvent& event = Emit(SchedulerEvent::Kind::kToken, sequence->handle, sequence->choice);
  event.token = token;
  event.ends_text = is_end;
  if (is_end || sequence->tokens.size() == spec.max_tokens) {
    SchedulerEvent& done = Emit(SchedulerEvent::Kind::kDone, sequence->handle, sequence->choice);
    done.reason = is_end ? EndReason::kStop : EndReason::kLength;
    EndSequence(sequence->handle, sequence->choice);
  }
  return absl::OkStatus();
}

std::vector<SchedulerEvent> Scheduler::TakeEvents() { return std::exchange(events_, {}); }

void Scheduler::RecordDuration(TimePoint now, const SentStep& sent) {
  const double us = std::chrono::duration<double, std::micro>(now - sent.sent).count();
  last_frame_ = now;
  if (durations_us_.size() < kDurations) {
    durations_us_.push_back(us);
    row_us_.push_back(us / sent.rows);
  } else {
    durations_us_[next_duration_] = us;
    row_us_[next_duration_] = us / sent.rows;
    next_duration_ = (next_duration_ + 1) % kDurations;
  }
}

std::optional<TimePoint> Scheduler::StepDeadline() const {
  if (in_flight_.empty()) {
    return std::nullopt;
  }
  const SentStep& oldest = in_flight_.front();
  const auto usual =
      std::chrono::microseconds(static_cast<int64_t>(kHungFactor * Median(row_us_) * oldest.rows));
  const auto least = row_us_.size() < kFewDurations ? kHungWhileNew : kHungAtLeast;
  return std::max(oldest.sent, last_frame_) + std::max<std::chrono::microseconds>(least, usual);
}

SchedulerCounts Scheduler::counts() const {
  SchedulerCounts counts;
  counts.queued_requests = waiting_requests_;
  counts.running_sequences = static_cast<uint32_t>(by_seq_id_.size());
  counts.steps_in_flight = static_cast<uint32_t>(in_flight_.size());
  counts.steps = steps_;
  counts.step_p50 = std::chrono::microseconds(static_cast<int64_t>(Median(durations_us_)));
  return counts;
}

std::map<uint64_t, std::vector<uint32_t>> Scheduler::BlockTables() const {
  std::map<uint64_t, std::vector<uint32_t>> tables;
  for (const auto& [seq_id, sequence] : by_seq_id_) {
    tables[seq_id] = sequence->blocks;
  }
  return tables;
}

}  // namespace sluice::controller
