// Cluster: the life of one `sluice up`: loader, controller, workers, in this order; ready; perhaps
// one prompt; the end.
#pragma once

#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "proto/sluice/v1/admin.grpc.pb.h"
#include "services/cli/answer_stream.h"
#include "services/cli/cluster_commands.h"
#include "services/cli/progress.h"
#include "services/cli/sampling_flags.h"
#include "services/cli/signals.h"
#include "services/cli/supervisor.h"

namespace sluice::cli {

class Cluster {
 public:
  // `signals` must outlive it. Use it from the main thread only: children end with the thread that
  // starts them.
  Cluster(UpOptions options, SamplingFlags sampling, ClusterPaths paths, SignalQueue* signals);
  ~Cluster();

  // Starts everything, stays until a signal, a failure or (--once) the answer, stops everything.
  // The exit code of `sluice up`: 0 after a signal or an answer, 1 otherwise.
  int Run(std::vector<WorkerSpec> workers);

 private:
  enum class Phase { kLoader, kController, kLoading, kReady, kAnswering, kStopping };

  absl::Status StartLoader();
  absl::Status
  Step();  // What the phase waits for, without blocking for longer than an RPC's deadline
  absl::Status WaitForLoader();
  absl::Status WaitForController();
  absl::Status WaitUntilServing();
  void OnServing();
  void StartAnswer();
  void StopChildren();
  void OnSignal(int number);
  absl::Status StartChild(const std::string& name, std::vector<std::string> command, int stop_rank);
  std::string LogPath(const std::string& name) const;
  void Fail(const absl::Status& status);

  const UpOptions options_;
  const SamplingFlags sampling_;
  const ClusterPaths paths_;
  SignalQueue* const signals_;
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
  // --once: runs beside the supervision; written by the thread before `answered_`.
  std::thread answer_thread_;
  grpc::ClientContext answer_context_;
  StreamedAnswer answer_;
  std::atomic<bool> answered_{false};
};

}  // namespace sluice::cli
