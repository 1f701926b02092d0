#include "services/controller/coordinator.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/core/fault_point.h"
#include "services/rpc/error_details.h"
#include "services/rpc/log.h"

namespace sluice::controller {
namespace {

using internal::v1::AttachRequest;
using internal::v1::AttachResponse;
using internal::v1::ShardAssignment;

constexpr std::chrono::milliseconds kFirstWait{500};
constexpr std::chrono::milliseconds kLongestWait{10000};
constexpr int64_t kRetryMs = 1000;

bool IsUnix(const std::string& address) { return address.rfind("unix:", 0) == 0; }

}  // namespace

Coordinator::Coordinator(const CoordinatorOptions& options, Observer* observer)
    : options_(options), observer_(observer), reason_("waiting for the loader") {}

uint32_t Coordinator::expected_workers() const {
  if (options_.expected_workers > 0) {
    return options_.expected_workers;
  }
  return options_.max_memory.empty() ? 1 : static_cast<uint32_t>(options_.max_memory.size());
}

void Coordinator::SetModel(TimePoint now,
                           std::shared_ptr<const internal::v1::PlanShardsResponse> model) {
  model_ = std::move(model);
  TryPlan(now);
}

void Coordinator::OnModelRefused(const absl::Status& status) {
  const bool wait = absl::IsUnavailable(status) || absl::IsDeadlineExceeded(status);
  reason_ = absl::StrCat(wait ? "waiting for the loader at " + options_.loader_address + ": "
                              : "the model cannot be served: ",
                         std::string(status.message()));
}

absl::Status Coordinator::OnHello(TimePoint now, uint64_t attachment,
                                  const internal::v1::WorkerHello& hello,
                                  std::shared_ptr<OrderChannel> channel) {
  if (absl::Status status = registry_.Add(attachment, hello, std::move(channel)); !status.ok()) {
    rpc::LogWarning("worker_refused", {{"worker_id", hello.worker_id()}, {"status", status}});
    return status;
  }
  SLUICE_FAULT_POINT("controller.worker_attached");
  rpc::LogInfo("worker_attached", {{"worker_id", hello.worker_id()},
                                   {"device", hello.device_name()},
                                   {"memory_bytes", hello.memory_bytes()},
                                   {"workers", registry_.size()}});
  OnWorkersChanged(now);
  return absl::OkStatus();
}

void Coordinator::OnEvent(TimePoint now, uint64_t attachment, const AttachRequest& event) {
  AttachedWorker* worker = registry_.Find(attachment);
  if (worker == nullptr) {
    return;
  }
  switch (event.event_case()) {
    case AttachRequest::kLoadProgress:
      if (event.load_progress().epoch() == epoch_) {
        worker->progress = event.load_progress();
      }
      break;
    case AttachRequest::kReady:
      OnReady(worker, event.ready());
      break;
    case AttachRequest::kStats:
      worker->stats = event.stats();
      break;
    case AttachRequest::kFault:
      rpc::LogError("worker_fault", {{"worker_id", worker->hello.worker_id()},
                                     {"epoch", event.fault().epoch()},
                                     {"code", event.fault().code()},
                                     {"message", event.fault().message()}});
      if (event.fault().epoch() == epoch_ && StageOf(worker->device) >= 0) {
        worker->state = v1::WORKER_STATE_FAULT;
        worker->fault = event.fault().message();
        Lose(now, absl::StrCat("worker ", worker->hello.worker_id(), ": ", worker->fault),
             /*wait=*/true);
      }
      break;
    case AttachRequest::kHello:
    case AttachRequest::EVENT_NOT_SET:
      worker->channel->Close();  // Not the protocol
      break;
  }
}

void Coordinator::OnReady(AttachedWorker* worker, const internal::v1::WorkerReady& ready) {
  const int stage = StageOf(worker->device);
  if (state_ != State::kLoading || ready.epoch() != epoch_ || stage < 0) {
    return;
  }
  worker->ready = ready;
  SLUICE_FAULT_POINT("controller.worker_ready");
  worker->state = v1::WORKER_STATE_READY;
  rpc::LogInfo("worker_ready", {{"worker_id", worker->hello.worker_id()},
                                {"epoch", epoch_},
                                {"stage", stage},
                                {"weight_bytes", ready.weight_bytes()},
                                {"kv_bytes", ready.kv_bytes()},
                                {"transport", ready.transport()}});
  for (const plan::StagePlan& other : plan_->stages) {
    if (registry_.FindDevice(other.device)->state != v1::WORKER_STATE_READY) {
      return;
    }
  }
  state_ = State::kConnecting;
  reason_ = "connecting to the first stage";
  observer_->OpenPipeline(
      epoch_, AddressesFor(*registry_.FindDevice(plan_->stages[0].device), options_.host_id));
}

void Coordinator::OnDetached(TimePoint now, uint64_t attachment) {
  const AttachedWorker* worker = registry_.Find(attachment);
  if (worker == nullptr) {
    return;
  }
  const std::string id = worker->hello.worker_id();
  const bool in_plan = StageOf(worker->device) >= 0;
  rpc::LogWarning("worker_lost", {{"worker_id", id}, {"epoch", epoch_}, {"in_plan", in_plan}});
  registry_.Remove(attachment);
  if (in_plan) {
    Lose(now, absl::StrCat("worker ", id, " was lost"), /*wait=*/false);
  }
  OnWorkersChanged(now);
}

void Coordinator::OnPipelineOpen(uint64_t epoch) {
  if (state_ != State::kConnecting || epoch != epoch_) {
    return;
  }
  state_ = State::kServing;
  has_served_ = true;
  wait_ = std::chrono::milliseconds(0);
  reason_ = "serving";
  rpc::LogInfo("serving", {{"epoch", epoch_},
                           {"stages", plan_->stages.size()},
                           {"num_blocks", plan_->num_blocks},
                           {"max_model_len", plan_->max_model_len}});
  observer_->OnServing(epoch_, *plan_);
}

void Coordinator::OnPipelineLost(TimePoint now, uint64_t epoch, const absl::Status& status) {
  if (epoch == epoch_ && plan_.has_value()) {
    rpc::LogError("pipeline_lost", {{"epoch", epoch}, {"status", status}});
    Lose(now, std::string(status.message()), /*wait=*/true);
  }
}

void Coordinator::OnTick(TimePoint now) {
  if (state_ == State::kWaiting && plan_after_ != TimePoint{} && now >= plan_after_) {
    TryPlan(now);
  }
}

// `wait`: the same workers may fail again at once. A worker that has gone needs no wait: it comes
// back when it can.
void Coordinator::Lose(TimePoint now, const std::string& why, bool wait) {
  if (!plan_.has_value()) {
    return;
  }
  SLUICE_FAULT_POINT("controller.worker_lost");
  AttachResponse halt;
  halt.mutable_halt()->set_epoch(epoch_);
  for (const plan::StagePlan& stage : plan_->stages) {
    if (const AttachedWorker* worker = registry_.FindDevice(stage.device)) {
      worker->channel->Send(halt);
      if (worker->state != v1::WORKER_STATE_FAULT) {
        registry_.Find(worker->attachment)->state = v1::WORKER_STATE_ATTACHED;
      }
    }
  }
  if (wait) {
    wait_ = wait_.count() == 0 ? kFirstWait : std::min(wait_ * 2, kLongestWait);
  }
  plan_after_ = now + (wait ? wait_ : std::chrono::milliseconds(0));
  state_ = State::kWaiting;
  reason_ = why;
  plan_.reset();
  absl::Status status =
      absl::UnavailableError("a worker was lost: the answer is not whole; send the request again");
  rpc::AttachErrorInfo("WORKER_LOST", {}, &status);
  rpc::AttachRetryInfo(kRetryMs, &status);
  observer_->OnLost(status);
}

int Coordinator::StageOf(const std::string& device) const {
  if (plan_.has_value()) {
    for (size_t i = 0; i < plan_->stages.size(); ++i) {
      if (plan_->stages[i].device == device) {
        return static_cast<int>(i);
      }
    }
  }
  return -1;
}

plan::MaxMemory Coordinator::Limits() const {
  plan::MaxMemory limits;
  for (const AttachedWorker* worker : registry_.All()) {
    const auto given = options_.max_memory.find(worker->device);
    if (given != options_.max_memory.end()) {
      limits[worker->device] = std::min(given->second, worker->hello.memory_bytes());
    } else if (options_.max_memory.empty()) {
      limits[worker->device] = worker->hello.memory_bytes();
    }
  }
  return limits;
}

plan::PlanOptions Coordinator::PlanningOptions() const {
  plan::PlanOptions options = options_.plan;
  options.kv_element_bytes = 2;
  for (const AttachedWorker* worker : registry_.All()) {
    if (worker->hello.device_kind() == "cpu") {
      options.kv_element_bytes = 4;
    }
  }
  return options;
}

bool Coordinator::AllAttached() const {
  if (registry_.size() < expected_workers()) {
    return false;
  }
  return std::all_of(options_.max_memory.begin(), options_.max_memory.end(),
                     [this](const auto& entry) {
                       return entry.second == 0 || registry_.FindDevice(entry.first) != nullptr;
                     });
}

void Coordinator::OnWorkersChanged(TimePoint now) {
  if (std::exchange(did_not_fit_, false)) {
    plan_after_ = now;
  }
  TryPlan(now);
}

void Coordinator::TryPlan(TimePoint now) {
  if (state_ != State::kWaiting || now < plan_after_ || model_ == nullptr) {
    return;
  }
  if (!AllAttached()) {
    const std::string awaited = absl::StrCat("waiting for workers: ", registry_.size(), " of ",
                                             expected_workers(), " attached");
    reason_ = has_served_ || epoch_ > 0
                  ? absl::StrCat(reason_.substr(0, reason_.find("; waiting")), "; ", awaited)
                  : awaited;
    return;
  }
  auto plan = plan::PlanDeviceMap(*model_, Limits(), PlanningOptions());
  if (!plan.ok() || plan->stages.empty()) {
    reason_ =
        plan.ok() ? "no pipeline can follow the device map" : std::string(plan.status().message());
    plan_after_ = now + kLongestWait;
    did_not_fit_ = true;
    rpc::LogError("plan_failed", {{"reason", reason_}});
    return;
  }
  plan_ = *std::move(plan);
  for (const AttachedWorker* worker : registry_.All()) {
    epoch_ = std::max(epoch_, worker->hello.epoch());
  }
  ++epoch_;
  SLUICE_FAULT_POINT("controller.planned");
  state_ = State::kLoading;
  reason_ = "workers pull their layers";
  SendConfigure();
}

void Coordinator::SendConfigure() {
  for (size_t stage = 0; stage < plan_->stages.size(); ++stage) {
    const plan::StagePlan& planned = plan_->stages[stage];
    AttachedWorker* worker = registry_.Find(registry_.FindDevice(planned.device)->attachment);
    worker->state = v1::WORKER_STATE_LOADING;
    worker->fault.clear();
    worker->progress.Clear();
    worker->ready.Clear();
    rpc::LogInfo("stage_planned", {{"epoch", epoch_},
                                   {"stage", stage},
                                   {"worker_id", worker->hello.worker_id()},
                                   {"layer_begin", planned.layer_begin},
                                   {"layer_end", planned.layer_end},
                                   {"weight_bytes", planned.weight_bytes},
                                   {"kv_bytes", planned.kv_bytes}});
    AttachResponse order;
    order.mutable_configure()->set_epoch(epoch_);
    *order.mutable_configure()->mutable_assignment() = Assignment(stage);
    worker->channel->Send(order);
    SLUICE_FAULT_POINT("controller.after_configure");
  }
}

ShardAssignment Coordinator::Assignment(size_t stage) const {
  const plan::StagePlan& planned = plan_->stages[stage];
  const size_t stages = plan_->stages.size();
  ShardAssignment assignment;
  assignment.set_model_digest(model_->model_digest());
  assignment.set_stage(static_cast<uint32_t>(stage));
  assignment.set_stages(static_cast<uint32_t>(stages));
  assignment.mutable_layers()->set_begin(planned.layer_begin);
  assignment.mutable_layers()->set_end(planned.layer_end);
  assignment.set_has_embedding(planned.has_embedding);
  assignment.set_has_head(planned.has_head);
  assignment.set_loader_address(options_.loader_address);
  *assignment.mutable_config() = model_->config();
  assignment.set_block_size(options_.plan.block_size);
  assignment.set_num_blocks(plan_->num_blocks);
  assignment.set_max_batch_tokens(options_.plan.max_batch_tokens);
  assignment.set_max_batch_size(options_.plan.max_batch_size);
  assignment.set_max_model_len(plan_->max_model_len);
  assignment.set_controller_address(options_.controller_address);
  if (stages > 1) {
    const AttachedWorker* self = registry_.FindDevice(planned.device);
    const AttachedWorker* next = registry_.FindDevice(plan_->stages[(stage + 1) % stages].device);
    for (const std::string& address : AddressesFor(*next, self->hello.host_id())) {
      assignment.add_next_addresses(address);
    }
  }
  return assignment;
}

// A Unix socket is of use on its own host only.
std::vector<std::string> Coordinator::AddressesFor(const AttachedWorker& target,
                                                   const std::string& from_host) const {
  std::vector<std::string> addresses;
  for (const std::string& address : target.hello.addresses()) {
    if (!IsUnix(address) || (!from_host.empty() && target.hello.host_id() == from_host)) {
      addresses.push_back(address);
    }
  }
  return addresses;
}

}  // namespace sluice::controller
