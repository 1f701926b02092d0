#include "services/plan/stage_cut.h"

#include <map>
#include <set>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "kernels/core/status_macros.h"
#include "services/plan/accelerate_rules.h"

namespace sluice::plan {
namespace {

using internal::v1::ModelConfig;
using Entries = std::vector<std::pair<std::string, Device>>;

// Device of a tensor: the longest entry that covers it; "" when none does.
Device DeviceOf(const std::map<std::string, Device>& map, std::string name) {
  while (true) {
    auto it = map.find(name);
    if (it != map.end()) {
      return it->second;
    }
    if (name.empty()) {
      return "";
    }
    const size_t dot = name.rfind('.');
    name = dot == std::string::npos ? "" : name.substr(0, dot);
  }
}

// Devices of all parameters at or below `module`, in definition order, without repeats in a row.
void CollectDevices(const Module& module, const std::string& name,
                    const std::map<std::string, Device>& map, std::vector<Device>& devices) {
  for (const TreeTensor& tensor : module.parameters) {
    const Device device = DeviceOf(map, JoinName(name, tensor.name));
    if (devices.empty() || devices.back() != device) {
      devices.push_back(device);
    }
  }
  for (const Module& child : module.children) {
    CollectDevices(child, JoinName(name, child.name), map, devices);
  }
}

// Modules outside the layers that belong to the last stage; the others belong to the first.
bool IsTail(const std::string& name) {
  return name == "lm_head" || absl::EndsWith(name, ".norm") ||
         absl::EndsWith(name, ".final_layer_norm") || absl::EndsWith(name, ".project_out");
}

// Full names of the leaf modules outside the layers.
void CollectOutside(const Module& module, const std::string& name, const std::string& layers,
                    std::vector<std::string>& out) {
  if (name == layers) {
    return;
  }
  if (module.children.empty()) {
    out.push_back(name);
  }
  for (const Module& child : module.children) {
    CollectOutside(child, JoinName(name, child.name), layers, out);
  }
}

absl::StatusOr<Device> DeviceOfLayer(const Module& layer, const std::string& name,
                                     const std::map<std::string, Device>& map) {
  std::vector<Device> devices;
  CollectDevices(layer, name, map, devices);
  if (devices.size() > 1) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, " is on ", devices[0], " and on ", devices[1],
                     "; a layer is never split: give the whole layer one device"));
  }
  if (devices.empty() || devices[0].empty() || devices[0] == "disk") {
    return absl::InvalidArgumentError(
        absl::StrCat(name,
                     " is on \"disk\", which is storage; a pipeline computes where the "
                     "weights are: give it a worker"));
  }
  return devices[0];
}

}  // namespace

absl::StatusOr<StageCut> CutOfMap(const ModelConfig& config, const Module& root,
                                  const Entries& entries) {
  const std::map<std::string, Device> map(entries.begin(), entries.end());
  const std::string layers = LayersName(config);
  StageCut cut;
  std::set<Device> seen;
  for (uint32_t i = 0; i < config.num_layers(); ++i) {
    const std::string name = absl::StrCat(layers, ".", i);
    SLUICE_ASSIGN_OR_RETURN(const Device device, DeviceOfLayer(*FindModule(root, name), name, map));
    if (cut.stages.empty() || cut.stages.back().device != device) {
      if (!seen.insert(device).second) {
        return absl::InvalidArgumentError(
            absl::StrCat(name, " returns to device ", device,
                         "; each device holds one run of layers: put its layers side by side"));
      }
      cut.stages.push_back({device, i, i, ""});
    }
    cut.stages.back().end = i + 1;
  }
  std::vector<std::string> outside;
  CollectOutside(root, "", layers, outside);
  for (const std::string& name : outside) {
    std::vector<Device> devices;
    CollectDevices(*FindModule(root, name), name, map, devices);
    const Device& wanted = IsTail(name) ? cut.stages.back().device : cut.stages.front().device;
    if (!devices.empty() && (devices.size() > 1 || devices[0] != wanted)) {
      cut.changes.push_back(absl::StrCat(name, " is with ", IsTail(name) ? "the last" : "the first",
                                         " layer on device ", wanted, ", not on ", devices[0]));
    }
  }
  return cut;
}

Entries MapOfCut(const ModelConfig& config, const Module& root, const StageCut& cut) {
  const std::string layers = LayersName(config);
  Entries entries;
  std::vector<std::string> outside;
  CollectOutside(root, "", layers, outside);
  for (const std::string& name : outside) {
    entries.emplace_back(name, IsTail(name) ? cut.stages.back().device : cut.stages.front().device);
  }
  for (const StageRange& stage : cut.stages) {
    for (uint32_t i = stage.begin; i < stage.end; ++i) {
      entries.emplace_back(absl::StrCat(layers, ".", i), stage.device);
    }
  }
  return CollapseMap(root, entries);
}

}  // namespace sluice::plan
