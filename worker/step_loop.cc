#include "worker/step_loop.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/core/fault_point.h"

namespace sluice::worker {
namespace {

// Each microbatch slot may have one step that runs and one that runs ahead.
size_t CapacityFor(uint32_t stages) { return 2 * static_cast<size_t>(stages) + 2; }

constexpr size_t kMaxStatSteps = 8192;

uint32_t Micros(std::chrono::steady_clock::duration time) {
  return static_cast<uint32_t>(std::chrono::duration_cast<std::chrono::microseconds>(time).count());
}

}  // namespace

StepLoop::StepLoop(StageEngine* engine, StepSink* sink, std::function<void(absl::Status)> on_error,
                   StageMetrics* metrics)
    : engine_(engine),
      sink_(sink),
      on_error_(std::move(on_error)),
      metrics_(metrics),
      is_last_(engine->assignment().stage() + 1 == engine->assignment().stages()),
      needs_ring_(engine->assignment().stage() == 0 && engine->assignment().stages() > 1),
      capacity_(CapacityFor(engine->assignment().stages())),
      stats_since_(Clock::now()),
      thread_([this] { Run(); }) {}

StepLoop::~StepLoop() {
  Stop();
  thread_.join();
}

void StepLoop::Stop() {
  std::lock_guard<std::mutex> lock(mutex_);
  stopped_ = true;
  work_.notify_all();
  space_.notify_all();
}

absl::Status StepLoop::Push(StepWork step) {
  std::unique_lock<std::mutex> lock(mutex_);
  const uint64_t number = step.header.step();
  if (number != last_step_ + 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("StepHeader.step: ", number, " came, the next step is ", last_step_ + 1));
  }
  last_step_ = number;  // Before the wait: another stream must not put the same step
  space_.wait(lock, [this] { return stopped_ || queue_.size() < capacity_; });
  if (stopped_) {
    return absl::CancelledError("this stage has stopped taking steps");
  }
  queue_.push_back(std::move(step));
  work_.notify_one();
  return absl::OkStatus();
}

absl::Status StepLoop::PushSampled(internal::v1::TokenFrame frame) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (frame.step() != last_sampled_ + 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("TokenFrame.step: ", frame.step(), " came, the next is ", last_sampled_ + 1));
  }
  last_sampled_ = frame.step();
  space_.wait(lock, [this] { return stopped_ || sampled_.size() < 2 * capacity_; });
  if (stopped_) {
    return absl::CancelledError("this stage has stopped taking steps");
  }
  sampled_.push_back(std::move(frame));
  work_.notify_one();
  return absl::OkStatus();
}

std::vector<uint8_t> StepLoop::SpareBuffer() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (spare_.empty()) {
    return {};
  }
  std::vector<uint8_t> buffer = std::move(spare_.back());
  spare_.pop_back();
  return buffer;
}

bool StepLoop::NextStep(std::unique_lock<std::mutex>* lock, StepWork* step) {
  while (true) {
    work_.wait(*lock, [this] { return stopped_ || !sampled_.empty() || !queue_.empty(); });
    if (stopped_) {
      return false;
    }
    std::vector<internal::v1::TokenFrame> sampled = std::exchange(sampled_, {});
    if (!sampled.empty()) {
      space_.notify_all();
      lock->unlock();
      for (const auto& frame : sampled) {
        engine_->AddSampled(frame);
      }
      lock->lock();
    }
    if (queue_.empty()) {
      continue;
    }
    // Only this thread takes from the queue, and a deque keeps its front in place while others
    // push.
    if (!needs_ring_ || engine_->HasInputs(queue_.front().header)) {
      *step = std::move(queue_.front());
      queue_.pop_front();
      space_.notify_all();
      return true;
    }
    work_.wait(*lock, [this] { return stopped_ || !sampled_.empty(); });
  }
}

absl::Status StepLoop::RunStep(StepWork* step, Clock::time_point idle_since) {
  StageEngine::StepInput input;
  input.header = &step->header;
  input.hidden_states = step->hidden_states.data();
  input.hidden_bytes = step->hidden_bytes;
  StageEngine::StepOutput output;
  if (!is_last_) {
    output.hidden_states = sink_->SpareBuffer();
  }
  SLUICE_FAULT_POINT("worker.before_compute");
  const Clock::time_point begin = Clock::now();
  if (absl::Status status = engine_->Step(input, &output); !status.ok()) {
    return status;
  }
  const Clock::duration time = Clock::now() - begin;
  SLUICE_FAULT_POINT("worker.after_compute");
  step->header.add_stage_us(Micros(time));
  step->header.add_wait_us(Micros(begin - idle_since));
  Record(time);
  if (metrics_ != nullptr) {
    metrics_->compute_seconds.Observe(std::chrono::duration<double>(time).count());
    metrics_->wait_seconds.Observe(std::chrono::duration<double>(begin - idle_since).count());
  }
  FinishedStep done;
  done.header = std::move(step->header);
  done.hidden_states = std::move(output.hidden_states);
  done.tokens = std::move(output.tokens);
  if (is_last_) {
    done.tokens.set_epoch(done.header.epoch());
    done.tokens.set_step(done.header.step());
    done.tokens.set_slot(done.header.slot());
    *done.tokens.mutable_stage_us() = done.header.stage_us();
    *done.tokens.mutable_wait_us() = done.header.wait_us();
  }
  sink_->Send(std::move(done));
  SLUICE_FAULT_POINT("worker.after_send");
  return absl::OkStatus();
}

void StepLoop::Record(Clock::duration time) {
  std::lock_guard<std::mutex> lock(mutex_);
  ++steps_;
  if (step_us_.size() < kMaxStatSteps) {
    step_us_.push_back(Micros(time));
  }
}

void StepLoop::Run() {
  Clock::time_point idle_since = Clock::now();
  std::unique_lock<std::mutex> lock(mutex_);
  StepWork step;
  while (NextStep(&lock, &step)) {
    lock.unlock();
    const absl::Status status = RunStep(&step, idle_since);
    idle_since = Clock::now();
    if (!status.ok()) {
      on_error_(absl::Status(status.code(), absl::StrCat("step ", step.header.step(), ": ",
                                                         std::string(status.message()))));
      lock.lock();
      work_.wait(lock, [this] { return stopped_; });
      return;
    }
    lock.lock();
    if (!step.hidden_states.empty() && spare_.size() < capacity_) {
      spare_.push_back(std::move(step.hidden_states));
    }
  }
}

StepStats StepLoop::TakeStats() {
  StepStats stats;
  std::vector<uint32_t> times;
  Clock::duration span;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stats.steps = steps_;
    stats.queue_depth = static_cast<uint32_t>(queue_.size());
    times.swap(step_us_);
    span = Clock::now() - std::exchange(stats_since_, Clock::now());
  }
  if (times.empty()) {
    return stats;
  }
  std::sort(times.begin(), times.end());
  stats.step_us_p50 = times[times.size() / 2];
  stats.step_us_p99 = times[times.size() * 99 / 100];
  const double total = std::accumulate(times.begin(), times.end(), 0.0);
  stats.busy = static_cast<float>(std::min(1.0, total / std::max<uint32_t>(1, Micros(span))));
  return stats;
}

}  // namespace sluice::worker
