#include "services/plan/hf_map.h"

#include <map>
#include <set>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/core/status_macros.h"
#include "services/plan/accelerate_rules.h"
#include "services/plan/custom_map.h"
#include "services/plan/stage_cut.h"

namespace sluice::plan {
namespace {

using internal::v1::PlanShardsResponse;
using Entries = std::vector<std::pair<std::string, Device>>;

constexpr double kBitsAndBytesShare = 0.90;  // adjust_max_memory of the bitsandbytes quantizers

struct HfResult {
  Entries map;
  Budgets budgets;  // After balancing and the quantizer's share
};

absl::StatusOr<HfResult> InferFor(const PlanShardsResponse& model, const Module& root,
                                  const MaxMemory& max_memory, const PlanOptions& options) {
  RuleOptions rules;
  rules.rules = options.hf_rules;
  rules.no_split_classes = {LayerClass(model.config())};
  HfResult result;
  result.budgets = InOrder(max_memory);
  if (options.mode != MapMode::kSequential) {
    SLUICE_ASSIGN_OR_RETURN(result.budgets, BalancedMemory(root, result.budgets, rules,
                                                           options.mode == MapMode::kBalancedLow0));
  }
  if (model.quant().method() == "bitsandbytes") {
    for (auto& [device, bytes] : result.budgets) {
      bytes *= kBitsAndBytesShare;
    }
  }
  result.map = InferDeviceMap(root, result.budgets, rules);
  return result;
}

std::set<Device> DevicesOf(const Entries& map) {
  std::set<Device> devices;
  for (const auto& [name, device] : map) {
    devices.insert(device);
  }
  return devices;
}

std::string OneLine(const Entries& map) {
  std::vector<std::string> parts;
  for (const auto& [name, device] : map) {
    parts.push_back(absl::StrCat("\"", name, "\": ", device));
  }
  return absl::StrJoin(parts, ", ");
}

void NoteBudgets(const PlanShardsResponse& model, const HfResult& result, DeviceMapPlan& plan) {
  std::vector<std::string> budgets;
  for (const auto& [device, bytes] : result.budgets) {
    budgets.push_back(absl::StrCat(device, " = ", FormatBytes(bytes)));
  }
  const bool bitsandbytes = model.quant().method() == "bitsandbytes";
  plan.notes.push_back(absl::StrCat("budgets the rules worked with: ", absl::StrJoin(budgets, ", "),
                                    bitsandbytes ? " (after x 0.90 for bitsandbytes)" : ""));
  const std::set<Device> used = DevicesOf(result.map);
  for (const auto& [device, bytes] : result.budgets) {
    if (IsNumbered(device) && used.count(device) == 0) {
      plan.notes.push_back(absl::StrCat("device ", device, " is not used"));
    }
  }
}

void NoteLimitsOfHf(const PlanShardsResponse& model, DeviceMapPlan& plan) {
  const std::set<Device> used = DevicesOf(plan.hf_device_map);
  if (used.count("disk") != 0) {
    plan.notes.push_back(
        "the model does not fit: the modules on \"disk\" are offloaded by Hugging Face; a pipeline "
        "refuses them");
  }
  const bool offload = used.count("disk") != 0 || used.count("cpu") != 0;
  if (offload && used.size() > 1 && model.quant().method() == "bitsandbytes") {
    plan.notes.push_back(
        "transformers refuses this map: \"Some modules are dispatched on the CPU or the disk.\" "
        "(bitsandbytes without llm_int8_enable_fp32_cpu_offload); a Sluice cpu worker computes the "
        "quantized layers it holds");
  }
  if (offload && model.quant().method() == "awq") {
    plan.notes.push_back(
        "transformers' CUDA kernels refuse this map: \"You are attempting to load an AWQ model "
        "with "
        "a device_map that contains a CPU or disk device.\"");
  }
  if (model.quant().method() == "gguf") {
    plan.notes.push_back(
        "sizes are those of the GGUF file; transformers unpacks a GGUF file to full precision "
        "before it plans, and needs more");
  }
}

void NoteOtherRules(const PlanShardsResponse& model, const Module& root,
                    const MaxMemory& max_memory, PlanOptions options, DeviceMapPlan& plan) {
  const bool accelerate = options.hf_rules == HfRules::kAccelerate;
  options.hf_rules = accelerate ? HfRules::kTransformers : HfRules::kAccelerate;
  auto other = InferFor(model, root, max_memory, options);
  if (other.ok() && other->map != plan.hf_device_map) {
    plan.notes.push_back(absl::StrCat(
        accelerate ? "transformers 5 balances by its own rules (--hf-compat=transformers): "
                   : "accelerate's own functions (--hf-compat=accelerate) give: ",
        OneLine(other->map)));
  }
}

void FillStages(const PlanShardsResponse& model, const Module& root, const MaxMemory& max_memory,
                DeviceMapPlan& plan) {
  auto cut = CutOfMap(model.config(), root, plan.hf_device_map);
  if (!cut.ok()) {
    plan.notes.push_back(
        absl::StrCat("a pipeline cannot follow this map: ", std::string(cut.status().message())));
    return;
  }
  if (!cut->changes.empty()) {
    plan.notes.push_back(
        absl::StrCat("a pipeline would run it with changes: ", absl::StrJoin(cut->changes, "; ")));
    return;
  }
  std::map<Device, uint64_t> bytes;
  const ModuleSizes sizes(root);
  for (const auto& [name, device] : plan.hf_device_map) {
    bytes[device] += sizes.at(name);
  }
  for (size_t i = 0; i < cut->stages.size(); ++i) {
    StagePlan stage;
    stage.device = cut->stages[i].device;
    stage.layer_begin = cut->stages[i].begin;
    stage.layer_end = cut->stages[i].end;
    stage.has_embedding = i == 0;
    stage.has_head = i + 1 == cut->stages.size();
    auto limit = max_memory.find(stage.device);
    stage.limit_bytes = limit == max_memory.end() ? 0 : limit->second;
    stage.weight_bytes = bytes[stage.device];
    stage.reason = stage.has_head ? "the last layer" : "Hugging Face's rules, see the budgets";
    plan.stages.push_back(stage);
  }
}

}  // namespace

absl::StatusOr<DeviceMapPlan> PlanHfMap(const PlanShardsResponse& model,
                                        const MaxMemory& max_memory, const PlanOptions& options) {
  SLUICE_ASSIGN_OR_RETURN(const Module root, BuildModuleTree(model));
  DeviceMapPlan plan;
  if (options.mode == MapMode::kCustom) {
    SLUICE_ASSIGN_OR_RETURN(CustomMap custom,
                            ResolveCustomMap(options.custom_json, root, max_memory,
                                             /*allow_disk=*/true));
    plan.hf_device_map = custom.entries;
    plan.notes = custom.notes;
    auto resolved = plan.hf_device_map;
    plan.hf_device_map = CollapseMap(root, custom.parameters);
    FillStages(model, root, max_memory, plan);
    plan.hf_device_map = resolved;
  } else {
    SLUICE_ASSIGN_OR_RETURN(HfResult result, InferFor(model, root, max_memory, options));
    plan.hf_device_map = result.map;
    NoteBudgets(model, result, plan);
    NoteOtherRules(model, root, max_memory, options, plan);
    FillStages(model, root, max_memory, plan);
  }
  NoteLimitsOfHf(model, plan);
  return plan;
}

}  // namespace sluice::plan
