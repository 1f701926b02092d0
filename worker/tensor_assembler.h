// TensorAssembler: makes canonical tensors from the parts of a Weights.Fetch stream, one at a time,
// and knows where a broken stream goes on. Nothing the loader says is trusted before it is checked
// here or by StageEngine::Loader.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "absl/status/statusor.h"
#include "kernels/quant.h"
#include "proto/sluice/internal/v1/weights.pb.h"

namespace sluice::worker {

// Form of a canonical tensor as the loader describes it. INVALID_ARGUMENT names the field and the
// tensor.
absl::StatusOr<QuantSpec> SpecFromProto(const internal::v1::TensorSpec& spec);

// One thread. Holds at most one tensor.
class TensorAssembler {
 public:
  using Deliver = std::function<absl::Status(const std::string& name, QuantizedMatrix tensor)>;
  // `max_tensor_bytes`: a larger tensor is refused before memory is taken for it.
  TensorAssembler(uint64_t max_tensor_bytes, Deliver deliver);

  // Takes a part; a whole tensor is checked and delivered. DATA_LOSS (CRC, order, bytes missing):
  // fetch again from the resume point. Other codes are final.
  absl::Status Add(const internal::v1::FetchResponse& part);

  // The stream ended well: DATA_LOSS when a tensor is not whole.
  absl::Status Finish() const;

  // Where to go on: the part that is missing next, or, between two tensors, the last part of the
  // one before (which is dropped when it comes again).
  const std::string& resume_name() const { return name_; }
  uint32_t resume_part() const { return whole_ ? next_part_ - 1 : next_part_; }

  // Bytes of parts taken.
  uint64_t bytes_done() const { return bytes_done_; }

 private:
  absl::Status Begin(const internal::v1::FetchResponse& part);

  const uint64_t max_tensor_bytes_;
  const Deliver deliver_;
  std::string name_;    // Of the tensor in flight, or of the last one delivered
  bool whole_ = false;  // name_ has been delivered
  uint32_t next_part_ = 0;
  uint64_t received_ = 0;  // Bytes of the tensor in flight
  uint64_t bytes_done_ = 0;
  QuantizedMatrix tensor_;
};

}  // namespace sluice::worker
