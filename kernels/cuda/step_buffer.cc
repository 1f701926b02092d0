#include "kernels/cuda/step_buffer.h"

#include <algorithm>
#include <cstring>
#include <iterator>

#include "kernels/core/check.h"
#include "kernels/core/status_macros.h"

namespace sluice {
namespace {

constexpr int64_t kAlignment = 64;

int64_t Aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// The bucket that `rows` decode rows are filled up to; `rows` itself when none fits below `limit`.
int64_t BucketOf(int64_t rows, int64_t limit) {
  const auto* bucket = std::lower_bound(std::begin(kDecodeBuckets), std::end(kDecodeBuckets), rows);
  return bucket == std::end(kDecodeBuckets) || *bucket > limit ? rows : *bucket;
}

}  // namespace

absl::Status StepBuffer::Reserve(int64_t step_rows, int64_t max_sequences, int64_t max_context,
                                 int64_t block_size) {
  step_rows_ = std::max(step_rows_, step_rows);
  max_sequences_ = std::max(max_sequences_, max_sequences);
  block_size_ = std::max<int64_t>(block_size, 1);
  table_stride_ = std::max(table_stride_, (max_context + block_size_ - 1) / block_size_);
  const int64_t sequences = std::max(max_sequences_, step_rows_);
  const int64_t per_row = 5 * int64_t{sizeof(int32_t)} + int64_t{sizeof(PrefillTile)} +
                          kMaxHalfDim * int64_t{sizeof(float)};
  const int64_t bytes = Aligned(sequences * int64_t{sizeof(int32_t)}) + step_rows_ * per_row +
                        std::min(sequences, max_sequences_ + 256) * table_stride_ * 4 +
                        16 * kAlignment;
  if (bytes <= memory_.bytes()) return absl::OkStatus();
  SLUICE_ASSIGN_OR_RETURN(memory_, DeviceMemory::Allocate(bytes));
  SLUICE_ASSIGN_OR_RETURN(host_, PinnedMemory::Allocate(bytes));
  return absl::OkStatus();
}

template <typename T>
T* StepBuffer::Take(int64_t count, const T** device) {
  T* host = reinterpret_cast<T*>(host_.as<uint8_t>() + used_);
  *device = reinterpret_cast<const T*>(memory_.as<uint8_t>() + used_);
  used_ = Aligned(used_ + count * static_cast<int64_t>(sizeof(T)));
  SLUICE_CHECK(used_ <= memory_.bytes()) << "a step of " << device_.rows << " rows exceeds Reserve";
  return host;
}

void StepBuffer::FillRows(const StepRows& rows) {
  const int64_t padded = device_.rows;
  uint32_t* ids = Take<uint32_t>(padded, &device_.token_ids);
  std::fill_n(ids, padded, 0u);
  std::copy(rows.token_ids.begin(), rows.token_ids.end(), ids);
  uint32_t* table_rows = Take<uint32_t>(padded, &device_.table_rows);
  std::fill_n(table_rows, padded, 0u);
  std::copy(rows.table_rows.begin(), rows.table_rows.end(), table_rows);
  int32_t* logits = Take<int32_t>(std::max(padded, logit_rows_), &logit_index_);
  std::fill_n(logits, std::max(padded, logit_rows_), 0);
  std::copy(rows.logit_rows.begin(), rows.logit_rows.end(), logits);
}

void StepBuffer::FillSequences(const StepRows& rows) {
  const int64_t padded = device_.rows;
  int32_t* positions = Take<int32_t>(padded, &device_.positions);
  int32_t* sequences = Take<int32_t>(padded, &device_.sequences);
  int32_t* decode_rows = Take<int32_t>(padded, &device_.decode_rows);
  PrefillTile* tiles = Take<PrefillTile>(decode_only_ ? 1 : padded, &device_.prefill_tiles);
  const int64_t count =
      std::max<int64_t>(decode_only_ ? padded : 1, static_cast<int64_t>(rows.sequences.size()));
  int32_t* tables = Take<int32_t>(count * table_stride_, &device_.block_tables);
  device_.block_table_stride = table_stride_;
  device_.num_decode_rows = 0;
  device_.num_prefill_tiles = 0;
  for (size_t i = 0; i < rows.sequences.size(); ++i) {
    const SequenceRows& sequence = rows.sequences[i];
    const auto number = static_cast<int32_t>(i);
    const auto begin = static_cast<int32_t>(sequence.row_begin);
    for (int64_t row = 0; row < sequence.num_rows; ++row) {
      positions[begin + row] = static_cast<int32_t>(sequence.start_pos + row);
      sequences[begin + row] = number;
    }
    const int64_t length = sequence.start_pos + sequence.num_rows;
    const int64_t blocks = (length + block_size_ - 1) / block_size_;
    SLUICE_CHECK(blocks <= table_stride_) << "a context of " << length << " exceeds Reserve";
    std::memcpy(tables + number * table_stride_, sequence.block_table, blocks * sizeof(int32_t));
    if (sequence.num_rows == 1) {
      decode_rows[device_.num_decode_rows++] = begin;
      continue;
    }
    for (int64_t row = 0; row < sequence.num_rows; row += kPrefillTileRows) {
      tiles[device_.num_prefill_tiles++] = {
          number, begin + static_cast<int32_t>(row),
          static_cast<int32_t>(std::min<int64_t>(kPrefillTileRows, sequence.num_rows - row)),
          static_cast<int32_t>(sequence.start_pos + row)};
    }
  }
  for (int64_t row = real_rows_; row < padded; ++row) {
    positions[row] = kPaddingPosition;
    sequences[row] = 0;
    decode_rows[device_.num_decode_rows++] = static_cast<int32_t>(row);
  }
}

void StepBuffer::FillRope(const StepRows& rows) {
  inv_freq_ = nullptr;
  device_.half_dim = static_cast<int32_t>(rows.half_dim);
  if (rows.inv_freq.empty()) return;
  SLUICE_CHECK(rows.half_dim <= kMaxHalfDim) << rows.half_dim;
  const bool same = std::all_of(rows.inv_freq.begin(), rows.inv_freq.end(),
                                [&](const float* f) { return f == rows.inv_freq[0]; });
  // Rows of their own only with dynamic scaling, whose steps are not recorded.
  if (!same) recordable_ = false;
  inv_freq_stride_ = same ? 0 : rows.half_dim;
  const int64_t count = same ? 1 : device_.rows;
  float* out = Take<float>(count * rows.half_dim, &inv_freq_);
  for (int64_t row = 0; row < count; ++row) {
    const float* source = rows.inv_freq[std::min<int64_t>(row, real_rows_ - 1)];
    std::copy_n(source, rows.half_dim, out + row * rows.half_dim);
  }
}

void StepBuffer::Begin(const LaunchContext& context, const StepRows& rows) {
  real_rows_ = rows.num_rows;
  announced_ = rows.logit_rows;
  logit_rows_ = static_cast<int64_t>(announced_.size());
  SLUICE_CHECK(real_rows_ <= step_rows_) << "a step of " << real_rows_ << " rows exceeds Reserve";
  decode_only_ =
      !rows.sequences.empty() && std::all_of(rows.sequences.begin(), rows.sequences.end(),
                                             [](const SequenceRows& s) { return s.num_rows == 1; });
  const int64_t limit = std::min(step_rows_, max_sequences_);
  const int64_t padded = decode_only_ ? BucketOf(real_rows_, limit) : real_rows_;
  device_.rows = static_cast<int32_t>(padded);
  recordable_ = decode_only_ && padded <= *std::rbegin(kDecodeBuckets) &&
                (logit_rows_ == real_rows_ || logit_rows_ == 0);
  if (recordable_ && logit_rows_ > 0) logit_rows_ = padded;
  used_ = 0;
  FillRows(rows);
  FillSequences(rows);
  FillRope(rows);
  SLUICE_CUDA_CHECK(cudaMemcpyAsync(memory_.data(), host_.data(), static_cast<size_t>(used_),
                                    cudaMemcpyHostToDevice, context.stream));
}

}  // namespace sluice
