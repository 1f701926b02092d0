#include "services/cli/cluster.h"

#include <signal.h>

#include <algorithm>
#include <fstream>
#include <sstream>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "kernels/core/status_macros.h"
#include "services/rpc/channel.h"

namespace sluice::cli {
namespace {

// The controller drains first, while loader and workers still answer.
constexpr int kControllerRank = 0;
constexpr int kOthersRank = 1;
constexpr std::chrono::milliseconds kTick{50};
constexpr std::chrono::milliseconds kAdminDeadline{1000};
// A refused plan must be seen this often before it counts: a worker may be on its way.
constexpr int kRefusalsToFail = 10;
constexpr size_t kLogTailBytes = 2000;

std::string TailOf(const std::string& path) {
  std::ifstream file(path);
  std::stringstream content;
  content << file.rdbuf();
  const std::string text = content.str();
  if (text.size() <= kLogTailBytes) {
    return text;
  }
  const size_t line = text.find('\n', text.size() - kLogTailBytes);
  return line == std::string::npos ? text.substr(text.size() - kLogTailBytes)
                                   : text.substr(line + 1);
}

}  // namespace

Cluster::Cluster(UpOptions options, ClusterPaths paths, SignalQueue* signals, ClusterTask* task)
    : options_(std::move(options)),
      paths_(std::move(paths)),
      signals_(signals),
      task_(task),
      display_(stderr),
      supervisor_(SupervisorOptions(), [this](const std::string& line) {
        display_.Note("sluice: " + line);
        if (phase_ == Phase::kReady) {
          phase_ = Phase::kLoading;  // Show the way back to ready
        }
      }) {}

Cluster::~Cluster() {
  if (task_thread_.joinable()) {
    task_->Cancel();
    task_thread_.join();
  }
}

std::string Cluster::LogPath(const std::string& name) const {
  return absl::StrCat(options_.log_dir.empty() ? paths_.folder : options_.log_dir, "/", name,
                      ".log");
}

absl::Status Cluster::StartChild(const std::string& name, std::vector<std::string> command,
                                 int stop_rank) {
  return supervisor_.Start({name, std::move(command), LogPath(name), stop_rank});
}

absl::Status Cluster::StartLoader() {
  display_.Show("opening the model");
  return StartChild("loader", LoaderCommand(options_, paths_, ""), kOthersRank);
}

absl::Status Cluster::WaitForLoader() {
  auto address = ReadLoaderAddress(paths_.loader_file());
  if (!address.ok()) {
    return absl::IsNotFound(address.status()) ? absl::OkStatus() : address.status();
  }
  loader_address_ = *address;
  // A restarted loader must be found where the others know it.
  supervisor_.SetCommand("loader", LoaderCommand(options_, paths_, loader_address_));
  display_.Show("starting the controller");
  phase_ = Phase::kController;
  return StartChild("controller",
                    ControllerCommand(options_, paths_, loader_address_,
                                      static_cast<int>(workers_.size()), ControllerAddresses()),
                    kControllerRank);
}

absl::Status Cluster::WaitForController() {
  auto addresses = ReadControllerAddresses(paths_.controller_file());
  if (!addresses.ok()) {
    return absl::IsNotFound(addresses.status()) ? absl::OkStatus() : addresses.status();
  }
  addresses_ = *addresses;
  supervisor_.SetCommand("controller",
                         ControllerCommand(options_, paths_, loader_address_,
                                           static_cast<int>(workers_.size()), addresses_));
  admin_ = v1::AdminService::NewStub(
      rpc::MakeChannel(addresses_.admin_address, rpc::ChannelKind::kControl));
  phase_ = Phase::kLoading;
  for (const WorkerSpec& worker : workers_) {
    SLUICE_RETURN_IF_ERROR(
        StartChild(worker.id, WorkerCommand(options_, paths_, worker, addresses_.internal_address),
                   kOthersRank));
  }
  return absl::OkStatus();
}

absl::Status Cluster::WaitUntilServing() {
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + kAdminDeadline);
  v1::GetClusterResponse cluster;
  if (!admin_->GetCluster(&context, {}, &cluster).ok()) {
    return absl::OkStatus();  // It is starting, or starting again
  }
  if (cluster.state() == v1::MODEL_STATE_SERVING) {
    OnServing();
    return absl::OkStatus();
  }
  display_.Show(ProgressLine(cluster, display_.width()));
  const bool complete = cluster.workers_size() >= static_cast<int>(cluster.expected_workers());
  const bool refused = cluster.state() == v1::MODEL_STATE_WAITING && complete &&
                       !absl::StrContains(cluster.reason(), "waiting for");
  refused_plans_ = refused ? refused_plans_ + 1 : 0;
  if (!was_ready_ && refused_plans_ >= kRefusalsToFail) {
    return absl::FailedPreconditionError(cluster.reason());
  }
  return absl::OkStatus();
}

