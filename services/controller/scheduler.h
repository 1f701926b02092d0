// Scheduler: continuous batching for one epoch of one pipeline. Requests join and leave between
// steps; prompts are taken in chunks; a step is sent before the tokens of the one before it are
// back (running ahead).
//
// A pure state machine: no threads, no clock, no gRPC. Events go in with the time they happened;
// steps come out of NextStep() and results out of TakeEvents(). Owned by one thread.
//
//   microbatch slots  S = stages. Every sequence that decodes belongs to one slot, evenly. A step
//                     holds the decodes of its slot, then prefill chunks of the oldest prompts,
//                     within max_batch_tokens.
//   in flight         at most 2 steps of a slot and S + 1 steps in all: each stage computes one and
//                     one waits.
//   running ahead     a decode whose last token is not back yet is sent with sampled_by_step.
//   blocks            reserved at admission for prompt + max_tokens, so nothing is ever preempted;
//                     free again as soon as the sequence ends: steps are in order on every stage, so
//                     a later step may write them.
//   release           ended sequences are named in the next step; when nothing else is to do, in a
//                     step without rows.
#pragma once

#include <chrono>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "absl/status/status.h"
#include "proto/sluice/internal/v1/shard.pb.h"
#include "services/controller/block_allocator.h"
#include "services/controller/sequence.h"

namespace sluice::controller {

struct SchedulerLimits {
  uint64_t epoch = 1;
  uint32_t stages = 1;
  uint32_t num_blocks = 0;
  uint32_t block_size = 32;                // Tokens
  uint32_t max_batch_tokens = 512;         // Rows of a step, decodes and chunks
  uint32_t max_batch_size = 16;            // Sequences that run at once; cut to max_batch_tokens
  uint32_t max_queue = 64;                 // Requests that wait for room
  uint64_t max_queue_tokens = UINT64_MAX;  // Of their prompts; one request always may wait
};

// Something that happened to a request. Of one answer: any number of kToken, then one kDone; or, of
// all answers that are not done, one kFailed. Nothing comes after Drop().
struct SchedulerEvent {
  enum class Kind { kStarted, kToken, kPromptScores, kDone, kFailed };
  Kind kind = Kind::kStarted;
  uint64_t handle = 0;
  uint32_t choice = 0;
  internal::v1::SampledToken token;       // kToken
  bool ends_text = false;                 // kToken: an end id, which is not shown
  internal::v1::PromptScores scores;      // kPromptScores
  EndReason reason = EndReason::kLength;  // kDone
  absl::Status status;                    // kFailed
};

struct SchedulerCounts {
  uint32_t queued_requests = 0;
  uint32_t running_sequences = 0;
  uint32_t steps_in_flight = 0;
  uint64_t steps = 0;
  std::chrono::microseconds step_p50{0};
};

class Scheduler {
 public:
  explicit Scheduler(const SchedulerLimits& limits);
  ~Scheduler();

  // Takes a request under a handle that was never used before. RESOURCE_EXHAUSTED: the queue is
  // full, by requests or by tokens (RetryInfo, QuotaFailure), or the request needs more blocks than there are (no RetryInfo).
  // DEADLINE_EXCEEDED: it has passed. After an error the request is not here.
  absl::Status Submit(TimePoint now, uint64_t handle, RequestSpec spec);

  // The client has gone: forgets the request without an event. Unknown handles are ignored, here
  // and below.
  void Drop(uint64_t handle);
  // Ends every answer that is not done, with kDone and EndReason::kCancelled.
  void Cancel(uint64_t handle);
  // The text of one answer is complete (a stop string): ends it without an event.
  void EndSequence(uint64_t handle, uint32_t choice);
  // Fails requests whose deadline has passed, queued or running.
  void Expire(TimePoint now);
  // Fails everything, e.g. since a worker was lost. The scheduler may be destroyed then.
  void FailAll(const absl::Status& status);

