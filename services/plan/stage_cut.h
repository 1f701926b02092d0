// A cut of the decoder into contiguous stages, and how it follows from a map of modules to devices.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "services/plan/device_map.h"
#include "services/plan/module_tree.h"

namespace sluice::plan {

// Layers [begin, end) on one device.
struct StageRange {
  Device device;
  uint32_t begin = 0;
  uint32_t end = 0;
  std::string reason;  // Why it ends where it ends
};

struct StageCut {
  std::vector<StageRange>
      stages;  // In pipeline order; together all layers; embedding first, norm and head last
  std::vector<std::string> changes;  // What the map wanted and a pipeline does otherwise
};

// The cut that a map of modules or parameters means. The embedding moves to the first stage, norm
// and head to the last, and `changes` says so. INVALID_ARGUMENT, naming the layer: a layer over two
// devices, a return to an earlier device, "disk".
absl::StatusOr<StageCut> CutOfMap(const internal::v1::ModelConfig& config, const Module& root,
                                  const std::vector<std::pair<std::string, Device>>& map);

// The map of a cut, collapsed: the embedding (positions, project_in) with the first layer, the norm
// (project_out) and the head with the last.
std::vector<std::pair<std::string, Device>> MapOfCut(const internal::v1::ModelConfig& config,
                                                     const Module& root, const StageCut& cut);

}  // namespace sluice::plan
