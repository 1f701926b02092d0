#include <algorithm>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "services/plan/device_map.h"
#include "services/plan/memory.h"

namespace sluice::plan {
namespace {

using Json = nlohmann::ordered_json;

std::string Padded(const std::string& text, int width) {
  char buffer[160];
  std::snprintf(buffer, sizeof(buffer), "%-*s", width, text.c_str());
  return buffer;
}

// {"model.layers.0", "0"}, {"model.layers.1", "0"}, ... -> {"model.layers.0-1", "0"}: one line a
// run.
std::vector<std::pair<std::string, Device>> Runs(
    const std::vector<std::pair<std::string, Device>>& map) {
  std::vector<std::pair<std::string, Device>> runs;
  std::string stem;
  std::string first;
  for (const auto& [name, device] : map) {
    const size_t dot = name.rfind('.');
    const bool number = dot != std::string::npos && IsNumbered(name.substr(dot + 1));
    if (number && !runs.empty() && stem == name.substr(0, dot) && runs.back().second == device) {
      runs.back().first = absl::StrCat(stem, ".", first, "-", name.substr(dot + 1));
      continue;
    }
    stem = number ? name.substr(0, dot) : "";
    first = number ? name.substr(dot + 1) : "";
    runs.emplace_back(name, device);
  }
  return runs;
}

std::string What(const StagePlan& stage) {
  return absl::StrCat(stage.has_embedding ? "embedding, " : "", "layers ", stage.layer_begin, "-",
                      stage.layer_end - 1, stage.has_head ? ", norm, head" : "");
}

std::string StageTable(const DeviceMapPlan& plan) {
  size_t width = 8;
  for (const StagePlan& stage : plan.stages) {
    width = std::max(width, What(stage).size());
  }
  const int what_width = static_cast<int>(std::min<size_t>(width, 60)) + 2;
  std::string text = absl::StrCat(Padded("device", 8), Padded("holds", what_width),
                                  Padded("weights", 12), Padded("KV cache", 12),
                                  Padded("workspace", 12), Padded("of", 12), "ends because\n");
  for (const StagePlan& stage : plan.stages) {
    absl::StrAppend(&text, Padded(stage.device, 8), Padded(What(stage), what_width),
                    Padded(FormatBytes(static_cast<double>(stage.weight_bytes)), 12),
                    Padded(FormatBytes(static_cast<double>(stage.kv_bytes)), 12),
                    Padded(FormatBytes(static_cast<double>(stage.workspace_bytes)), 12),
                    Padded(FormatBytes(static_cast<double>(stage.limit_bytes)), 12), stage.reason,
                    "\n");
  }
  return text;
}

Json MapJson(const DeviceMapPlan& plan) {
  Json map = Json::object();
  for (const auto& [name, device] : plan.hf_device_map) {
    if (IsNumbered(device)) {
      map[name] = NumberOf(device);
    } else {
      map[name] = device;
    }
  }
  return map;
}

}  // namespace

std::string ToText(const DeviceMapPlan& plan) {
  std::string text;
  if (!plan.stages.empty()) {
    text = StageTable(plan);
  }
  if (plan.num_blocks > 0) {
    absl::StrAppend(&text, "KV blocks: ", plan.num_blocks, ", enough for ", plan.max_concurrency,
                    plan.max_concurrency == 1 ? " sequence of " : " sequences of ",
                    plan.max_model_len, " tokens\n");
  }
  absl::StrAppend(&text, "hf_device_map:\n");
  for (const auto& [name, device] : Runs(plan.hf_device_map)) {
    absl::StrAppend(&text, "  ", Padded(absl::StrCat("\"", name, "\""), 34), device, "\n");
  }
  for (const std::string& note : plan.notes) {
    absl::StrAppend(&text, "note: ", note, "\n");
  }
  return text;
}

std::string ToJson(const DeviceMapPlan& plan) {
  Json json;
  json["hf_device_map"] = MapJson(plan);
  json["stages"] = Json::array();
  for (const StagePlan& stage : plan.stages) {
    json["stages"].push_back({{"device", stage.device},
                              {"layer_begin", stage.layer_begin},
                              {"layer_end", stage.layer_end},
                              {"has_embedding", stage.has_embedding},
                              {"has_head", stage.has_head},
                              {"limit_bytes", stage.limit_bytes},
                              {"weight_bytes", stage.weight_bytes},
                              {"kv_bytes", stage.kv_bytes},
                              {"kv_bytes_per_block", stage.kv_bytes_per_block},
                              {"workspace_bytes", stage.workspace_bytes},
                              {"reason", stage.reason}});
  }
  json["num_blocks"] = plan.num_blocks;
  json["max_concurrency"] = plan.max_concurrency;
  json["max_model_len"] = plan.max_model_len;
  json["notes"] = plan.notes;
  return json.dump(2, ' ', /*ensure_ascii=*/false, Json::error_handler_t::replace) + "\n";
}

}  // namespace sluice::plan