  // Takes what a step yielded. Frames of other epochs and of steps without rows are ignored.
  // INTERNAL: the pipeline broke its contract (order, a missing token, a gap in the indices): the
  // plan must be given up.
  absl::Status OnFrame(TimePoint now, const internal::v1::TokenFrame& frame);

  // Fills the next step to send. False: nothing can be sent now. Call until false after any event.
  bool NextStep(TimePoint now, internal::v1::StepHeader* step);

  // What happened since the last call, in order.
  std::vector<SchedulerEvent> TakeEvents();

  // When the oldest step in flight counts as hung: max(2 s, 20 x median time of a row x its rows)
  // after it could begin; 60 s at least while few steps are known. nullopt: nothing in flight.
  std::optional<TimePoint> StepDeadline() const;

  SchedulerCounts counts() const;
  // Parts of counts() that cost nothing.
  uint32_t queued_requests() const { return waiting_requests_; }
  size_t running_sequences() const { return by_seq_id_.size(); }
  size_t steps_in_flight() const { return in_flight_.size(); }
  const BlockAllocator& blocks() const { return blocks_; }
  // Block ids of the sequences that run, by sequence. For tests.
  std::map<uint64_t, std::vector<uint32_t>> BlockTables() const;

 private:
  struct Request {
    RequestSpec spec;
    std::vector<std::unique_ptr<Sequence>> sequences;  // By choice
    uint32_t live = 0;                                 // Not ended
    uint32_t waiting = 0;                              // Not admitted
    bool started = false;
  };
  struct SentStep {
    uint64_t step = 0;
    uint32_t slot = 0;
    uint32_t rows = 0;
    TimePoint sent;
    std::vector<uint64_t> sampled;  // Sequence ids
  };
  struct Slot {
    std::vector<Sequence*> members;  // Sequences that decode
    uint32_t in_flight = 0;
    uint64_t last_step = 0;
  };

  // Adds an event; the reference is valid until the next.
  SchedulerEvent& Emit(SchedulerEvent::Kind kind, uint64_t handle, uint32_t choice = 0);
  void Admit();
  void StopsWaiting(Request* request);
  void End(Sequence* sequence);
  void RemoveRequest(uint64_t handle);
  void FailRequest(uint64_t handle, const absl::Status& status);
  void Rebalance();
  Slot* SlotWithFewest();
  bool HasWork(const Slot& slot) const;
  std::optional<uint32_t> PickSlot() const;
  void AddDecodes(Slot* slot, SentStep* sent, internal::v1::StepHeader* step);
  void AddChunks(SentStep* sent, internal::v1::StepHeader* step);
  void AddChunk(Sequence* sequence, uint32_t rows, SentStep* sent, internal::v1::StepHeader* step);
  absl::Status TakeToken(const internal::v1::SampledToken& token);
  void RecordDuration(TimePoint now, const SentStep& sent);

  SchedulerLimits limits_;
  BlockAllocator blocks_;
  std::map<uint64_t, Request> requests_;               // By handle, oldest first
  std::unordered_map<uint64_t, Sequence*> by_seq_id_;  // Admitted and not ended
  std::deque<Sequence*> waiting_;                      // Not admitted
  std::deque<Sequence*> prefilling_;                   // Admitted, prompt not sent whole
  std::vector<Slot> slots_;
  std::deque<SentStep> in_flight_;  // Oldest first
  std::vector<uint64_t> releases_;  // To be named in the next step
  std::vector<SchedulerEvent> events_;
  uint64_t next_seq_id_ = 1;
  uint64_t steps_ = 0;
  uint32_t waiting_requests_ = 0;
  uint64_t waiting_tokens_ = 0;  // Of their prompts
  TimePoint last_frame_{};
  std::vector<double> durations_us_;  // Of the last steps, a ring
  std::vector<double> row_us_;        // The same by row
  size_t next_duration_ = 0;
};

}  // namespace sluice::controller
