// Attention over the paged KV cache on the device: one kernel for the rows that decode (split over
// the keys), one for the rows of prompts. Both accumulate in float32, with mma.sync on sm_80 and
// newer; prompts on sm_90 with wgmma where head_dim is 64 or 128 and block_size a multiple of 16.
//
// KV layout: k and v are [num_blocks, num_kv_heads, block_size, head_dim] of the activation dtype,
// elements of a head next to each other. qkv rows are num_heads, num_kv_heads and num_kv_heads
// heads of q, k and v; out rows num_heads heads. Strides are in elements and multiples of 8; all
// pointers are 16-byte aligned device memory.
//
// A row's result depends on its own q, keys and position, and on num_decode_rows (into how many
// parts its keys are cut), never on other rows' values or lengths. Reductions have a fixed order.
//
// Limits: dtype kF16 or kBF16, head_dim of 32, 64, 80, 96, 128 or 256, num_heads a multiple of
// num_kv_heads; otherwise CHECK failure. The kernels launch on the context's stream and allocate
// nothing.
#pragma once

#include <cstdint>

#include "kernels/backend.h"
#include "kernels/core/dtype.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/step_inputs.h"

namespace sluice {

struct AttentionShape {
  int num_heads = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  int block_size = 0;  // Keys of a block; multiples of 16 are fast
  float scale = 1.0f;  // Of q * k
  DType dtype = DType::kF16;
};

// True for what the kernels below can do.
bool AttentionSupports(const AttentionShape& shape);

// Bytes of scratch for DecodeAttention, whatever the number of rows: with many of them the keys of
// a row are not cut. It must be zero before the first use; every use leaves its counters zero, so
// one scratch serves all layers of a stream.
int64_t DecodeScratchBytes(const AttentionShape& shape, int num_sms);

// Where DecodeAttention finds the new key and value of a row.
enum class NewKeys : uint8_t {
  kReady,         // RopeAndWriteKv has been run for the row
  kWrite,         // In qkv only: it writes them to the cache itself
  kTurnAndWrite,  // The same, and it turns q and k by step.cos and step.sin (qkv stays as it is)
};

// out of rows decode_rows[0 .. num_decode_rows): softmax(scale * q * K^T) * V over keys 0 ..
// position; 0 for padding. The grid depends on num_decode_rows, shape and num_sms alone. All three
// NewKeys give the same bits.
//
// It reads the arrays of `step` and the keys of earlier positions before it waits for the kernel in
// front of it. So whatever writes those must be complete when the step's second kernel starts: the
// first kernel of a step is launched without programmatic dependence on what came before.
void DecodeAttention(const LaunchContext& context, const DeviceStep& step,
                     const AttentionShape& shape, const void* qkv, int64_t qkv_stride,
                     const KvLayer& kv, void* out, int64_t out_stride, void* scratch,
                     NewKeys new_keys = NewKeys::kReady);

// The same for the rows of step.prefill_tiles, each over keys 0 .. its own position.
void PrefillAttention(const LaunchContext& context, const DeviceStep& step,
                      const AttentionShape& shape, const void* qkv, int64_t qkv_stride,
                      const KvLayer& kv, void* out, int64_t out_stride);

}  // namespace sluice
