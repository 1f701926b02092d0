// sluice-controller: one pipeline group's head: public API, device map, scheduler. Exit code 0
// after SIGTERM, 1 when it cannot start, as CLI11's for a wrong flag.
#include <unistd.h>

#include <condition_variable>
#include <mutex>
#include <string>

#include "absl/strings/str_cat.h"
#include "services/controller/controller_server.h"
#include "services/rpc/flags.h"
#include "services/rpc/log.h"
#include "services/rpc/process.h"

namespace sluice::controller {
namespace {

// Seconds after the drain at which the system ends the process, whatever hangs.
constexpr unsigned kLastResortSeconds = 10;

struct Flags {
  ControllerOptions controller;
  std::string device_map = "auto";
  std::string max_memory;
  std::string dtype = "auto";
  int longest_request_ms = 10 * 60 * 1000;
  int drain_ms = 5000;
  int write_deadline_ms = 30 * 1000;
  uint32_t max_request_mib_per_peer = 64;
  rpc::ProcessFlags process;
};

void AddAddressFlags(CLI::App& app, Flags* flags) {
  ControllerOptions& options = flags->controller;
  rpc::AddFlag(app, "loader", &options.loop.coordinator.loader_address,
               "host:port of the loader, for this process and for the workers")
      ->required();
  rpc::AddFlag(app, "listen", &options.listen, "Public host:port for clients; port 0: any");
  rpc::AddFlag(app, "internal-listen", &options.internal_listen, "host:port for workers");
  rpc::AddFlag(app, "internal-advertise", &options.internal_advertise,
               "host:port at which workers reach --internal-listen; default: the same");
  rpc::AddFlag(app, "admin-listen", &options.admin_listen, "host:port of AdminService");
  rpc::AddFlag(app, "metrics-listen", &options.metrics_listen,
               "host:port for Prometheus, GET /metrics; port 0: any; empty: none");
  rpc::AddFlag(app, "address-file", &options.address_file,
               "Write the chosen addresses into this file, as JSON");
}

void AddModelFlags(CLI::App& app, Flags* flags) {
  CoordinatorOptions& coordinator = flags->controller.loop.coordinator;
  rpc::AddFlag(app, "model-name", &flags->controller.model_name,
               "Name for clients; default: the loader's directory or file name");
  rpc::AddFlag(app, "workers", &coordinator.expected_workers,
               "Workers to wait for; 0: the devices of --max-memory, or one")
      ->check(CLI::Range(0, 1024));
  rpc::AddFlag(app, "device-map", &flags->device_map,
               "sequential, auto, balanced, balanced_low_0, or a JSON object module -> device");
  rpc::AddFlag(app, "max-memory", &flags->max_memory,
               "Memory by device, e.g. 0=10GiB,1=8GiB,cpu=30GiB; default: what the workers say");
  rpc::AddFlag(app, "dtype", &flags->dtype,
               "Type of activations and KV cache: auto or float32, in which CPU workers compute");
  rpc::AddFlag(app, "max-model-len", &coordinator.plan.max_model_len,
               "Longest context, prompt and answer, in tokens; 0: the model's");
  rpc::AddFlag(app, "max-batch-size", &coordinator.plan.max_batch_size,
               "Sequences that run at once")
      ->check(CLI::Range(1, 4096));
  rpc::AddFlag(app, "max-batch-tokens", &coordinator.plan.max_batch_tokens,
               "Tokens of one step: decodes and a prefill chunk")
      ->check(CLI::Range(1, 65536));
  rpc::AddFlag(app, "block-size", &coordinator.plan.block_size, "Tokens of a KV block")
      ->check(CLI::Range(1, 1024));
}

void AddServingFlags(CLI::App& app, Flags* flags) {
  rpc::AddFlag(app, "max-queue", &flags->controller.loop.max_queue,
               "Requests that may wait for room; more are refused with RESOURCE_EXHAUSTED")
      ->check(CLI::Range(0, 100000));
  rpc::AddFlag(app, "max-queue-tokens", &flags->controller.loop.max_queue_tokens,
               "Prompt tokens of the requests that may wait; more are refused likewise")
      ->check(CLI::Range(1, 1 << 30));
  rpc::AddFlag(app, "max-requests-per-peer", &flags->controller.clients.peer.calls,
               "Calls of one client address in flight; more get RESOURCE_EXHAUSTED before any work")
      ->check(CLI::Range(1, 1000000));
  rpc::AddFlag(app, "max-request-mib-per-peer", &flags->max_request_mib_per_peer,
               "Size of the requests in flight of one client address, MiB; of all: four times that")
      ->check(CLI::Range(4, 65536));
  rpc::AddFlag(app, "http2-guard", &flags->controller.http2_guard,
               "Bound connections, streams and resets of clients before gRPC sees them; false: a "
               "proxy in front does");
  rpc::AddFlag(app, "write-deadline-ms", &flags->write_deadline_ms,
               "A call whose client takes nothing of its answer for so long is ended")
      ->check(CLI::Range(100, 3600 * 1000));
  rpc::AddFlag(app, "longest-request-ms", &flags->longest_request_ms,
               "Deadline of requests that have none, and the longest one accepted")
      ->check(CLI::Range(1, 24 * 3600 * 1000));
  rpc::AddFlag(app, "drain-ms", &flags->drain_ms, "How long SIGTERM waits for live requests")
      ->check(CLI::Range(0, 3600 * 1000));
  rpc::AddProcessFlags(app, &flags->process);
}

void TakeServingFlags(Flags* flags) {
  ControllerOptions& options = flags->controller;
  options.generation.longest_request = std::chrono::milliseconds(flags->longest_request_ms);
  options.clients.stalled_write = std::chrono::milliseconds(flags->write_deadline_ms);
  options.clients.peer.bytes = uint64_t{flags->max_request_mib_per_peer} << 20;
  options.clients.peer.total_bytes = 4 * options.clients.peer.bytes;
}

absl::Status ParseModelFlags(Flags* flags) {
  CoordinatorOptions& coordinator = flags->controller.loop.coordinator;
  auto mode = plan::ParseMapMode(flags->device_map);
  if (!mode.ok()) {
    return mode.status();
  }
  coordinator.plan.mode = *mode;
  if (*mode == plan::MapMode::kCustom) {
    coordinator.plan.custom_json = flags->device_map;
  }
  if (!flags->max_memory.empty()) {
    auto max_memory = plan::ParseMaxMemory(flags->max_memory);
    if (!max_memory.ok()) {
      return max_memory.status();
    }
    coordinator.max_memory = *std::move(max_memory);
  }
  if (flags->dtype != "auto" && flags->dtype != "float32" && flags->dtype != "float") {
    return absl::InvalidArgumentError(
        absl::StrCat("--dtype ", flags->dtype,
                     " is not supported: CPU workers compute in float32; write auto or float32"));
  }
  return absl::OkStatus();
}

absl::Status Serve(Flags* flags) {
  if (absl::Status status = rpc::InitLog("controller", flags->process.log_level); !status.ok()) {
    return status;
  }
  std::mutex mutex;  // Guards stopped
  std::condition_variable wake;
  bool stopped = false;
  rpc::SignalWatcher signals([&](int signal) {
    rpc::LogInfo("signal", {{"signal", signal}});
    alarm(kLastResortSeconds + static_cast<unsigned>(flags->drain_ms) / 1000);
    std::lock_guard<std::mutex> lock(mutex);
    stopped = true;
    wake.notify_one();
  });
  if (absl::Status status = rpc::FollowParent(flags->process); !status.ok()) {
    return status;
  }
  if (absl::Status status = ParseModelFlags(flags); !status.ok()) {
    return status;
  }
  TakeServingFlags(flags);
  auto server = ControllerServer::Start(flags->controller);
  if (!server.ok()) {
    return server.status();
  }
  {
    std::unique_lock<std::mutex> lock(mutex);
    wake.wait(lock, [&] { return stopped; });
  }
  (*server)->Stop(std::chrono::milliseconds(flags->drain_ms));
  rpc::LogInfo("stopped");
  return absl::OkStatus();
}

}  // namespace
}  // namespace sluice::controller

int main(int argc, char** argv) {
  CLI::App app("sluice-controller: public API, device map and scheduler of one pipeline group");
  sluice::controller::Flags flags;
  sluice::controller::AddAddressFlags(app, &flags);
  sluice::controller::AddModelFlags(app, &flags);
  sluice::controller::AddServingFlags(app, &flags);
  if (const int code = sluice::rpc::ParseFlags(app, argc, argv); code >= 0) {
    return code;
  }
  const absl::Status status = sluice::controller::Serve(&flags);
  if (!status.ok()) {
    sluice::rpc::LogError("controller_failed", {{"error", status}});
    return 1;
  }
  return 0;
}
