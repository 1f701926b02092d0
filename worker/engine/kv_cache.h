// KvCache: the pool of KV blocks of a stage's layers in device memory. A block id means the same
// slots in every layer; which sequence a block belongs to is the sequence table's business.
//
// A layer has a buffer of keys and one of values, each [num_blocks, num_kv_heads, block_size *
// head_dim]; how a block and head lies inside is the backend's own.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/backend.h"

namespace sluice::worker {

struct KvShape {
  int64_t num_layers = 0;
  int64_t num_blocks = 0;
  int64_t block_size = 0;  // Tokens
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
};

class KvCache {
 public:
  // RESOURCE_EXHAUSTED: the device has not that much memory, or the size passes 2^62 bytes.
  // REQUIRES: positive numbers below 2^31 in `shape`.
  static absl::StatusOr<std::unique_ptr<KvCache>> Create(const KvShape& shape, Backend* backend);

  const KvLayer& layer(size_t index) const { return layers_[index]; }
  uint64_t bytes() const { return bytes_; }  // Of all layers

 private:
  std::vector<std::unique_ptr<DeviceBuffer>> buffers_;
  std::vector<KvLayer> layers_;
  uint64_t bytes_ = 0;
};

}  // namespace sluice::worker
