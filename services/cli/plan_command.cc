// sluice plan: the device map of a checkpoint, from its headers alone. Nothing is loaded and no
// process is started.
#include <cstdio>
#include <memory>

#include "absl/strings/str_cat.h"
#include "kernels/core/status_macros.h"
#include "services/checkpoint/checkpoint.h"
#include "services/cli/checkpoint_flags.h"
#include "services/cli/commands.h"
#include "services/cli/resources.h"
#include "services/plan/device_map.h"
#include "services/rpc/flags.h"

namespace sluice::cli {
namespace {

struct PlanFlags {
  std::string model;
  std::string revision;
  std::string device_map = "auto";
  std::string max_memory;
  int workers = 1;
  std::string hf_compat;
  std::string dtype = "auto";
  std::string kv_reserve;
  bool json = false;
  plan::PlanOptions options;
};

absl::Status ReadFlags(const PlanFlags& flags, plan::PlanOptions* options,
                       plan::MaxMemory* max_memory) {
  SLUICE_ASSIGN_OR_RETURN(options->mode, plan::ParseMapMode(flags.device_map));
  if (options->mode == plan::MapMode::kCustom) {
    options->custom_json = flags.device_map;
  }
  options->hf_compat = !flags.hf_compat.empty();
  if (flags.hf_compat == "transformers") {
    options->hf_rules = plan::PlanOptions::HfRules::kTransformers;
  }
  options->kv_element_bytes = flags.dtype == "float16" || flags.dtype == "bfloat16" ? 2 : 4;
  if (!flags.kv_reserve.empty()) {
    SLUICE_ASSIGN_OR_RETURN(options->kv_reserve_bytes, plan::ParseBytes(flags.kv_reserve));
  }
  if (!flags.max_memory.empty()) {
    SLUICE_ASSIGN_OR_RETURN(*max_memory, plan::ParseMaxMemory(flags.max_memory));
    return absl::OkStatus();
  }
  const WorkerShare share = ShareOf(ThisMachine(), flags.workers);
  for (int i = 0; i < flags.workers; ++i) {
    (*max_memory)[absl::StrCat(i)] = share.memory_bytes;
  }
  return absl::OkStatus();
}

std::string Describe(const internal::v1::PlanShardsResponse& model) {
  uint64_t bytes = 0;
  for (const auto& tensor : model.tensors()) {
    bytes += tensor.bytes();
  }
  return absl::StrCat(model.model_name(), ": ", model.config().model_type(), ", ",
                      model.config().num_layers(), " layers, ", model.quant().method(), " ",
                      model.quant().detail(), ", ", bytes >> 20, " MiB of weights\n");
}

absl::Status Plan(const PlanFlags& flags) {
  plan::PlanOptions options = flags.options;
  plan::MaxMemory max_memory;
  SLUICE_RETURN_IF_ERROR(ReadFlags(flags, &options, &max_memory));
  SLUICE_ASSIGN_OR_RETURN(const auto checkpoint,
                          checkpoint::Checkpoint::Open(flags.model, flags.revision));
  const auto& model = checkpoint->description();
  SLUICE_ASSIGN_OR_RETURN(const plan::DeviceMapPlan result,
                          plan::PlanDeviceMap(model, max_memory, options));
  if (flags.json) {
    std::printf("%s", plan::ToJson(result).c_str());
    return absl::OkStatus();
  }
  std::printf("%s%s", Describe(model).c_str(), plan::ToText(result).c_str());
  for (const std::string& warning : model.warnings()) {
    std::printf("warning: %s\n", warning.c_str());
  }
  return absl::OkStatus();
}

}  // namespace

void AddPlanCommand(CLI::App& app, int* exit_code) {
  CLI::App* command =
      app.add_subcommand("plan", "Show which layer would go where, and why, from headers alone");
  auto flags = std::make_shared<PlanFlags>();
  AddCheckpointFlags(*command, &flags->model, &flags->revision);
  rpc::AddFlag(*command, "device-map", &flags->device_map,
               "sequential, auto, balanced, balanced_low_0, or a JSON object module -> device");
  rpc::AddFlag(*command, "max-memory", &flags->max_memory,
               "Memory by device, e.g. 0=10GiB,1=8GiB,cpu=30GiB; default: this machine's, in "
               "--workers parts");
  rpc::AddFlag(*command, "workers", &flags->workers, "Without --max-memory: CPU workers")
      ->check(CLI::Range(1, 1024));
  command
      ->add_flag("--hf-compat{accelerate}", flags->hf_compat,
                 "Hugging Face's map exactly, no KV cache: accelerate's own functions, or "
                 "=transformers for what from_pretrained of transformers 5 does")
      ->check(CLI::IsMember({"accelerate", "transformers"}));
  rpc::AddFlag(*command, "dtype", &flags->dtype,
               "Type of the KV cache: auto (float32, as on CPU), float32, float16, bfloat16")
      ->check(CLI::IsMember({"auto", "float32", "float16", "bfloat16"}));
  rpc::AddFlag(*command, "kv-reserve", &flags->kv_reserve,
               "Memory that must be left for the KV cache; default: for one longest sequence");
  rpc::AddFlag(*command, "max-model-len", &flags->options.max_model_len,
               "Longest context in tokens; 0: the model's");
  rpc::AddFlag(*command, "max-batch-size", &flags->options.max_batch_size,
               "Sequences that run at once");
  rpc::AddFlag(*command, "max-batch-tokens", &flags->options.max_batch_tokens,
               "Tokens of one step");
  rpc::AddFlag(*command, "block-size", &flags->options.block_size, "Tokens of a KV block");
  command->add_flag("--json", flags->json, "JSON for programs");
  command->callback([flags, exit_code] {
    const absl::Status status = Plan(*flags);
    if (!status.ok()) {
      std::fprintf(stderr, "sluice plan: %s\n", std::string(status.message()).c_str());
    }
    *exit_code = status.ok() ? 0 : 1;
  });
}

}  // namespace sluice::cli
