#include "services/controller/controller_loop.h"

#include <future>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/core/fault_point.h"
#include "services/controller/device_map_view.h"
#include "services/rpc/error_details.h"
#include "services/rpc/log.h"

namespace sluice::controller {
namespace {

constexpr std::chrono::milliseconds kTickBusy{50};
constexpr std::chrono::milliseconds kTickIdle{500};
constexpr int64_t kRetryMs = 1000;

TimePoint Now() { return std::chrono::steady_clock::now(); }

absl::Status Unavailable(const std::string& reason, const std::string& message) {
  absl::Status status = absl::UnavailableError(message);
  rpc::AttachErrorInfo(reason, {}, &status);
  rpc::AttachRetryInfo(kRetryMs, &status);
  return status;
}

absl::Status ShuttingDown() { return Unavailable("DRAINING", "the server is shutting down"); }

}  // namespace

ControllerLoop::ControllerLoop(const LoopOptions& options, Pipeline* pipeline,
                               std::function<void(bool)> on_ready)
    : options_(options),
      pipeline_(pipeline),
      on_ready_(std::move(on_ready)),
      coordinator_(options.coordinator, this) {}

ControllerLoop::~ControllerLoop() { Stop(); }

void ControllerLoop::Start(const std::string& controller_address) {
  coordinator_.set_controller_address(controller_address);
  thread_ = std::thread([this] { Run(); });
}

void ControllerLoop::Stop() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  wake_.notify_one();
  if (thread_.joinable()) {
    thread_.join();
  }
}

bool ControllerLoop::Post(Task task) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (stop_) {
      return false;
    }
    tasks_.push_back(std::move(task));
    if (tasks_.size() > 1) {
      return true;  // The loop has been woken for the first one
    }
  }
  wake_.notify_one();
  return true;
}

void ControllerLoop::Run() {
  std::vector<Task> tasks;
  while (true) {
    {
      std::unique_lock<std::mutex> lock(mutex_);
      const auto tick = live_.empty() && !draining_ ? kTickIdle : kTickBusy;
      wake_.wait_for(lock, tick, [this] { return stop_ || !tasks_.empty(); });
      tasks.swap(tasks_);
      if (stop_ && tasks.empty()) {
        break;
      }
    }
    for (Task& task : tasks) {
      task();
    }
    tasks.clear();
    Round();
  }
  FailAll(ShuttingDown());
  pipeline_->Close();
  for (const auto& done : std::exchange(drain_done_, {})) {
    done(0);
  }
}

void ControllerLoop::Round() {
  OnTime(Now());
  SendSteps();
  Deliver();
  SendSteps();  // A stop string may have made room
  Publish();
}

void ControllerLoop::OnTime(TimePoint now) {
  coordinator_.OnTick(now);
  if (scheduler_ != nullptr) {
    scheduler_->Expire(now);
    const std::optional<TimePoint> hung = scheduler_->StepDeadline();
    if (hung.has_value() && now > *hung) {
      coordinator_.OnPipelineLost(now, coordinator_.epoch(),
                                  absl::DeadlineExceededError("a step takes too long: it hangs"));
    }
  }
  if (draining_ && !drain_done_.empty() && (live_.empty() || now >= drain_until_)) {
    const uint32_t ended = static_cast<uint32_t>(live_.size());
    FailAll(ShuttingDown());
    for (const auto& done : std::exchange(drain_done_, {})) {
      done(ended);
    }
  }
}

void ControllerLoop::SendSteps() {
  if (scheduler_ == nullptr) {
    return;
  }
  internal::v1::StepHeader step;
  while (scheduler_->NextStep(Now(), &step)) {
    SLUICE_FAULT_POINT("controller.before_step");
    pipeline_->Send(step);
    SLUICE_FAULT_POINT("controller.after_step");
    metrics_.steps.Add();
    uint32_t tokens = 0;
    for (const internal::v1::SequenceSlice& slice : step.sequences()) {
      tokens += slice.num_tokens();
    }
    if (tokens > 0) {
      metrics_.step_tokens.Observe(tokens);
    }
  }
}

