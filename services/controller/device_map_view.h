// Conversions from plans and workers to the public messages.
#pragma once

#include <cstdint>

#include "proto/sluice/v1/admin.pb.h"
#include "proto/sluice/v1/model.pb.h"
#include "services/controller/model_catalog.h"
#include "services/controller/worker_registry.h"
#include "services/plan/device_map.h"

namespace sluice::controller {

v1::DeviceMap ToDeviceMap(const plan::DeviceMapPlan& plan, uint32_t block_size);

// Adds what a live worker says to its stage.
void AddWorker(const AttachedWorker& worker, v1::DeviceMapStage* stage);

// `stage`: -1 = not in the plan.
v1::Worker ToWorker(const AttachedWorker& worker, int stage);

v1::Model ToModel(const ServedModel& model, v1::ModelState state, uint32_t max_model_len);

}  // namespace sluice::controller
