// What the operations of kernels/backend.h take: weights and memory on a device, and plain
// descriptions of norms, linears, KV cache and the rows of a step.
#pragma once

#include <cstdint>

#include "absl/types/span.h"
#include "kernels/core/tensor.h"

namespace sluice {

// A weight in this backend's own packed layout. Immutable; made by Backend::Upload.
class PackedMatrix {
 public:
  virtual ~PackedMatrix() = default;
  int64_t n() const { return n_; }
  int64_t k() const { return k_; }
  int64_t bytes() const { return bytes_; }  // Device memory that it takes

 protected:
  PackedMatrix(int64_t n, int64_t k, int64_t bytes) : n_(n), k_(k), bytes_(bytes) {}

 private:
  int64_t n_, k_, bytes_;
};

// A bias or norm weight on the device, float32 [size]. Immutable; made by Backend::UploadVector.
class DeviceVector {
 public:
  virtual ~DeviceVector() = default;
  int64_t size() const { return size_; }
  const float* data() const { return data_; }  // Device memory

 protected:
  DeviceVector(const float* data, int64_t size) : data_(data), size_(size) {}
  const float* data_;

 private:
  int64_t size_;
};

// Device memory for activations and KV cache, zeroed.
class DeviceBuffer {
 public:
  virtual ~DeviceBuffer() = default;
  virtual void* data() = 0;
  virtual int64_t bytes() const = 0;
};

enum class NormKind : uint8_t { kNone, kRms, kLayer };

// kRms:   y = x / sqrt(mean(x^2) + eps) * weight
// kLayer: y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias   (weight and bias may be null)
struct Norm {
  NormKind kind = NormKind::kNone;
  const DeviceVector* weight = nullptr;
  const DeviceVector* bias = nullptr;
  float eps = 0.0f;
};

// y = x * W^T + bias; bias may be null.
struct Linear {
  const PackedMatrix* weight = nullptr;
  const DeviceVector* bias = nullptr;
};

enum class Activation : uint8_t { kNone, kRelu, kSilu, kGelu, kGeluTanh };

// Rotary embedding of a head's first 2 * half_dim elements; element i turns with i + half_dim
// ("rotate half"). cos, sin: [M, half_dim] float32, made once a step by Backend::RopeTable.
struct RopeRows {
  const float* cos = nullptr;
  const float* sin = nullptr;
  int64_t half_dim = 0;
};

// The KV cache of one layer: k and v are [num_blocks, num_kv_heads, block_size, head_dim] of
// activation_dtype(). How the block_size * head_dim elements of one block and KV head lie is the
// backend's own (the CPU turns k), so blocks are copied whole or not at all.
struct KvLayer {
  void* k = nullptr;
  void* v = nullptr;
  int64_t num_blocks = 0;
  int64_t block_size = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
};

// The rows [row_begin, row_begin + num_rows) of a step that belong to one sequence; row i has
// position start_pos + i and sees positions 0 .. start_pos + i. block_table holds at least
// ceil((start_pos + num_rows) / block_size) ids.
struct SequenceRows {
  int64_t row_begin = 0;
  int64_t num_rows = 0;
  int64_t start_pos = 0;
  const uint32_t* block_table = nullptr;
};

// Where the keys and values of a step's rows go in one layer, and how queries and keys are turned
// before.
struct KvWrite {
  const RopeRows* rope = nullptr;  // Null: not turned
  absl::Span<const SequenceRows> sequences;
  const KvLayer* kv = nullptr;
};

// What the operations of one step read from host memory. The spans given to operations are those of
// the step's BeginStep; what they point to stays in place until the next one.
struct StepRows {
  int64_t num_rows = 0;                      // M
  absl::Span<const uint32_t> token_ids;      // [M], or empty: hidden rows come from the host
  absl::Span<const uint32_t> table_rows;     // [M], or empty: rows of learned positions
  absl::Span<const SequenceRows> sequences;  // Rows in order, without gaps
  absl::Span<const float* const> inv_freq;   // [M], or empty: no rotary embedding
  int64_t half_dim = 0;                      // Floats behind each of inv_freq
  absl::Span<const int64_t> logit_rows;      // Rows that the head is computed for
};

// Parts of a step that a backend may record once and replay (Backend::Run).
enum class StepPart : uint8_t { kLayers, kHead };

}  // namespace sluice
