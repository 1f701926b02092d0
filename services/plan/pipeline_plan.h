// The map that runs: contiguous stages, weights, KV cache and workspace within each device's limit.
#pragma once

#include "absl/status/statusor.h"
#include "services/plan/device_map.h"
#include "services/plan/memory.h"
#include "services/plan/stage_costs.h"
#include "services/plan/stage_cut.h"

namespace sluice::plan {

// As PlanDeviceMap without options.hf_compat.
absl::StatusOr<DeviceMapPlan> PlanPipeline(const internal::v1::PlanShardsResponse& model,
                                           const MaxMemory& max_memory, const PlanOptions& options);

// How far a fill in device order got.
struct Fill {
  StageCut cut;  // Valid when `fits`; otherwise the stages that were filled
  bool fits = false;
  uint32_t next_layer = 0;     // First layer without a device
  uint64_t missing_bytes = 0;  // By how much the last device was too small for the rest
};

// Fills the devices in order, each as far as it goes within min(its limit, cap); a device that
// cannot take one layer is skipped. Finds a cut whenever there is one. `devices` without "disk".
Fill FillInOrder(const ModelCosts& costs, const Budgets& devices, double cap);

// FillInOrder with the smallest cap that fits: the largest stage is as small as it can be.
Fill FillEvenly(const ModelCosts& costs, const Budgets& devices);

// The cut a mode asks for. `fits` is false only if no cut exists for these devices.
Fill FillByMode(const ModelCosts& costs, const Budgets& devices, MapMode mode);

}  // namespace sluice::plan
