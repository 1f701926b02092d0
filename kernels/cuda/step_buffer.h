// StepBuffer: brings what changes from step to step (StepRows of kernels/backend.h) to the device in
// one copy, as the DeviceStep that kernels read.
//
// A decode step (every sequence has one row) is filled up to a bucket; the arrays' addresses depend
// on the bucket alone, so a recorded graph of the bucket finds them again.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "kernels/backend.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/memory.h"
#include "kernels/cuda/step_inputs.h"

namespace sluice {

inline constexpr int64_t kDecodeBuckets[] = {1,  2,  3,  4,  5,  6,  7,  8,   12,  16,
                                             24, 32, 40, 48, 56, 64, 96, 128, 192, 256};
inline constexpr int64_t kMaxHalfDim = 128;

class StepBuffer {
 public:
  // Room for steps of so many rows and sequences; waits for the device. RESOURCE_EXHAUSTED.
  absl::Status Reserve(int64_t step_rows, int64_t max_sequences, int64_t max_context,
                       int64_t block_size);

  // Fills the host side and starts the copy on the context's stream. The step before must be done.
  void Begin(const LaunchContext& context, const StepRows& rows);

  const DeviceStep& device() const { return device_; }
  int64_t real_rows() const { return real_rows_; }
  int64_t logit_rows() const { return logit_rows_; }
  const int32_t* device_logit_rows() const { return logit_index_; }
  // These are the rows that the step was begun with, not others.
  bool IsLogitRows(absl::Span<const int64_t> rows) const {
    return rows.data() == announced_.data() && rows.size() == announced_.size();
  }
  const float* inv_freq() const { return inv_freq_; }
  int64_t inv_freq_stride() const { return inv_freq_stride_; }  // 0: the same for all rows
  // Every row decodes and gets logits, and rows are filled up to a bucket: operations depend on the
  // bucket alone.
  bool recordable() const { return recordable_; }

 private:
  // Takes `count` elements of both sides.
  template <typename T>
  T* Take(int64_t count, const T** device);
  void FillRows(const StepRows& rows);
  void FillSequences(const StepRows& rows);
  void FillRope(const StepRows& rows);

  PinnedMemory host_;
  DeviceMemory memory_;
  int64_t step_rows_ = 0, max_sequences_ = 0, table_stride_ = 0;
  int64_t block_size_ = 1;
  int64_t used_ = 0;  // Bytes of this step

  DeviceStep device_;
  int64_t real_rows_ = 0, logit_rows_ = 0, inv_freq_stride_ = 0;
  const int32_t* logit_index_ = nullptr;
  absl::Span<const int64_t> announced_;  // StepRows::logit_rows
  const float* inv_freq_ = nullptr;
  bool decode_only_ = false, recordable_ = false;
};

}  // namespace sluice
