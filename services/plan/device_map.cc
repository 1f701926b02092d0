#include "services/plan/device_map.h"

#include "services/plan/hf_map.h"
#include "services/plan/pipeline_plan.h"

namespace sluice::plan {

absl::StatusOr<DeviceMapPlan> PlanDeviceMap(const internal::v1::PlanShardsResponse& model,
                                            const MaxMemory& max_memory,
                                            const PlanOptions& options) {
  if (model.config().num_layers() == 0) {
    return absl::InvalidArgumentError("config.num_layers: 0; a decoder has at least one layer");
  }
  if (max_memory.empty()) {
    return absl::InvalidArgumentError(
        "max memory is empty; say which device has how much: 0=10GiB");
  }
  return options.hf_compat ? PlanHfMap(model, max_memory, options)
                           : PlanPipeline(model, max_memory, options);
}

}  // namespace sluice::plan
