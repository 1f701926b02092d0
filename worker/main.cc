// sluice-worker: holds a shard of a model on one device and runs its steps. Exit code 0 after a
// ReleaseOrder or SIGTERM, 1 when it cannot start, as CLI11's for a wrong flag.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "kernels/backend.h"
#include "kernels/core/status_macros.h"
#include "services/metrics/metrics_server.h"
#include "services/rpc/flags.h"
#include "services/rpc/log.h"
#include "services/rpc/process.h"
#include "worker/host_info.h"
#include "worker/worker.h"

namespace sluice::worker {
namespace {

// Seconds after SIGTERM at which the system ends the process, whatever hangs.
constexpr unsigned kLastResortSeconds = 10;

struct Flags {
  WorkerOptions worker;
  std::string device = "cpu";
  int threads = 0;
  std::string dtype = "float16";
  std::string memory;
  std::string metrics_listen;
  rpc::ProcessFlags process;
};

void AddFlags(CLI::App& app, Flags* flags) {
  rpc::AddFlag(app, "controller", &flags->worker.controller_address,
               "host:port of the controller's internal listener")
      ->required();
  rpc::AddFlag(app, "worker-id", &flags->worker.worker_id, "Stable name, [a-z0-9._-]{1,64}")
      ->required();
  rpc::AddFlag(app, "listen", &flags->worker.listen, "host:port to listen on; port 0: any");
  rpc::AddFlag(app, "advertise-host", &flags->worker.advertise_host,
               "Host that other processes dial; default: the host of --listen");
  rpc::AddFlag(app, "unix-socket", &flags->worker.unix_socket,
               "Path of a Unix socket to listen on too, for workers of the same host");
  rpc::AddFlag(app, "device", &flags->device, "cpu or cuda:N");
  rpc::AddFlag(app, "device-index", &flags->worker.device_index,
               "Number of this device in device maps; -1: the device \"cpu\" beside GPUs");
  rpc::AddFlag(app, "threads", &flags->threads, "Threads of a cpu worker; 0: one for each core");
  rpc::AddFlag(app, "dtype", &flags->dtype,
               "Activations and KV cache of a cuda worker: float16 or bfloat16");
  rpc::AddFlag(app, "memory", &flags->memory,
               "Memory for weights, KV cache and workspace, e.g. 8GiB; default: 90 % of what is "
               "free");
  rpc::AddFlag(app, "metrics-listen", &flags->metrics_listen,
               "host:port for Prometheus, GET /metrics; port 0: any; empty: none");
  rpc::AddProcessFlags(app, &flags->process);
}

absl::StatusOr<std::unique_ptr<Backend>> MakeBackend(Flags* flags) {
  if (flags->device == "cpu") {
    const int cores = static_cast<int>(std::thread::hardware_concurrency());
    flags->worker.device_kind = "cpu";
    return MakeCpuBackend(flags->threads > 0 ? flags->threads : std::max(1, cores));
  }
  int index = -1, end = 0;
  if (std::sscanf(flags->device.c_str(), "cuda:%d%n", &index, &end) != 1 || index < 0 ||
      end != static_cast<int>(flags->device.size())) {
    return absl::InvalidArgumentError("--device " + flags->device + ": write cpu or cuda:N");
  }
  if (flags->memory.empty()) {
    return absl::InvalidArgumentError("--memory: needed with " + flags->device + ", e.g. 70GiB");
  }
  if (flags->dtype != "float16" && flags->dtype != "bfloat16") {
    return absl::InvalidArgumentError("--dtype " + flags->dtype +
                                      ": a GPU works in float16 or bfloat16");
  }
  flags->worker.device_kind = "cuda";
  const DType dtype = flags->dtype == "bfloat16" ? DType::kBF16 : DType::kF16;
  return MakeCudaBackend(index, dtype);
}

absl::Status SetMemory(Flags* flags) {
  if (flags->memory.empty()) {
    flags->worker.memory_bytes = AvailableMemory() / 10 * 9;
    return absl::OkStatus();
  }
  absl::StatusOr<uint64_t> bytes = rpc::ParseBytes(flags->memory);
  if (!bytes.ok()) {
    return absl::InvalidArgumentError("--memory: " + std::string(bytes.status().message()));
  }
  flags->worker.memory_bytes = *bytes;
  return absl::OkStatus();
}

absl::Status Serve(Flags* flags) {
  SLUICE_RETURN_IF_ERROR(rpc::InitLog("worker", flags->process.log_level));
  std::unique_ptr<Worker> worker;
  std::mutex mutex;  // Guards worker and stopped
  bool stopped = false;
  rpc::SignalWatcher signals([&](int signal) {
    alarm(kLastResortSeconds);
    rpc::LogInfo("signal", {{"signal", signal}});
    std::lock_guard<std::mutex> lock(mutex);
    stopped = true;
    if (worker != nullptr) {
      worker->Stop();
    }
  });
  SLUICE_RETURN_IF_ERROR(rpc::FollowParent(flags->process));
  SLUICE_RETURN_IF_ERROR(SetMemory(flags));
  SLUICE_ASSIGN_OR_RETURN(std::unique_ptr<Backend> backend, MakeBackend(flags));
  flags->worker.device_name = backend->Name();
  SLUICE_ASSIGN_OR_RETURN(
      auto started, Worker::Start(flags->worker, [&](const internal::v1::ShardAssignment& wanted) {
        return StageEngine::NewLoader(wanted, backend.get());
      }));
  SLUICE_ASSIGN_OR_RETURN(
      auto metrics_server,
      metrics::MetricsServer::Start(
          flags->metrics_listen, [w = started.get()](metrics::Page* page) { w->Collect(page); }));
  if (metrics_server != nullptr) {
    rpc::LogInfo("metrics_listening", {{"address", metrics_server->address()}});
  }
  {
    std::lock_guard<std::mutex> lock(mutex);
    worker = std::move(started);
    if (stopped) {
      worker->Stop();
    }
  }
  worker->Run();
  metrics_server.reset();  // It asks the worker
  std::lock_guard<std::mutex> lock(mutex);
  worker.reset();
  return absl::OkStatus();
}

}  // namespace
}  // namespace sluice::worker

int main(int argc, char** argv) {
  CLI::App app("sluice-worker: holds a shard of a model on one device and runs its steps");
  sluice::worker::Flags flags;
  sluice::worker::AddFlags(app, &flags);
  if (const int code = sluice::rpc::ParseFlags(app, argc, argv); code >= 0) {
    return code;
  }
  const absl::Status status = sluice::worker::Serve(&flags);
  if (!status.ok()) {
    sluice::rpc::LogError("worker_failed", {{"error", status}});
    return 1;
  }
  return 0;
}
