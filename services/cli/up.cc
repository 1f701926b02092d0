// sluice up: one controller, one loader and the workers on this machine, supervised until the end.
#include <grpcpp/client_context.h>

#include <cstdio>
#include <memory>
#include <string>
#include <utility>

#include "services/cli/answer_stream.h"
#include "services/cli/checkpoint_flags.h"
#include "services/cli/commands.h"
#include "services/cli/run_cluster.h"
#include "services/cli/sampling_flags.h"

namespace sluice::cli {
namespace {

struct UpFlags {
  UpOptions options;
  std::string once;
  bool has_once = false;
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

// --once: one prompt, its answer on standard output.
class OnceTask : public ClusterTask {
 public:
  OnceTask(std::string prompt, SamplingFlags sampling)
      : prompt_(std::move(prompt)), sampling_(std::move(sampling)) {}

  absl::Status Run(const ControllerAddresses& addresses) override {
    std::fprintf(stderr, "prompt: %s\n", prompt_.c_str());
    v1::StreamGenerateRequest request;
    SetSampling(sampling_, &request);
    request.set_text(prompt_);
    const StreamedAnswer answer =
        StreamAnswer(addresses.public_address, request, &context_, PrintPiece);
    std::printf("\n");
    std::fflush(stdout);
    if (answer.status.ok()) std::fprintf(stderr, "%s\n", StatsLine(answer).c_str());
    return answer.status;
  }
  void Cancel() override { context_.TryCancel(); }

 private:
  const std::string prompt_;
  const SamplingFlags sampling_;
  grpc::ClientContext context_;
};

int Up(const UpFlags& flags) {
  SignalQueue signals;  // Before any thread
  std::unique_ptr<OnceTask> once;
  if (flags.has_once) once = std::make_unique<OnceTask>(flags.once, flags.sampling);
  return RunCluster(flags.options, &signals, once.get());
}

}  // namespace

void AddUpCommand(CLI::App& app, int* exit_code) {
  CLI::App* command = app.add_subcommand(
      "up", "Start a controller, a loader and workers on this machine, and supervise them");
  auto flags = std::make_shared<UpFlags>();
  AddModelFlags(*command, &flags->options);
  AddMachineFlags(*command, &flags->options);
  CLI::Option* once = command->add_option(
      "--once", flags->once, "Answer this prompt on standard output, then stop everything");
  AddSamplingFlags(*command, &flags->sampling);
  command->callback([flags, once, exit_code] {
    flags->has_once = once->count() > 0;
    *exit_code = Up(*flags);
  });
}

}  // namespace sluice::cli
