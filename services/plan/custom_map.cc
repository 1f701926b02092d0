#include "services/plan/custom_map.h"

#include <nlohmann/json.hpp>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/core/status_macros.h"
#include "services/plan/memory.h"

namespace sluice::plan {
namespace {

using Json = nlohmann::ordered_json;
using Entries = std::vector<std::pair<std::string, Device>>;

constexpr size_t kMaxJsonBytes = 1 << 20;

bool Covers(const std::string& key, const std::string& name) {
  return key.empty() || name == key || absl::StartsWith(name, key + ".");
}

absl::StatusOr<Device> DeviceOf(const std::string& key, const Json& value) {
  Device device;
  if (value.is_number_unsigned()) {
    device = NormalDevice(absl::StrCat(value.get<uint64_t>()));
  } else if (value.is_string()) {
    device = NormalDevice(value.get<std::string>());
  }
  if (device.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("device map, key \"", key, "\": ", value.dump(),
                     " is not a device; use a worker's number, \"cpu\" or \"disk\""));
  }
  return device;
}

absl::StatusOr<Entries> ParseEntries(const std::string& text) {
  if (const Device bare = NormalDevice(text); !bare.empty()) {
    return Entries{{"", bare}};
  }
  if (text.size() > kMaxJsonBytes) {
    return absl::InvalidArgumentError("device map: longer than 1 MiB");
  }
  const Json json = Json::parse(text, /*cb=*/nullptr, /*allow_exceptions=*/false);
  if (!json.is_object() || json.empty()) {
    return absl::InvalidArgumentError(
        "device map: expected a JSON object of module names and devices, such as "
        "{\"model.layers.0\": 0, \"\": 1}");
  }
  Entries entries;
  for (const auto& [key, value] : json.items()) {
    SLUICE_ASSIGN_OR_RETURN(Device device, DeviceOf(key, value));
    entries.emplace_back(key, device);
  }
  return entries;
}

absl::Status CheckDevices(const Entries& entries, const MaxMemory& max_memory, bool allow_disk) {
  for (const auto& [key, device] : entries) {
    if (device == "disk" && !allow_disk) {
      return absl::InvalidArgumentError(
          absl::StrCat("device map, key \"", key,
                       "\": \"disk\" is storage, and a pipeline computes where the weights are; "
                       "give it a worker, "
                       "or print the map alone with --hf-compat"));
    }
    if (device != "disk" && max_memory.count(device) == 0) {
      std::vector<Device> known;
      for (const auto& [name, bytes] : max_memory) {
        known.push_back(name);
      }
      return absl::InvalidArgumentError(absl::StrCat("device map, key \"", key, "\": no device ",
                                                     device, "; there are ",
                                                     absl::StrJoin(known, ", ")));
    }
  }
  return absl::OkStatus();
}

void NoteOddities(const Module& root, CustomMap& map) {
  const auto order = DefinitionOrder(root);
  const Entries& entries = map.entries;
  for (size_t i = 0; i < entries.size(); ++i) {
    const auto& [key, device] = entries[i];
    if (order.count(key) == 0) {
      map.notes.push_back(absl::StrCat("device map, key \"", key,
                                       "\": no such module or parameter in the model; ignored"));
    }
    for (size_t before = 0; before < i; ++before) {
      if (key != entries[before].first && Covers(key, entries[before].first) &&
          device != entries[before].second) {
        map.notes.push_back(absl::StrCat(
            "device map: \"", key, "\" comes after \"", entries[before].first,
            "\", which is inside it; here the longer name wins, in transformers the later one. "
            "Put general names first"));
      }
    }
  }
}

}  // namespace

absl::StatusOr<CustomMap> ResolveCustomMap(const std::string& json, const Module& root,
                                           const MaxMemory& max_memory, bool allow_disk) {
  CustomMap map;
  SLUICE_ASSIGN_OR_RETURN(map.entries, ParseEntries(json));
  SLUICE_RETURN_IF_ERROR(CheckDevices(map.entries, max_memory, allow_disk));
  std::vector<std::string> uncovered;
  for (const std::string& parameter : ParameterNames(root)) {
    const std::pair<std::string, Device>* best = nullptr;
    for (const auto& entry : map.entries) {
      if (Covers(entry.first, parameter) &&
          (best == nullptr || entry.first.size() >= best->first.size())) {
        best = &entry;
      }
    }
    if (best == nullptr) {
      uncovered.push_back(parameter);
    } else {
      map.parameters.emplace_back(parameter, best->second);
    }
  }
  if (!uncovered.empty()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "The device_map provided does not give any device for the following parameters: ",
        absl::StrJoin(uncovered, ", ")));
  }
  NoteOddities(root, map);
  return map;
}

}  // namespace sluice::plan
