// Rotary embedding and the write of new keys and values to the paged cache, in one kernel.
#pragma once

#include <cstdint>

#include "kernels/cuda/attention.h"

namespace sluice {

// Turns q and k of qkv in place by step.cos and step.sin (when `rope`), and writes k and v of every
// row to slot position % block_size of its block; the cache gets the same bits as qkv. Rows of
// padding are left alone. Element i of a head turns with i + half_dim; elements from 2 * half_dim
// on stay.
void RopeAndWriteKv(const LaunchContext& context, const DeviceStep& step,
                    const AttentionShape& shape, void* qkv, int64_t qkv_stride, bool rope,
                    const KvLayer& kv);

}  // namespace sluice
