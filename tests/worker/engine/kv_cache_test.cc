#include "worker/engine/kv_cache.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>

namespace sluice::worker {
namespace {

TEST(KvCacheTest, LayersAndPlanesDoNotOverlap) {
  auto backend = MakeCpuBackend(1);
  ASSERT_TRUE(backend.ok()) << backend.status();
  const KvShape shape{
      .num_layers = 3, .num_blocks = 5, .block_size = 4, .num_kv_heads = 2, .head_dim = 6};
  const auto cache = KvCache::Create(shape, backend->get());
  ASSERT_TRUE(cache.ok()) << cache.status();
  const size_t plane = 5 * 4 * 2 * 6;  // Elements
  const size_t element = SizeOf((*backend)->activation_dtype());
  EXPECT_EQ((*cache)->bytes(), 3 * 2 * plane * element);
  for (size_t i = 0; i < 3; ++i) {
    const KvLayer& layer = (*cache)->layer(i);
    EXPECT_EQ(layer.num_blocks, 5);
    EXPECT_EQ(layer.block_size, 4);
    EXPECT_EQ(layer.num_kv_heads, 2);
    EXPECT_EQ(layer.head_dim, 6);
    for (void* half : {layer.k, layer.v}) {
      const auto* bytes = static_cast<const uint8_t*>(half);
      // Zeroed, and nothing that was written to another plane shows here.
      EXPECT_TRUE(std::all_of(bytes, bytes + plane * element, [](uint8_t b) { return b == 0; }));
      std::memset(half, 0xff, plane * element);
    }
  }
}

TEST(KvCacheTest, RefusesWhatNoMemoryHolds) {
  auto backend = MakeCpuBackend(1);
  ASSERT_TRUE(backend.ok()) << backend.status();
  const KvShape shape{.num_layers = 1000,
                      .num_blocks = 1 << 30,
                      .block_size = 1 << 12,
                      .num_kv_heads = 1 << 14,
                      .head_dim = 1 << 14};
  const auto cache = KvCache::Create(shape, backend->get());
  EXPECT_EQ(cache.status().code(), absl::StatusCode::kResourceExhausted) << cache.status();
}

}  // namespace
}  // namespace sluice::worker
