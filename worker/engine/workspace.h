// Workspace: device memory for the activations of one step, allocated once for the largest step.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "proto/sluice/internal/v1/shard.pb.h"
#include "worker/engine/decoder_layer.h"

namespace sluice::worker {

class Workspace {
 public:
  // Also reserves the backend's own scratch for the widest matrix of the shard. `extra_rows`: of
  // the residual stream, beyond max_batch_tokens. RESOURCE_EXHAUSTED: the device has not that much
  // memory.
  static absl::StatusOr<std::unique_ptr<Workspace>> Create(
      const internal::v1::ShardAssignment& assignment, int64_t extra_rows, Backend* backend);

  // Views of the first num_rows rows. REQUIRES: num_rows <= max_batch_tokens.
  Activations Rows(int64_t num_rows) const;
  // The residual stream with its extra rows.
  TensorView hidden() const { return full_.hidden; }
  uint64_t bytes() const { return bytes_; }  // Without the backend's scratch

 private:
  absl::Status AllocateRows(int64_t rows, int64_t cols, Backend* backend, TensorView* view);

  std::vector<std::unique_ptr<DeviceBuffer>> buffers_;
  Activations full_;
  uint64_t bytes_ = 0;
};

}  // namespace sluice::worker
