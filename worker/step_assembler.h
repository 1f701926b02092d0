// StepAssembler: makes whole steps from the pieces of one incoming stream. Nothing a peer says is
// trusted before it is checked here or in StageEngine::Step.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/core/dtype.h"
#include "proto/sluice/internal/v1/shard.pb.h"

namespace sluice::worker {

// What the steps of a stream must look like.
struct StepFormat {
  uint64_t epoch = 0;
  bool has_hidden = false;    // Link: [num_tokens, row] hidden states. Step: none
  uint64_t row_bytes = 0;     // Bytes of a row of hidden states
  DType dtype = DType::kF32;  // Of hidden states
  uint32_t max_tokens = 0;    // Most rows of a step
};

// A whole step. `hidden_states` may be longer than hidden_bytes: buffers are reused.
struct StepWork {
  internal::v1::StepHeader header;
  std::vector<uint8_t> hidden_states;
  uint64_t hidden_bytes = 0;
};

// One thread.
class StepAssembler {
 public:
  explicit StepAssembler(const StepFormat& format) : format_(format) {}

  // Takes a piece; true when the step is whole: Take() it before the next piece. Errors end the
  // stream: FAILED_PRECONDITION (another epoch), INVALID_ARGUMENT (order, offset, size, dtype),
  // DATA_LOSS (CRC).
  absl::StatusOr<bool> Add(internal::v1::StepFrame* frame);
  StepWork Take();

  // A buffer to use again for a later step.
  void Recycle(std::vector<uint8_t> buffer) { spare_ = std::move(buffer); }

 private:
  absl::Status Begin(internal::v1::StepFrame* frame);
  absl::Status AddBytes(const internal::v1::StepFrame& frame);

  StepFormat format_;
  bool begun_ = false;
  StepWork work_;
  uint64_t received_ = 0;
  std::vector<uint8_t> spare_;
};

}  // namespace sluice::worker