void ControllerLoop::Deliver() {
  if (scheduler_ == nullptr) {
    return;
  }
  const TimePoint now = Now();
  for (const SchedulerEvent& event : scheduler_->TakeEvents()) {
    const auto it = live_.find(event.handle);
    if (it == live_.end()) {
      continue;
    }
    if (event.kind == SchedulerEvent::Kind::kToken) {
      totals_.set_generated_tokens(totals_.generated_tokens() + 1);
    }
    Live& live = it->second;
    SLUICE_FAULT_POINT("controller.before_client_write");
    live.meter.OnEvent(now, event);
    for (const uint32_t choice : live.request->OnEvent(now, event)) {
      live.meter.OnStopped(now, choice);
      scheduler_->EndSequence(event.handle, choice);
    }
    if (live.request->done()) {
      Finished(*live.request);
      live_.erase(it);
    }
  }
}

void ControllerLoop::Finished(const LiveRequest& request) {
  SLUICE_FAULT_POINT("controller.request_finished");
  by_request_id_.erase(request.request_id());
  totals_.set_finished_requests(totals_.finished_requests() + 1);
  rpc::LogInfo(
      "request_finished",
      {{"request_id", request.request_id()},
       {"prompt_tokens", request.spec().prompt.size()},
       {"tokens", request.tokens_sent()},
       {"ms",
        std::chrono::duration_cast<std::chrono::milliseconds>(Now() - request.arrival()).count()}});
}

void ControllerLoop::Submit(uint64_t handle, GenerationRequest request, ResponseSink* sink) {
  auto shared = std::make_shared<GenerationRequest>(std::move(request));
  if (!Post([this, handle, shared, sink] { Accept(handle, std::move(*shared), sink); })) {
    metrics_.Refused(ShuttingDown());
    sink->OnEnd(ShuttingDown());
  }
}

absl::Status ControllerLoop::NotServing() const {
  if (draining_) {
    return Unavailable("DRAINING", "the server is draining: send the request to another one");
  }
  if (scheduler_ == nullptr) {
    return Unavailable("NOT_SERVING",
                       "the model is not being served now: its workers are loading "
                       "or missing");
  }
  return absl::OkStatus();
}

void ControllerLoop::Accept(uint64_t handle, GenerationRequest request, ResponseSink* sink) {
  absl::Status status = NotServing();
  if (status.ok() && by_request_id_.count(request.request_id) != 0) {
    status = absl::AlreadyExistsError("request_id: a live request has this id");
    rpc::AttachErrorInfo("REQUEST_ID_IN_USE", {}, &status);
  }
  if (status.ok() &&
      request.spec.prompt.size() + request.spec.max_tokens > coordinator_.plan()->max_model_len) {
    status = Unavailable("NOT_SERVING", "the plan has changed meanwhile: send the request again");
  }
  if (status.ok()) {
    status = scheduler_->Submit(Now(), handle, request.spec);
  }
  if (!status.ok()) {
    metrics_.Refused(status);
    rpc::LogInfo("request_refused", {{"request_id", request.request_id},
                                     {"code", absl::StatusCodeToString(status.code())}});
    sink->OnEnd(status);
    return;
  }
  by_request_id_[request.request_id] = handle;
  RequestMeter meter(&metrics_, request.arrival, request.spec);
  live_.emplace(handle, Live{std::make_unique<LiveRequest>(std::move(request), sink), meter});
  SLUICE_FAULT_POINT("controller.after_admission");
}

void ControllerLoop::Drop(uint64_t handle) {
  Post([this, handle] {
    const auto it = live_.find(handle);
    if (it == live_.end()) {
      return;
    }
    if (scheduler_ != nullptr) {
      scheduler_->Drop(handle);
    }
    SLUICE_FAULT_POINT("controller.client_gone");
    it->second.meter.OnDropped(Now());
    it->second.request->Fail(absl::CancelledError("the client cancelled the request"));
    totals_.set_cancelled_requests(totals_.cancelled_requests() + 1);
    Finished(*it->second.request);
    live_.erase(it);
  });
}

void ControllerLoop::CancelById(const std::string& request_id, std::function<void(bool)> done) {
  auto shared = std::make_shared<std::function<void(bool)>>(std::move(done));
  const bool posted = Post([this, request_id, shared] {
    const auto it = by_request_id_.find(request_id);
    const bool found = it != by_request_id_.end() && scheduler_ != nullptr;
    if (found) {
      totals_.set_cancelled_requests(totals_.cancelled_requests() + 1);
      scheduler_->Cancel(it->second);
    }
    (*shared)(found);
  });
  if (!posted) {
    (*shared)(false);
  }
}

