// The device map as Hugging Face computes it (--hf-compat): accelerate's rules on the module tree,
// no KV cache.
#pragma once

#include "absl/status/statusor.h"
#include "services/plan/device_map.h"

namespace sluice::plan {

// As PlanDeviceMap with options.hf_compat. Never fails for lack of memory: what fits nowhere is on
// "disk", as there. Stages are filled (weights alone) when a pipeline can follow the map as it is;
// otherwise a note says why it cannot.
absl::StatusOr<DeviceMapPlan> PlanHfMap(const internal::v1::PlanShardsResponse& model,
                                        const MaxMemory& max_memory, const PlanOptions& options);

}  // namespace sluice::plan
