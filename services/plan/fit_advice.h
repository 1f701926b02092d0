// The text of "it does not fit": how much is missing, where, and what would fit.
#pragma once

#include "absl/status/status.h"
#include "services/plan/device_map.h"
#include "services/plan/pipeline_plan.h"

namespace sluice::plan {

// RESOURCE_EXHAUSTED for a fill in device order that did not fit.
absl::Status DoesNotFit(const internal::v1::PlanShardsResponse& model, const Budgets& devices,
                        const PlanOptions& options, const Fill& fill);

// RESOURCE_EXHAUSTED for a custom cut whose stage needs more than its device has.
absl::Status CustomDoesNotFit(const internal::v1::PlanShardsResponse& model, const Budgets& devices,
                              const PlanOptions& options, const StageCut& cut);

}  // namespace sluice::plan
