// Pulls the tensors of a shard from the loader (Weights.Fetch), with resume after a broken stream.
#pragma once

#include <cstdint>
#include <functional>

#include "absl/status/status.h"
#include "worker/cancellation.h"
#include "worker/engine/stage_engine.h"

namespace sluice::worker {

struct FetchOptions {
  uint64_t max_tensor_bytes = 0;  // A larger tensor is refused
  // Called after each part. bytes_total is 0 when the loader does not say.
  std::function<void(uint64_t bytes_done, uint64_t bytes_total)> on_progress;
};

// Gives every tensor of the assignment to `loader`; at most one is in memory besides. A broken
// stream is resumed, with pauses that grow to 2 s; after 10 tries without a new part its error is
// returned. CANCELLED; errors of Weights.Fetch and of StageEngine::Loader::Add.
absl::Status FetchShard(const internal::v1::ShardAssignment& assignment,
                        const FetchOptions& options, StageEngine::Loader* loader,
                        Cancellation* cancellation);

}  // namespace sluice::worker
