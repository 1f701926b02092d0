#include "services/plan/pipeline_plan.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/core/status_macros.h"
#include "services/plan/custom_map.h"
#include "services/plan/fit_advice.h"

namespace sluice::plan {
namespace {

using internal::v1::PlanShardsResponse;

// Devices that may compute, in order. "disk" cannot.
Budgets ComputeDevices(const MaxMemory& max_memory, std::vector<std::string>& notes) {
  Budgets devices;
  for (const auto& entry : InOrder(max_memory)) {
    if (entry.first == "disk") {
      notes.push_back("\"disk\" is storage and takes no part in a pipeline");
    } else {
      devices.push_back(entry);
    }
  }
  return devices;
}

absl::StatusOr<StageCut> CustomCut(const PlanShardsResponse& model, const Module& root,
                                   const MaxMemory& max_memory, const PlanOptions& options,
                                   std::vector<std::string>& notes) {
  SLUICE_ASSIGN_OR_RETURN(CustomMap custom, ResolveCustomMap(options.custom_json, root, max_memory,
                                                             /*allow_disk=*/false));
  notes.insert(notes.end(), custom.notes.begin(), custom.notes.end());
  auto cut = CutOfMap(model.config(), root, custom.parameters);
  if (!cut.ok()) {
    return absl::InvalidArgumentError(absl::StrCat("device map: a pipeline cannot run it: ",
                                                   std::string(cut.status().message())));
  }
  for (const std::string& change : cut->changes) {
    notes.push_back(absl::StrCat("changed: ", change, "; its bytes are counted there"));
  }
  for (StageRange& stage : cut->stages) {
    stage.reason = "custom map";
  }
  const Budgets devices = InOrder(max_memory);
  const ModelCosts costs = CostsOf(model, options);
  for (const StageRange& stage : cut->stages) {
    if (StageBytes(costs, stage.begin, stage.end, costs.min_blocks) > max_memory.at(stage.device)) {
      return CustomDoesNotFit(model, devices, options, *cut);
    }
  }
  return cut;
}

// KV blocks that fit beside weights and workspace on every stage.
uint32_t BlocksOf(const ModelCosts& costs, const std::vector<StagePlan>& stages) {
  uint64_t blocks = costs.max_blocks;
  for (const StagePlan& stage : stages) {
    const uint64_t room = stage.limit_bytes - stage.weight_bytes - stage.workspace_bytes;
    if (stage.kv_bytes_per_block > 0) {
      blocks = std::min(blocks, room / stage.kv_bytes_per_block);
    }
  }
  return static_cast<uint32_t>(blocks);
}

void FillStages(const ModelCosts& costs, const MaxMemory& max_memory, const StageCut& cut,
                DeviceMapPlan& plan) {
  for (const StageRange& range : cut.stages) {
    StagePlan stage;
    stage.device = range.device;
    stage.layer_begin = range.begin;
    stage.layer_end = range.end;
    stage.has_embedding = range.begin == 0;
    stage.has_head = range.end == costs.layers.size();
    stage.limit_bytes = max_memory.at(range.device);
    stage.weight_bytes = WeightBytes(costs, range.begin, range.end);
    stage.kv_bytes_per_block = costs.kv_per_layer_block * (range.end - range.begin);
    stage.workspace_bytes = WorkspaceBytes(costs, range.end);
    stage.reason = range.reason;
    plan.stages.push_back(stage);
  }
  plan.num_blocks = BlocksOf(costs, plan.stages);
  for (StagePlan& stage : plan.stages) {
    stage.kv_bytes = plan.num_blocks * stage.kv_bytes_per_block;
  }
  plan.max_model_len = costs.max_model_len;
  plan.max_concurrency = plan.num_blocks / std::max(1u, costs.blocks_per_sequence);
}

void NoteChoices(const ModelCosts& costs, const Budgets& devices, const PlanOptions& options,
                 DeviceMapPlan& plan) {
  for (const auto& [device, limit] : devices) {
    const bool used = std::any_of(plan.stages.begin(), plan.stages.end(),
                                  [&, d = device](const auto& stage) { return stage.device == d; });
    if (used) {
      continue;
    }
    const bool small = limit < static_cast<double>(costs.workspace + costs.layers[0]);
    plan.notes.push_back(absl::StrCat(
        "device ", device, " is not used: ",
        small ? absl::StrCat(FormatBytes(limit), " do not hold one layer and the workspace")
        : device == "cpu" ? "the numbered devices hold the model"
                          : "the model fits on the others, or has too few layers"));
  }
  if (costs.tied_table > 0 && plan.stages.size() > 1) {
    plan.notes.push_back(absl::StrCat("the head is the embedding table: device ",
                                      plan.stages.back().device, " holds a copy of it, ",
                                      FormatBytes(static_cast<double>(costs.tied_table))));
  }
  if (plan.num_blocks == costs.max_blocks) {
    plan.notes.push_back(absl::StrCat("KV cache: ", plan.num_blocks, " blocks are all that ",
                                      options.max_batch_size, " sequences of ", costs.max_model_len,
                                      " tokens can use; the rest stays free"));
  } else {
    uint64_t least = UINT64_MAX;
    Device limiting;
    for (const StagePlan& stage : plan.stages) {
      const uint64_t room = stage.limit_bytes - stage.weight_bytes - stage.workspace_bytes;
      const uint64_t blocks = room / std::max<uint64_t>(1, stage.kv_bytes_per_block);
      if (blocks < least) {
        least = blocks;
        limiting = stage.device;
      }
    }
    plan.notes.push_back(
        absl::StrCat("KV cache: device ", limiting, " limits it to ", plan.num_blocks, " blocks"));
  }
}

absl::Status CheckOptions(const PlanShardsResponse& model, const PlanOptions& options) {
  if (options.block_size == 0 || options.max_batch_size == 0 || options.max_batch_tokens == 0) {
    return absl::InvalidArgumentError(
        "block_size, max_batch_size and max_batch_tokens must be at least 1");
  }
  const uint32_t longest = model.config().max_position_embeddings();
  if (options.max_model_len > longest) {
    return absl::InvalidArgumentError(
        absl::StrCat("max_model_len ", options.max_model_len, " is above the ", longest,
                     " tokens (max_position_embeddings) that the model was made for; use ", longest,
                     " or less"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<DeviceMapPlan> PlanPipeline(const PlanShardsResponse& model,
                                           const MaxMemory& max_memory,
                                           const PlanOptions& options) {
  SLUICE_RETURN_IF_ERROR(CheckOptions(model, options));
  SLUICE_ASSIGN_OR_RETURN(const Module root, BuildModuleTree(model));
  DeviceMapPlan plan;
  const Budgets devices = ComputeDevices(max_memory, plan.notes);
  if (devices.empty()) {
    return absl::InvalidArgumentError("max memory names no device that computes; add 0=SIZE");
  }
  const ModelCosts costs = CostsOf(model, options);
  StageCut cut;
  if (options.mode == MapMode::kCustom) {
    SLUICE_ASSIGN_OR_RETURN(cut, CustomCut(model, root, max_memory, options, plan.notes));
  } else {
    Fill fill = FillByMode(costs, devices, options.mode);
    if (!fill.fits) {
      return DoesNotFit(model, devices, options, fill);
    }
    cut = std::move(fill.cut);
  }
  plan.hf_device_map = MapOfCut(model.config(), root, cut);
  FillStages(costs, max_memory, cut, plan);
  NoteChoices(costs, devices, options, plan);
  return plan;
}

}  // namespace sluice::plan
