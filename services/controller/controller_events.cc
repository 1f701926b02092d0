// The part of ControllerLoop that other threads call: workers, the pipeline, and questions about
// the state.
#include <future>
#include <utility>

#include "kernels/core/fault_point.h"
#include "services/controller/controller_loop.h"
#include "services/controller/device_map_view.h"

namespace sluice::controller {
namespace {

TimePoint Now() { return std::chrono::steady_clock::now(); }

}  // namespace

void ControllerLoop::SetModel(const std::shared_ptr<const ServedModel>& model) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    model_ = model;
  }
  Post([this, model] {
    coordinator_.SetModel(
        Now(), std::shared_ptr<const internal::v1::PlanShardsResponse>(model, &model->shards));
  });
}

void ControllerLoop::OnModelRefused(const absl::Status& status) {
  Post([this, status] { coordinator_.OnModelRefused(status); });
}

std::shared_ptr<const ServedModel> ControllerLoop::model() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return model_;
}

absl::Status ControllerLoop::OnHello(uint64_t attachment, const internal::v1::WorkerHello& hello,
                                     std::shared_ptr<OrderChannel> channel) {
  auto verdict = std::make_shared<std::promise<absl::Status>>();
  std::future<absl::Status> future = verdict->get_future();
  const bool posted = Post([this, attachment, hello, channel, verdict] {
    absl::Status status = coordinator_.OnHello(Now(), attachment, hello, channel);
    PublishWorkers();
    verdict->set_value(std::move(status));
  });
  return posted ? future.get() : absl::UnavailableError("the controller is shutting down");
}

void ControllerLoop::OnWorkerEvent(uint64_t attachment, internal::v1::AttachRequest event) {
  Post([this, attachment, event = std::move(event)] {
    coordinator_.OnEvent(Now(), attachment, event);
  });
}

void ControllerLoop::OnDetached(uint64_t attachment) {
  Post([this, attachment] {
    coordinator_.OnDetached(Now(), attachment);
    PublishWorkers();
  });
}

void ControllerLoop::PublishWorkers() {
  std::vector<std::string> attached;
  for (const AttachedWorker* worker : coordinator_.workers().All()) {
    attached.push_back(worker->hello.worker_id());
  }
  metrics_.SetWorkers(attached);
}

void ControllerLoop::Collect(metrics::Page* page) const {
  const std::shared_ptr<const ServedModel> served = model();
  metrics_.Collect(served == nullptr ? "" : served->name, page);
}

void ControllerLoop::OnFrame(internal::v1::TokenFrame frame) {
  Post([this, frame = std::move(frame)] {
    if (scheduler_ == nullptr) {
      return;
    }
    SLUICE_FAULT_POINT("controller.token_received");
    if (absl::Status status = scheduler_->OnFrame(Now(), frame); !status.ok()) {
      coordinator_.OnPipelineLost(Now(), frame.epoch(), status);
    }
  });
}

void ControllerLoop::OnTokensBroken(uint64_t epoch) {
  Post([this, epoch] {
    coordinator_.OnPipelineLost(Now(), epoch,
                                absl::UnavailableError("the last stage ended its token stream"));
  });
}

void ControllerLoop::OnPipelineOpen(uint64_t epoch) {
  Post([this, epoch] { coordinator_.OnPipelineOpen(epoch); });
}

void ControllerLoop::OnPipelineBroken(uint64_t epoch, const absl::Status& status) {
  Post([this, epoch, status] { coordinator_.OnPipelineLost(Now(), epoch, status); });
}

void ControllerLoop::GetCluster(std::function<void(v1::GetClusterResponse)> done) {
  auto shared = std::make_shared<std::function<void(v1::GetClusterResponse)>>(std::move(done));
  if (!Post([this, shared] { (*shared)(Cluster()); })) {
    (*shared)({});
  }
}

v1::GetClusterResponse ControllerLoop::Cluster() const {
  v1::GetClusterResponse cluster;
  if (const auto served = model()) {
    cluster.set_model(served->name);
  }
  cluster.set_state(model_state_);
  cluster.set_reason(coordinator_.reason());
  cluster.set_epoch(coordinator_.epoch());
  cluster.set_expected_workers(coordinator_.expected_workers());
  for (const AttachedWorker* worker : coordinator_.workers().All()) {
    *cluster.add_workers() = ToWorker(*worker, coordinator_.StageOf(worker->device));
  }
  if (scheduler_ != nullptr) {
    v1::SchedulerStats* stats = cluster.mutable_scheduler();
    *stats = totals_;
    const SchedulerCounts counts = scheduler_->counts();
    const BlockAllocator& blocks = scheduler_->blocks();
    stats->set_queued_requests(counts.queued_requests);
    stats->set_running_sequences(counts.running_sequences);
    stats->set_free_blocks(blocks.free());
    stats->set_used_blocks(blocks.used());
    stats->set_cached_blocks(blocks.cached());
    stats->set_total_blocks(blocks.total());
    stats->set_steps(counts.steps);
    stats->set_step_us_p50(static_cast<uint64_t>(counts.step_p50.count()));
  }
  return cluster;
}

void ControllerLoop::GetDeviceMap(
    std::function<void(std::optional<v1::DeviceMap>, std::string)> done) {
  auto shared = std::make_shared<std::function<void(std::optional<v1::DeviceMap>, std::string)>>(
      std::move(done));
  const bool posted = Post([this, shared] {
    const std::optional<plan::DeviceMapPlan>& plan = coordinator_.plan();
    if (!plan.has_value()) {
      (*shared)(std::nullopt, "");
      return;
    }
    v1::DeviceMap map = ToDeviceMap(*plan, options_.coordinator.plan.block_size);
    map.set_epoch(coordinator_.epoch());
    for (v1::DeviceMapStage& stage : *map.mutable_stages()) {
      if (const AttachedWorker* worker = coordinator_.workers().FindDevice(stage.device())) {
        AddWorker(*worker, &stage);
      }
    }
    (*shared)(std::move(map), plan::ToText(*plan));
  });
  if (!posted) {
    (*shared)(std::nullopt, "");
  }
}

void ControllerLoop::GetPlanning(std::function<void(plan::MaxMemory, plan::PlanOptions)> done) {
  auto shared =
      std::make_shared<std::function<void(plan::MaxMemory, plan::PlanOptions)>>(std::move(done));
  const bool posted =
      Post([this, shared] { (*shared)(coordinator_.Limits(), coordinator_.PlanningOptions()); });
  if (!posted) {
    (*shared)({}, options_.coordinator.plan);
  }
}

}  // namespace sluice::controller
