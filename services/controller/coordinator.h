// Coordinator: from attached workers to a pipeline that serves, and back when one is lost. A state
// machine without threads, clock or gRPC; owned by the controller's loop.
//
//   waiting ─ all workers ─► loading(epoch) ─ all ready ─► connecting ─ stream open ─► serving
//      ▲                           │                           │                          │
//      └─── a worker of the plan is lost or faults, a stream breaks, a step hangs ────────┘
//
// Each plan has a new epoch, higher than any that an attached worker has seen. On a loss the other
// workers get a halt, keep their weights, and are configured again when all expected workers are
// back.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "proto/sluice/internal/v1/weights.pb.h"
#include "services/controller/sequence.h"
#include "services/controller/worker_registry.h"
#include "services/plan/device_map.h"

namespace sluice::controller {

struct CoordinatorOptions {
  uint32_t expected_workers = 0;  // 0: the devices of max_memory, or one worker when that is empty
  plan::MaxMemory max_memory;     // Empty: what each worker says it may use
  plan::PlanOptions plan;         // kv_element_bytes is chosen by the kind of the devices
  std::string loader_address;
  std::string controller_address;  // Of the internal listener, as workers reach it
  std::string host_id;             // rpc::HostId() of this process
};

class Coordinator {
 public:
  enum class State { kWaiting, kLoading, kConnecting, kServing };

  // What the coordinator asks for. Called on the loop's thread from inside the event functions.
  class Observer {
   public:
    virtual ~Observer() = default;
    // Open the step stream to stage 0, at the first address that answers.
    virtual void OpenPipeline(uint64_t epoch, const std::vector<std::string>& addresses) = 0;
    // Steps may be sent.
    virtual void OnServing(uint64_t epoch, const plan::DeviceMapPlan& plan) = 0;
    // The plan is over: close the stream, fail what lives.
    virtual void OnLost(const absl::Status& status) = 0;
  };

  Coordinator(const CoordinatorOptions& options, Observer* observer);

  // Of the internal listener, as workers reach it. Before any event.
  void set_controller_address(const std::string& address) { options_.controller_address = address; }

  // From the loader; once.
  void SetModel(TimePoint now, std::shared_ptr<const internal::v1::PlanShardsResponse> model);

  // There is no model yet, and why: a loader that cannot be reached is waited for, other errors are
  // the model's.
  void OnModelRefused(const absl::Status& status);

  absl::Status OnHello(TimePoint now, uint64_t attachment, const internal::v1::WorkerHello& hello,
                       std::shared_ptr<OrderChannel> channel);
  void OnEvent(TimePoint now, uint64_t attachment, const internal::v1::AttachRequest& event);
  void OnDetached(TimePoint now, uint64_t attachment);
  void OnPipelineOpen(uint64_t epoch);
  // A stream of the data plane broke, a step hung, or a stage broke its contract. Other epochs are
  // ignored.
  void OnPipelineLost(TimePoint now, uint64_t epoch, const absl::Status& status);
  void OnTick(TimePoint now);  // Plans again when the wait after a fault is over

  State state() const { return state_; }
  uint64_t epoch() const { return epoch_; }
  bool has_served() const { return has_served_; }
  const std::string& reason() const {
    return reason_;
  }  // Why it is in this state, and what is awaited
  const std::optional<plan::DeviceMapPlan>& plan() const { return plan_; }  // Of the current epoch
  const WorkerRegistry& workers() const { return registry_; }
  uint32_t expected_workers() const;
  // Position of a device in the current plan; -1: none.
  int StageOf(const std::string& device) const;
  // Limits of the attached workers, cut to max_memory.
  plan::MaxMemory Limits() const;
  plan::PlanOptions PlanningOptions() const;

 private:
  bool AllAttached() const;
  void OnWorkersChanged(TimePoint now);
  void TryPlan(TimePoint now);
  void SendConfigure();
  internal::v1::ShardAssignment Assignment(size_t stage) const;
  std::vector<std::string> AddressesFor(const AttachedWorker& target,
                                        const std::string& from_host) const;
  void OnReady(AttachedWorker* worker, const internal::v1::WorkerReady& ready);
  void Lose(TimePoint now, const std::string& why, bool wait);

  CoordinatorOptions options_;
  Observer* observer_;
  WorkerRegistry registry_;
  std::shared_ptr<const internal::v1::PlanShardsResponse> model_;
  State state_ = State::kWaiting;
  uint64_t epoch_ = 0;
  bool has_served_ = false;
  std::string reason_;
  std::optional<plan::DeviceMapPlan> plan_;
  TimePoint plan_after_{};  // Not before: a plan that faults at once must not spin
  std::chrono::milliseconds wait_{0};
  bool did_not_fit_ = false;  // The last plan was refused: other workers may change that at once
};

}  // namespace sluice::controller