void ControllerLoop::Drain(std::chrono::milliseconds timeout, std::function<void(uint32_t)> done) {
  auto shared = std::make_shared<std::function<void(uint32_t)>>(std::move(done));
  const bool posted = Post([this, timeout, shared] {
    rpc::LogInfo("draining", {{"live_requests", live_.size()}, {"timeout_ms", timeout.count()}});
    draining_ = true;
    SLUICE_FAULT_POINT("controller.draining");
    drain_until_ = Now() + timeout;
    drain_done_.push_back(*shared);
  });
  if (!posted) {
    (*shared)(0);
  }
}

// Fails every live request: through the scheduler's events when there is one, so that both forget
// it.
void ControllerLoop::FailAll(const absl::Status& status) {
  if (scheduler_ != nullptr) {
    scheduler_->FailAll(status);
    Deliver();
  }
  for (auto& [handle, live] : live_) {
    metrics_.Failed(status);
    live.request->Fail(status);
    Finished(*live.request);
  }
  live_.clear();
}

void ControllerLoop::OpenPipeline(uint64_t epoch, const std::vector<std::string>& addresses) {
  pipeline_->Open(epoch, addresses, this);
  SLUICE_FAULT_POINT("controller.pipeline_open");
}

void ControllerLoop::OnServing(uint64_t epoch, const plan::DeviceMapPlan& plan) {
  SLUICE_FAULT_POINT("controller.serving");
  SchedulerLimits limits;
  limits.epoch = epoch;
  limits.stages = static_cast<uint32_t>(plan.stages.size());
  limits.num_blocks = plan.num_blocks;
  limits.block_size = options_.coordinator.plan.block_size;
  limits.max_batch_tokens = options_.coordinator.plan.max_batch_tokens;
  limits.max_batch_size = options_.coordinator.plan.max_batch_size;
  limits.max_queue = options_.max_queue;
  limits.max_queue_tokens = options_.max_queue_tokens;
  scheduler_ = std::make_unique<Scheduler>(limits);
  if (lost_at_.has_value()) {
    metrics_.recovery_seconds.Observe(std::chrono::duration<double>(Now() - *lost_at_).count());
    lost_at_.reset();
  }
  max_model_len_ = plan.max_model_len;
}

void ControllerLoop::OnLost(const absl::Status& status) {
  metrics_.plans_lost.Add();
  if (scheduler_ != nullptr) {
    lost_at_ = Now();
  }
  totals_.set_lost_requests(totals_.lost_requests() + live_.size());
  FailAll(status);
  scheduler_.reset();
  SLUICE_FAULT_POINT("controller.recovering");
  pipeline_->Close();
}

// Tells other threads what changed.
void ControllerLoop::Publish() {
  epoch_ = coordinator_.epoch();
  v1::ModelState state = v1::MODEL_STATE_WAITING;
  if (draining_) {
    state = v1::MODEL_STATE_DRAINING;
  } else if (coordinator_.state() == Coordinator::State::kServing) {
    state = v1::MODEL_STATE_SERVING;
  } else if (coordinator_.has_served()) {
    state = v1::MODEL_STATE_RECOVERING;
  } else if (coordinator_.state() != Coordinator::State::kWaiting) {
    state = v1::MODEL_STATE_LOADING;
  }
  model_state_ = state;
  const bool serving = state == v1::MODEL_STATE_SERVING;
  PublishMetrics(serving);
  if (serving_.exchange(serving) != serving) {
    on_ready_(serving);
  }
}

void ControllerLoop::PublishMetrics(bool serving) {
  metrics_.serving.Set(serving ? 1 : 0);
  metrics_.epoch.Set(static_cast<double>(epoch_));
  metrics_.workers_expected.Set(coordinator_.expected_workers());
  const bool has = scheduler_ != nullptr;
  const double blocks = has ? scheduler_->blocks().total() : 0;
  metrics_.kv_usage.Set(blocks > 0 ? scheduler_->blocks().used() / blocks : 0);
  metrics_.requests_running.Set(has ? static_cast<double>(scheduler_->running_sequences()) : 0);
  metrics_.requests_waiting.Set(has ? scheduler_->queued_requests() : 0);
  metrics_.steps_in_flight.Set(has ? static_cast<double>(scheduler_->steps_in_flight()) : 0);
}

}  // namespace sluice::controller
