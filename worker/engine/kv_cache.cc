#include "worker/engine/kv_cache.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/core/status_macros.h"

namespace sluice::worker {
namespace {

constexpr uint64_t kMaxBytes = uint64_t{1} << 62;

// Product of all factors, or kMaxBytes when it would pass that.
uint64_t CappedProduct(std::initializer_list<int64_t> factors) {
  uint64_t product = 1;
  for (const int64_t factor : factors) {
    if (product > kMaxBytes / static_cast<uint64_t>(factor)) return kMaxBytes;
    product *= static_cast<uint64_t>(factor);
  }
  return product;
}

}  // namespace

absl::StatusOr<std::unique_ptr<KvCache>> KvCache::Create(const KvShape& shape, Backend* backend) {
  const int64_t element = static_cast<int64_t>(SizeOf(backend->activation_dtype()));
  const uint64_t half = CappedProduct({shape.num_blocks, shape.block_size, shape.num_kv_heads,
                                       shape.head_dim, element});  // Keys of one layer
  const uint64_t total = CappedProduct({shape.num_layers, 2, static_cast<int64_t>(half)});
  if (total >= kMaxBytes) {
    return absl::ResourceExhaustedError(
        absl::StrCat("a KV cache of ", shape.num_blocks, " blocks of ", shape.block_size,
                     " tokens fits in no memory; lower num_blocks"));
  }
  auto cache = std::make_unique<KvCache>();
  for (int64_t i = 0; i < shape.num_layers; ++i) {
    SLUICE_ASSIGN_OR_RETURN(auto keys, backend->Allocate(static_cast<int64_t>(half)));
    SLUICE_ASSIGN_OR_RETURN(auto values, backend->Allocate(static_cast<int64_t>(half)));
    cache->layers_.push_back({.k = keys->data(),
                              .v = values->data(),
                              .num_blocks = shape.num_blocks,
                              .block_size = shape.block_size,
                              .num_kv_heads = shape.num_kv_heads,
                              .head_dim = shape.head_dim});
    cache->buffers_.push_back(std::move(keys));
    cache->buffers_.push_back(std::move(values));
  }
  cache->bytes_ = total;
  return cache;
}

}  // namespace sluice::worker
