// Cluster: the life of one `sluice up`: loader, controller, workers, in this order; ready; perhaps
// a task; the end.
#pragma once

#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "proto/sluice/v1/admin.grpc.pb.h"
#include "services/cli/cluster_commands.h"
#include "services/cli/cluster_task.h"
#include "services/cli/progress.h"
#include "services/cli/signals.h"
#include "services/cli/supervisor.h"

namespace sluice::cli {

class Cluster {
 public:
  // `signals` and `task` (null: none) must outlive it. Use it from the main thread only: children end
  // with the thread that starts them.
  Cluster(UpOptions options, ClusterPaths paths, SignalQueue* signals, ClusterTask* task);
  ~Cluster();

  // Starts everything, stays until a signal, a failure or the end of the task, stops everything.
  // The exit code of `sluice up`: 0 after a signal or a whole task, 1 otherwise.
  int Run(std::vector<WorkerSpec> workers);

 private:
  enum class Phase { kLoader, kController, kLoading, kReady, kTask, kStopping };

  absl::Status StartLoader();
  absl::Status
  Step();  // What the phase waits for, without blocking for longer than an RPC's deadline
  absl::Status WaitForLoader();
  absl::Status WaitForController();
  absl::Status WaitUntilServing();
  void OnServing();
  void StartTask();
  void StopChildren();
  void OnSignal(int number);
  absl::Status StartChild(const std::string& name, std::vector<std::string> command, int stop_rank);
  std::string LogPath(const std::string& name) const;
  void Fail(const absl::Status& status);

  const UpOptions options_;
  const ClusterPaths paths_;
  SignalQueue* const signals_;
  ClusterTask* const task_;
  std::vector<WorkerSpec> workers_;
  ProgressDisplay display_;
  Supervisor supervisor_;
  Phase phase_ = Phase::kLoader;
  int exit_code_ = 0;
  bool was_ready_ = false;
  int refused_plans_ = 0;  // Looks at the cluster in a row that found a plan refused
  std::string loader_address_;
  ControllerAddresses addresses_;
  std::unique_ptr<v1::AdminService::Stub> admin_;
  // Runs the task beside the supervision; writes its status before `task_done_`.
  std::thread task_thread_;
  absl::Status task_status_;
  std::atomic<bool> task_done_{false};
};

}  // namespace sluice::cli
