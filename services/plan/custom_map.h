// Custom device maps: a JSON object of module names and devices, resolved by the longest name that
// covers a parameter.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "services/plan/device_map.h"
#include "services/plan/module_tree.h"

namespace sluice::plan {

struct CustomMap {
  std::vector<std::pair<std::string, Device>> entries;  // As written, in the order written
  std::vector<std::pair<std::string, Device>>
      parameters;                  // Every parameter of the model, in definition order
  std::vector<std::string> notes;  // Unknown keys, overlaps
};

// `json`: an object of at most 1 MiB, values a device number or "cpu", "disk", "cuda:0"; or a bare
// device. INVALID_ARGUMENT: not that; or parameters without a device (accelerate's own text); or a
// device that is not in `max_memory` ("disk" is taken only with `allow_disk`).
absl::StatusOr<CustomMap> ResolveCustomMap(const std::string& json, const Module& root,
                                           const MaxMemory& max_memory, bool allow_disk);

}  // namespace sluice::plan
