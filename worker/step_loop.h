// StepLoop: the one thread that calls StageEngine while an epoch lasts. Takes whole steps from a
// bounded queue, waits for the ring inputs of a step that runs ahead, runs it and hands the result
// to a StepSink.
#pragma once

#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "worker/engine/stage_engine.h"
#include "worker/step_assembler.h"
#include "worker/worker_metrics.h"

namespace sluice::worker {

// What a stage made of a step: hidden states for the next stage, or tokens (last stage).
struct FinishedStep {
  internal::v1::StepHeader header;     // stage_us and wait_us of this stage are appended
  std::vector<uint8_t> hidden_states;  // Empty at the last stage
  internal::v1::TokenFrame tokens;     // Last stage only
};

// Where results go. Called by the loop's thread.
class StepSink {
 public:
  virtual ~StepSink() = default;
  // May wait while the sink is full. False: the sink is closed, the step is lost.
  virtual bool Send(FinishedStep step) = 0;
  // A buffer for the next hidden states; may be empty.
  virtual std::vector<uint8_t> SpareBuffer() { return {}; }
};

// Load since the last call of TakeStats.
struct StepStats {
  uint64_t steps = 0;  // Since the epoch began
  uint32_t step_us_p50 = 0;
  uint32_t step_us_p99 = 0;
  uint32_t queue_depth = 0;
  float busy = 0;  // 0..1
};

class StepLoop {
 public:
  // Engine and sink must outlive the loop. `on_error` is called once, on the loop's thread, when a
  // step fails; the loop then only waits to be stopped. `metrics` may be nullptr.
  StepLoop(StageEngine* engine, StepSink* sink, std::function<void(absl::Status)> on_error,
           StageMetrics* metrics = nullptr);
  // Stops and waits for the step that runs.
  ~StepLoop();
  StepLoop(const StepLoop&) = delete;
  StepLoop& operator=(const StepLoop&) = delete;

  // Puts a step into the queue; waits while it is full. INVALID_ARGUMENT: not the step after the
  // last one put; CANCELLED: stopped.
  absl::Status Push(StepWork step);
  // Ids from the ring. INVALID_ARGUMENT: not the frame after the last one; CANCELLED: stopped.
  absl::Status PushSampled(internal::v1::TokenFrame frame);
  // A buffer of a step that is done; may be empty.
  std::vector<uint8_t> SpareBuffer();

  // Makes waiting calls return and the thread end; does not wait. Thread-safe.
  void Stop();

  StepStats TakeStats();

 private:
  using Clock = std::chrono::steady_clock;

  void Run();
  // Waits for the next step and its inputs; false when stopped. Called with the lock held.
  bool NextStep(std::unique_lock<std::mutex>* lock, StepWork* step);
  absl::Status RunStep(StepWork* step, Clock::time_point idle_since);
  void Record(Clock::duration time);

  StageEngine* const engine_;
  StepSink* const sink_;
  const std::function<void(absl::Status)> on_error_;
  StageMetrics* const metrics_;
  const bool is_last_;
  const bool needs_ring_;  // Stage 0 of several
  const size_t capacity_;

  std::mutex mutex_;               // Guards all below
  std::condition_variable work_;   // For the loop's thread
  std::condition_variable space_;  // For those who push
  bool stopped_ = false;
  std::deque<StepWork> queue_;
  uint64_t last_step_ = 0;
  std::vector<internal::v1::TokenFrame> sampled_;  // From the ring, not yet given to the engine
  uint64_t last_sampled_ = 0;
  std::vector<std::vector<uint8_t>> spare_;
  uint64_t steps_ = 0;
  std::vector<uint32_t> step_us_;  // Since the last TakeStats
  Clock::time_point stats_since_;

  std::thread thread_;
};

}  // namespace sluice::worker
