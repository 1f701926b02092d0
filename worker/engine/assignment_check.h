// Checks of a ShardAssignment before anything is allocated by its numbers.
#pragma once

#include "absl/status/status.h"
#include "proto/sluice/internal/v1/shard.pb.h"

namespace sluice::worker {

// INVALID_ARGUMENT names the field and its range: model dimensions, layers and stage that fit
// together, limits of a step. After it every product of two dimensions fits in int64_t.
absl::Status CheckAssignment(const internal::v1::ShardAssignment& assignment);

}  // namespace sluice::worker
