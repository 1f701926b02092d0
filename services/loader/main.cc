// sluice-loader: serves the weights of one model, in canonical form, to the workers. Exit code 0
// after SIGTERM or SIGINT, 1 when it cannot start, as CLI11's for a wrong flag.
#include <malloc.h>
#include <unistd.h>

#include <condition_variable>
#include <filesystem>
#include <fstream>
#include <memory>
#include <mutex>
#include <string>

#include "absl/strings/str_cat.h"
#include "kernels/core/fault_point.h"
#include "kernels/core/status_macros.h"
#include "services/checkpoint/checkpoint.h"
#include "services/loader/weights_service.h"
#include "services/metrics/metrics_server.h"
#include "services/rpc/flags.h"
#include "services/rpc/log.h"
#include "services/rpc/process.h"
#include "services/rpc/server_runner.h"

namespace sluice::loader {
namespace {

// Seconds after SIGTERM at which the system ends the process, whatever hangs.
constexpr unsigned kLastResortSeconds = 10;

struct Flags {
  std::string model;
  std::string revision;
  std::string listen = "127.0.0.1:0";
  std::string metrics_listen;
  std::string address_file;
  rpc::ProcessFlags process;
};

void AddFlags(CLI::App& app, Flags* flags) {
  rpc::AddFlag(
      app, "model", &flags->model,
      "Model folder (config.json and weights), .gguf file, or name in the Hugging Face cache")
      ->required();
  rpc::AddFlag(app, "revision", &flags->revision,
               "Branch, tag or commit of a model of the Hugging Face cache; default: main");
  rpc::AddFlag(app, "listen", &flags->listen, "host:port to listen on; port 0: any");
  rpc::AddFlag(app, "metrics-listen", &flags->metrics_listen,
               "host:port for Prometheus, GET /metrics; port 0: any; empty: none");
  rpc::AddFlag(app, "address-file", &flags->address_file,
               "File to write the address to, once the loader listens");
  rpc::AddProcessFlags(app, &flags->process);
}

void LogModel(const checkpoint::Checkpoint& checkpoint) {
  const auto& description = checkpoint.description();
  for (const std::string& warning : description.warnings()) {
    rpc::LogWarning("model_warning", {{"text", warning}});
  }
  uint64_t bytes = 0;
  for (const auto& tensor : description.tensors()) bytes += tensor.bytes();
  rpc::LogInfo("model_opened", {{"model", description.model_name()},
                                {"digest", description.model_digest()},
                                {"layers", description.config().num_layers()},
                                {"quantization", description.quant().method()},
                                {"detail", description.quant().detail()},
                                {"tensors", description.tensors_size()},
                                {"bytes", bytes}});
}

// Whole or not at all: written under another name first.
absl::Status WriteAddress(const std::string& path, const std::string& address) {
  const std::string draft = absl::StrCat(path, ".", getpid());
  std::ofstream file(draft);
  file << address << "\n";
  file.close();
  std::error_code error;
  if (file.good()) std::filesystem::rename(draft, path, error);
  if (file.good() && !error) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("--address-file ", path, ": cannot be written"));
}

absl::Status Serve(const Flags& flags) {
  SLUICE_RETURN_IF_ERROR(rpc::InitLog("loader", flags.process.log_level));
  std::mutex mutex;  // Guards stopped.
  std::condition_variable changed;
  bool stopped = false;
  rpc::SignalWatcher signals([&](int signal) {
    alarm(kLastResortSeconds);
    rpc::LogInfo("signal", {{"signal", signal}});
    std::lock_guard<std::mutex> lock(mutex);
    stopped = true;
    changed.notify_all();
  });
  SLUICE_RETURN_IF_ERROR(rpc::FollowParent(flags.process));
  SLUICE_ASSIGN_OR_RETURN(const std::unique_ptr<checkpoint::Checkpoint> checkpoint,
                          checkpoint::Checkpoint::Open(flags.model, flags.revision));
  SLUICE_FAULT_POINT("loader.opened");
  LogModel(*checkpoint);
  WeightsService service(*checkpoint);
  grpc::Service* const services[] = {&service};
  rpc::ServerOptions options;
  options.addresses = {flags.listen};
  SLUICE_ASSIGN_OR_RETURN(const auto server, rpc::ServerRunner::Start(options, services));
  SLUICE_ASSIGN_OR_RETURN(
      const auto metrics_server,
      metrics::MetricsServer::Start(flags.metrics_listen,
                                    [&service](metrics::Page* page) { service.Collect(page); }));
  const std::string host = flags.listen.substr(0, flags.listen.rfind(':'));
  const std::string address =
      server->ports()[0] == 0 ? flags.listen : absl::StrCat(host, ":", server->ports()[0]);
  if (!flags.address_file.empty()) {
    SLUICE_RETURN_IF_ERROR(WriteAddress(flags.address_file, address));
  }
  SLUICE_FAULT_POINT("loader.listening");
  server->SetReady(true);
  rpc::LogInfo("listening", {{"address", address}});
  if (metrics_server != nullptr) {
    rpc::LogInfo("metrics_listening", {{"address", metrics_server->address()}});
  }
  std::unique_lock<std::mutex> lock(mutex);
  changed.wait(lock, [&stopped] { return stopped; });
  SLUICE_FAULT_POINT("loader.ending");
  server->Shutdown(/*grace_ms=*/1000);
  return absl::OkStatus();
}

int Main(int argc, char** argv) {
  // Large blocks go back to the system when they are freed, whatever was freed before.
  mallopt(M_MMAP_THRESHOLD, 1 << 20);
  Flags flags;
  CLI::App app("sluice-loader: serves the weights of one model to the workers");
  AddFlags(app, &flags);
  if (const int code = rpc::ParseFlags(app, argc, argv); code >= 0) return code;
  const absl::Status status = Serve(flags);
  if (status.ok()) return 0;
  rpc::LogError("loader_failed", {{"error", status}});
  return 1;
}

}  // namespace
}  // namespace sluice::loader

int main(int argc, char** argv) { return sluice::loader::Main(argc, argv); }
