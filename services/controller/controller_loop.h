// ControllerLoop: the one thread that owns coordinator, scheduler and live requests. Others post
// work to it; it sends steps, takes frames, and tells each request's sink what happened.
//
// Order of one round: what was posted; what is due by time; steps that can be sent; then messages
// to clients, so that the stages compute while text is made.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "proto/sluice/v1/admin.pb.h"
#include "proto/sluice/v1/model.pb.h"
#include "services/controller/attach_service.h"
#include "services/controller/controller_metrics.h"
#include "services/controller/coordinator.h"
#include "services/controller/live_request.h"
#include "services/controller/model_catalog.h"
#include "services/controller/pipeline.h"
#include "services/controller/request_meter.h"
#include "services/controller/scheduler.h"

namespace sluice::controller {

struct LoopOptions {
  CoordinatorOptions coordinator;
  uint32_t max_queue = 64;             // Requests that wait for room
  uint64_t max_queue_tokens = 262144;  // Of their prompts together
};

class ControllerLoop final : public WorkerListener,
                             public PipelineListener,
                             private Coordinator::Observer {
 public:
  // `pipeline` must outlive the loop. `on_ready` is told of each change of readiness, on the loop's
  // thread.
  ControllerLoop(const LoopOptions& options, Pipeline* pipeline,
                 std::function<void(bool)> on_ready);
  // Stops.
  ~ControllerLoop() override;

  // `controller_address`: the internal listener, as workers reach it. What was posted before is
  // done now.
  void Start(const std::string& controller_address);
  // Fails what lives and ends the thread. Later calls of Submit fail their sinks at once.
  void Stop();

  // All thread-safe:

  void SetModel(const std::shared_ptr<const ServedModel>& model);
  // There is no model yet, and why.
  void OnModelRefused(const absl::Status& status);
  // Handles are never used again.
  uint64_t NewHandle() { return next_handle_++; }
  // Takes a request under a new handle; what becomes of it, a refusal too, goes to the sink, which
  // must live until its OnEnd.
  void Submit(uint64_t handle, GenerationRequest request, ResponseSink* sink);
  // The client has gone: the sink gets OnEnd(CANCELLED) if it has had none.
  void Drop(uint64_t handle);
  // Ends a live request by its id; tells whether there was one.
  void CancelById(const std::string& request_id, std::function<void(bool)> done);
  // Refuses new requests, waits for live ones, fails those that are left at the timeout; tells how
  // many.
  void Drain(std::chrono::milliseconds timeout, std::function<void(uint32_t)> done);
  // The state, for people.
  void GetCluster(std::function<void(v1::GetClusterResponse)> done);
  // The map and its table for people. nullopt: no plan.
  void GetDeviceMap(std::function<void(std::optional<v1::DeviceMap>, std::string)> done);
  // Limits of the attached workers and the options that a plan would use now.
  void GetPlanning(std::function<void(plan::MaxMemory, plan::PlanOptions)> done);

  // What it has counted, for a scrape; does not wait for the loop.
  void Collect(metrics::Page* page) const;
  ControllerMetrics& metrics() { return metrics_; }
  bool serving() const { return serving_; }
  uint32_t max_model_len() const { return max_model_len_; }  // 0: never served yet
  v1::ModelState model_state() const { return model_state_; }
  std::shared_ptr<const ServedModel> model() const;

  // WorkerListener
  absl::Status OnHello(uint64_t attachment, const internal::v1::WorkerHello& hello,
                       std::shared_ptr<OrderChannel> channel) override;
  void OnWorkerEvent(uint64_t attachment, internal::v1::AttachRequest event) override;
  void OnDetached(uint64_t attachment) override;
  uint64_t current_epoch() const override { return epoch_; }
  void OnFrame(internal::v1::TokenFrame frame) override;
  void OnTokensBroken(uint64_t epoch) override;

  // PipelineListener
  void OnPipelineOpen(uint64_t epoch) override;
  void OnPipelineBroken(uint64_t epoch, const absl::Status& status) override;

 private:
  using Task = std::function<void()>;
  struct Live {
    std::unique_ptr<LiveRequest> request;
    RequestMeter meter;
  };

  // Coordinator::Observer
  void OpenPipeline(uint64_t epoch, const std::vector<std::string>& addresses) override;
  void OnServing(uint64_t epoch, const plan::DeviceMapPlan& plan) override;
  void OnLost(const absl::Status& status) override;

  // False: stopped, and the task is gone.
  bool Post(Task task);
  void Run();
  void Round();
  void OnTime(TimePoint now);
  void SendSteps();
  void Deliver();
  void Accept(uint64_t handle, GenerationRequest request, ResponseSink* sink);
  void FailAll(const absl::Status& status);
  absl::Status NotServing() const;
  void Publish();
  void PublishMetrics(bool serving);
  void PublishWorkers();
  void Finished(const LiveRequest& request);
  v1::GetClusterResponse Cluster() const;

  const LoopOptions options_;
  Pipeline* const pipeline_;
  const std::function<void(bool)> on_ready_;
  ControllerMetrics metrics_;

  // Of the loop's thread
  Coordinator coordinator_;
  std::unique_ptr<Scheduler> scheduler_;  // Of the epoch that serves
  std::map<uint64_t, Live> live_;
  std::map<std::string, uint64_t> by_request_id_;
  v1::SchedulerStats totals_;         // Of epochs gone by, and of requests
  std::optional<TimePoint> lost_at_;  // Served, and does not now
  bool draining_ = false;
  TimePoint drain_until_{};
  std::vector<std::function<void(uint32_t)>> drain_done_;

  // Read by other threads
  std::atomic<bool> serving_{false};
  std::atomic<uint32_t> max_model_len_{0};
  std::atomic<uint64_t> epoch_{0};
  std::atomic<v1::ModelState> model_state_{v1::MODEL_STATE_WAITING};
  std::atomic<uint64_t> next_handle_{1};

  mutable std::mutex mutex_;  // Guards what follows
  std::condition_variable wake_;
  std::vector<Task> tasks_;
  std::shared_ptr<const ServedModel> model_;
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace sluice::controller
