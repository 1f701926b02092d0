#include "services/cli/cluster_commands.h"

#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "kernels/core/status_macros.h"
#include "services/plan/device_map.h"

namespace sluice::cli {
namespace {

constexpr char kAnyPort[] = "127.0.0.1:0";
constexpr int kMostWorkers = 1024;

std::string Or(const std::string& text, const std::string& fallback) {
  return text.empty() ? fallback : text;
}

// --name VALUE unless `value` is the one that means "the program's own default".
void AddIfSet(std::vector<std::string>& command, const std::string& name, int value, int unset) {
  if (value != unset) {
    command.insert(command.end(), {name, absl::StrCat(value)});
  }
}

// Where process number `number` (controller, loader, workers) lets Prometheus look. Always given:
// SLUICE_METRICS_LISTEN in the environment would be one address for all of them.
std::string MetricsAddress(const UpOptions& options, int number) {
  if (options.metrics_port < 0) {
    return "";
  }
  return options.metrics_port == 0 ? kAnyPort
                                   : absl::StrCat("127.0.0.1:", options.metrics_port + number);
}

absl::StatusOr<std::string> ReadText(const std::string& path) {
  std::ifstream file(path);
  if (!file.good()) {
    return absl::NotFoundError(absl::StrCat(path, ": not there yet"));
  }
  std::stringstream content;
  content << file.rdbuf();
  std::string text = content.str();
  absl::StripAsciiWhitespace(&text);
  return text;
}

absl::StatusOr<int> CountWorkers(const UpOptions& options, const plan::MaxMemory& memory) {
  const int numbered =
      static_cast<int>(std::count_if(memory.begin(), memory.end(), [](const auto& entry) {
        return entry.first != "cpu" && entry.first != "disk";
      }));
  const int workers = options.workers > 0 ? options.workers : std::max(1, numbered);
  if (workers > kMostWorkers) {
    return absl::InvalidArgumentError(absl::StrCat("--workers: at most ", kMostWorkers));
  }
  for (const auto& [device, bytes] : memory) {
    const bool named = device == "cpu" || device == "disk";
    if (!named && std::stoi(device) >= workers) {
      return absl::InvalidArgumentError(
          absl::StrCat("--max-memory ", device, "=...: there are ", workers,
                       " workers, numbered from 0; give --workers ", std::stoi(device) + 1,
                       " or leave the entry out"));
    }
  }
  return workers;
}

}  // namespace

absl::StatusOr<std::vector<WorkerSpec>> WorkersOf(const UpOptions& options,
                                                  const Resources& resources) {
  plan::MaxMemory memory;
  if (!options.max_memory.empty()) {
    SLUICE_ASSIGN_OR_RETURN(memory, plan::ParseMaxMemory(options.max_memory));
  }
  SLUICE_ASSIGN_OR_RETURN(const int count, CountWorkers(options, memory));
  const bool gpu = options.device != "cpu";
  const int cpu_beside = memory.count("cpu") != 0 ? 1 : 0;
  const WorkerShare share = ShareOf(resources, (gpu ? 0 : count) + cpu_beside);
  const int threads = options.threads > 0 ? options.threads : share.threads;
  std::vector<WorkerSpec> workers;
  for (int i = 0; i < count; ++i) {
    WorkerSpec worker{absl::StrCat("worker-", i), "cpu", i, threads, share.memory_bytes};
    const auto entry = memory.find(absl::StrCat(i));
    if (entry != memory.end()) {
      worker.memory_bytes = entry->second;
    } else if (gpu) {
      return absl::InvalidArgumentError(
          absl::StrCat("--device cuda needs --max-memory for each GPU; add ", i, "=SIZE, such as ",
                       i, "=70GiB"));
    }
    if (gpu) {
      worker.device = absl::StrCat("cuda:", i);
      worker.threads = 0;
    }
    worker.position = i;
    workers.push_back(worker);
  }
  if (cpu_beside != 0) {
    workers.push_back({"worker-cpu", "cpu", -1, threads, memory.at("cpu"), count});
  }
  return workers;
}

std::vector<std::string> LoaderCommand(const UpOptions& options, const ClusterPaths& paths,
                                       const std::string& address) {
  std::vector<std::string> command = {paths.programs + "/sluice-loader",
                                      "--model",
                                      options.model,
                                      "--listen",
                                      Or(address, kAnyPort),
                                      "--metrics-listen",
                                      MetricsAddress(options, 1),
                                      "--log-level",
                                      options.log_level,
                                      "--address-file",
                                      paths.loader_file()};
  if (!options.revision.empty()) {
    command.insert(command.end(), {"--revision", options.revision});
  }
  return command;
}

std::vector<std::string> ControllerCommand(const UpOptions& options, const ClusterPaths& paths,
                                           const std::string& loader_address, int workers,
                                           const ControllerAddresses& addresses) {
  std::vector<std::string> command = {
      paths.programs + "/sluice-controller",
      "--loader",
      loader_address,
      "--listen",
      Or(addresses.public_address, absl::StrCat(options.host, ":", options.port)),
      "--internal-listen",
      Or(addresses.internal_address, kAnyPort),
      "--admin-listen",
      Or(addresses.admin_address, absl::StrCat("127.0.0.1:", options.admin_port)),
      "--metrics-listen",
      Or(addresses.metrics_address, MetricsAddress(options, 0)),
      "--address-file",
      paths.controller_file(),
      "--workers",
      absl::StrCat(workers),
      "--device-map",
      options.device_map,
      "--dtype",
      options.dtype,
      "--log-level",
      options.log_level};
  if (!options.max_memory.empty()) {
    command.insert(command.end(), {"--max-memory", options.max_memory});
  }
  if (!options.model_name.empty()) {
    command.insert(command.end(), {"--model-name", options.model_name});
  }
  AddIfSet(command, "--max-batch-size", options.max_batch_size, 0);
  AddIfSet(command, "--max-batch-tokens", options.max_batch_tokens, 0);
  AddIfSet(command, "--max-model-len", options.max_model_len, 0);
  AddIfSet(command, "--block-size", options.block_size, 0);
  AddIfSet(command, "--max-queue", options.max_queue, -1);
  return command;
}

std::vector<std::string> WorkerCommand(const UpOptions& options, const ClusterPaths& paths,
                                       const WorkerSpec& worker,
                                       const std::string& controller_address) {
  std::vector<std::string> command = {paths.programs + "/sluice-worker",
                                      "--controller",
                                      controller_address,
                                      "--worker-id",
                                      worker.id,
                                      "--listen",
                                      kAnyPort,
                                      "--unix-socket",
                                      absl::StrCat(paths.folder, "/", worker.id, ".sock"),
                                      "--device",
                                      worker.device,
                                      "--device-index",
                                      absl::StrCat(worker.device_index),
                                      "--memory",
                                      absl::StrCat(worker.memory_bytes),
                                      "--metrics-listen",
                                      MetricsAddress(options, 2 + worker.position),
                                      "--log-level",
                                      options.log_level};
  AddIfSet(command, "--threads", worker.threads, 0);
  return command;
}

absl::StatusOr<std::string> ReadLoaderAddress(const std::string& path) {
  SLUICE_ASSIGN_OR_RETURN(const std::string text, ReadText(path));
  if (!absl::StartsWith(text, "{")) {
    return text;
  }
  const auto json = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object() || !json.contains("address") || !json["address"].is_string()) {
    return absl::InternalError(absl::StrCat(path, ": no \"address\" in it: ", text));
  }
  return json["address"].get<std::string>();
}

absl::StatusOr<ControllerAddresses> ReadControllerAddresses(const std::string& path) {
  SLUICE_ASSIGN_OR_RETURN(const std::string text, ReadText(path));
  const auto json = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  ControllerAddresses addresses;
  const std::pair<const char*, std::string*> fields[] = {{"public", &addresses.public_address},
                                                         {"internal", &addresses.internal_address},
                                                         {"admin", &addresses.admin_address}};
  for (const auto& [name, value] : fields) {
    if (!json.is_object() || !json.contains(name) || !json[name].is_string()) {
      return absl::InternalError(absl::StrCat(path, ": no \"", name, "\" in it: ", text));
    }
    *value = json[name].get<std::string>();
  }
  if (json.contains("metrics") && json["metrics"].is_string()) {
    addresses.metrics_address = json["metrics"].get<std::string>();
  }
  return addresses;
}

}  // namespace sluice::cli