void Cluster::OnServing() {
  display_.Clear();
  phase_ = Phase::kReady;
  if (was_ready_) {
    display_.Note("sluice: serving again");
    return;
  }
  was_ready_ = true;
  supervisor_.ExpectToStay();
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + kAdminDeadline);
  v1::GetDeviceMapResponse map;
  if (admin_->GetDeviceMap(&context, {}, &map).ok()) {
    display_.Note(map.text());
  }
  if (task_ != nullptr) {
    StartTask();
    return;
  }
  display_.Note(absl::StrCat(
      "sluice: serving on ", addresses_.public_address, " (admin ", addresses_.admin_address,
      addresses_.metrics_address.empty() ? "" : ", metrics ", addresses_.metrics_address,
      "), logs in ", options_.log_dir.empty() ? paths_.folder : options_.log_dir,
      ". Ctrl-C stops it."));
}

void Cluster::StartTask() {
  phase_ = Phase::kTask;
  admin_
      .reset();  // Not needed any more; an idle connection would only send pings to a busy machine
  task_thread_ = std::thread([this] {
    task_status_ = task_->Run(addresses_);
    task_done_ = true;
  });
}

absl::Status Cluster::Step() {
  switch (phase_) {
    case Phase::kLoader:
      return WaitForLoader();
    case Phase::kController:
      return WaitForController();
    case Phase::kLoading:
      return WaitUntilServing();
    case Phase::kTask:
      if (task_done_) {
        task_thread_.join();
        if (!task_status_.ok()) {
          return task_status_;
        }
        StopChildren();
      }
      return absl::OkStatus();
    case Phase::kReady:
    case Phase::kStopping:
      return absl::OkStatus();
  }
  return absl::OkStatus();
}

void Cluster::StopChildren() {
  phase_ = Phase::kStopping;
  supervisor_.BeginStop();
}

void Cluster::OnSignal(int number) {
  if (number == 0 || number == SIGCHLD) {
    return;
  }
  if (phase_ == Phase::kStopping) {
    supervisor_.KillAll();
    return;
  }
  display_.Note("sluice: stopping (once more: at once)");
  if (phase_ == Phase::kTask) {
    task_->Cancel();
    exit_code_ = 1;  // The task is not whole
  }
  StopChildren();
}

void Cluster::Fail(const absl::Status& status) {
  display_.Note(absl::StrCat("sluice: ", std::string(status.message())));
  for (const auto& child : supervisor_.children()) {
    if (absl::StartsWith(std::string(status.message()), child.spec.name + " ended")) {
      display_.Note(TailOf(child.spec.log_path));
    }
  }
  exit_code_ = 1;
  StopChildren();
}

int Cluster::Run(std::vector<WorkerSpec> workers) {
  workers_ = std::move(workers);
  if (absl::Status status = StartLoader(); !status.ok()) {
    Fail(status);
  }
  while (phase_ != Phase::kStopping || !supervisor_.stopped()) {
    OnSignal(signals_->Wait(kTick));
    absl::Status status = supervisor_.Tick();
    if (status.ok() && phase_ != Phase::kStopping) {
      status = Step();
    }
    if (!status.ok() && phase_ != Phase::kStopping) {
      Fail(status);
    }
  }
  return exit_code_;
}

}  // namespace sluice::cli
