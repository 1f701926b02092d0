// sluice up: one controller, one loader and the workers on this machine, supervised until the end.
#include <unistd.h>

#include <cstdio>
#include <filesystem>
#include <memory>

#include "absl/strings/str_cat.h"
#include "services/cli/checkpoint_flags.h"
#include "services/cli/cluster.h"
#include "services/cli/commands.h"
#include "services/cli/resources.h"

namespace sluice::cli {
namespace {

namespace fs = std::filesystem;

struct UpFlags {
  UpOptions options;
  SamplingFlags sampling;
};

void AddModelFlags(CLI::App& command, UpOptions* options) {
  AddCheckpointFlags(command, &options->model, &options->revision);
  rpc::AddFlag(command, "model-name", &options->model_name,
               "Name for clients; default: the folder's or file's");
  rpc::AddFlag(command, "device-map", &options->device_map,
               "sequential, auto, balanced, balanced_low_0, or a JSON object module -> device");
  rpc::AddFlag(command, "max-memory", &options->max_memory,
               "Memory by device, e.g. 0=10GiB,1=8GiB; default: equal parts of this machine's");
  rpc::AddFlag(command, "dtype", &options->dtype,
               "Type of activations and KV cache: auto or float32, in which CPU workers compute");
  rpc::AddFlag(command, "max-model-len", &options->max_model_len,
               "Longest context, prompt and answer, in tokens; 0: the model's");
  rpc::AddFlag(command, "max-batch-size", &options->max_batch_size,
               "Sequences that run at once; 0: the controller's default");
  rpc::AddFlag(command, "max-batch-tokens", &options->max_batch_tokens,
               "Tokens of one step; 0: the controller's default");
  rpc::AddFlag(command, "block-size", &options->block_size,
               "Tokens of a KV block; 0: the controller's default");
  rpc::AddFlag(command, "max-queue", &options->max_queue,
               "Requests that may wait; -1: the controller's default");
}

void AddMachineFlags(CLI::App& command, UpOptions* options) {
  rpc::AddFlag(command, "workers", &options->workers,
               "Worker processes; 0: the devices of --max-memory, or 1")
      ->check(CLI::Range(0, 1024));
  rpc::AddFlag(command, "device", &options->device, "cpu, or cuda: worker N on GPU N")
      ->check(CLI::IsMember({"cpu", "cuda"}));
  rpc::AddFlag(command, "threads", &options->threads,
               "Threads of each CPU worker; 0: equal parts of the cores")
      ->check(CLI::Range(0, 1024));
  rpc::AddFlag(command, "host", &options->host,
               "Address to listen on for clients; 0.0.0.0: all interfaces");
  rpc::AddFlag(command, "port", &options->port, "gRPC port; 0: any")->check(CLI::Range(0, 65535));
  rpc::AddFlag(command, "admin-port", &options->admin_port, "Admin port, local only; 0: any")
      ->check(CLI::Range(0, 65535));
  rpc::AddFlag(command, "metrics-port", &options->metrics_port,
               "Prometheus port of the controller, local only; the loader has the next one, then "
               "the workers; 0: any; -1: none")
      ->check(CLI::Range(-1, 64000));
  rpc::AddFlag(command, "log-level", &options->log_level, "debug, info, warning or error");
  rpc::AddFlag(command, "log-dir", &options->log_dir,
               "Folder for the processes' logs; default: one that is removed at a clean end");
}

// Folder of this binary: the other programs lie beside it.
std::string ProgramFolder() {
  std::error_code error;
  return fs::read_symlink("/proc/self/exe", error).parent_path().string();
}

absl::StatusOr<ClusterPaths> MakePaths(const UpOptions& options) {
  ClusterPaths paths;
  paths.programs = ProgramFolder();
  for (const char* program : {"sluice-loader", "sluice-controller", "sluice-worker"}) {
    if (access(absl::StrCat(paths.programs, "/", program).c_str(), X_OK) != 0) {
      return absl::NotFoundError(absl::StrCat(program, " is not beside this program, in ",
                                              paths.programs, "; build or install it there"));
    }
  }
  std::error_code error;
  if (!options.log_dir.empty() && !fs::is_directory(options.log_dir, error) &&
      !fs::create_directories(options.log_dir, error)) {
    return absl::InvalidArgumentError(
        absl::StrCat("--log-dir ", options.log_dir, ": ", error.message()));
  }
  // Sockets' paths are short by force (108 bytes), so not below --log-dir.
  std::string pattern = fs::temp_directory_path(error).string() + "/sluice-XXXXXX";
  if (mkdtemp(pattern.data()) == nullptr) {
    return absl::InternalError(absl::StrCat(
        "no folder can be made in ", fs::temp_directory_path(error).string(), "; set TMPDIR"));
  }
  paths.folder = pattern;
  return paths;
}

int Up(const UpFlags& flags) {
  SignalQueue signals;  // Before any thread
  auto workers = WorkersOf(flags.options, ThisMachine());
  if (!workers.ok()) {
    std::fprintf(stderr, "sluice up: %s\n", std::string(workers.status().message()).c_str());
    return 1;
  }
  auto paths = MakePaths(flags.options);
  if (!paths.ok()) {
    std::fprintf(stderr, "sluice up: %s\n", std::string(paths.status().message()).c_str());
    return 1;
  }
  int code = 1;
  {
    Cluster cluster(flags.options, flags.sampling, *paths, &signals);
    code = cluster.Run(*std::move(workers));
  }
  std::error_code error;
  if (code == 0 || !flags.options.log_dir.empty()) {
    fs::remove_all(paths->folder, error);
  } else {
    std::fprintf(stderr, "sluice up: the logs are kept in %s\n", paths->folder.c_str());
  }
  return code;
}

}  // namespace

void AddUpCommand(CLI::App& app, int* exit_code) {
  CLI::App* command = app.add_subcommand(
      "up", "Start a controller, a loader and workers on this machine, and supervise them");
  auto flags = std::make_shared<UpFlags>();
  AddModelFlags(*command, &flags->options);
  AddMachineFlags(*command, &flags->options);
  CLI::Option* once = command->add_option(
      "--once", flags->options.once, "Answer this prompt on standard output, then stop everything");
  AddSamplingFlags(*command, &flags->sampling);
  command->callback([flags, once, exit_code] {
    flags->options.has_once = once->count() > 0;
    *exit_code = Up(*flags);
  });
}

}  // namespace sluice::cli
