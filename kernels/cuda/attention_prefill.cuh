// What the two prefill kernels share: mma.sync (attention_prefill.cu) and wgmma
// (attention_prefill_sm90.cu) leave scores and outputs in the same registers. Included by .cu files
// only.
#pragma once

#include "kernels/cuda/attention_device.cuh"

namespace sluice {

struct PrefillParams {
  DeviceStep step;
  const void* qkv;
  const void* k;
  const void* v;
  void* out;
  int64_t qkv_stride, out_stride;
  int num_kv_heads, block_size, group;
  float scale;  // Times log2(e)
};

// Runs the wgmma kernel, or returns false where the card, the shape or the number of blocks is not
// for it.
bool LaunchPrefillSm90(const LaunchContext& context, const AttentionShape& shape,
                       const PrefillParams& params);

// Running softmax of one warp and head: rows lane / 4 and lane / 4 + 8.
template <typename T, int kHeadDim>
struct RowState {
  float max[2] = {kLowest, kLowest};
  float sum[2] = {0.0f, 0.0f};  // The lane's own share
  float out[kHeadDim / 8][4];

  __device__ RowState() {
#pragma unroll
    for (auto& tile : out) tile[0] = tile[1] = tile[2] = tile[3] = 0.0f;
  }

  // Turns the scores of a tile of keys into weights, relative to the new maximum.
  template <int kTiles>
  __device__ __forceinline__ void Update(float (&s)[kTiles][4], float scale) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float highest = s[0][2 * r];
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        highest = fmaxf(highest, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
      }
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 1));
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2));
      highest = fmaxf(highest * scale, max[r]);
      if (__any_sync(0xffffffffu, highest > max[r])) {
        const float factor = Exp2(max[r] - highest);
        max[r] = highest;
        sum[r] *= factor;
#pragma unroll
        for (auto& tile : out) {
          tile[2 * r] *= factor;
          tile[2 * r + 1] *= factor;
        }
      }
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        s[n][2 * r] = Exp2(fmaf(s[n][2 * r], scale, -max[r]));
        s[n][2 * r + 1] = Exp2(fmaf(s[n][2 * r + 1], scale, -max[r]));
        sum[r] += s[n][2 * r] + s[n][2 * r + 1];
      }
    }
  }
};

// Scores of keys behind the row's own position become lowest. `above`: keys minus position of the
// lane's first element.
template <int kTiles>
__device__ __forceinline__ void MaskCausal(float (&s)[kTiles][4], int above) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (above + 8 * n + i % 2 - i / 2 * 8 > 0) s[n][i] = kLowest;
    }
  }
}

// Writes the 16 rows of a warp and head, of which those below `num_rows` exist; `out` is the first
// row's head.
template <typename T, int kHeadDim>
__device__ __forceinline__ void StoreRows(const RowState<T, kHeadDim>& state, int num_rows, T* out,
                                          int64_t stride) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = state.sum[r];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    const float inverse = 1.0f / sum;
    const int row = lane / 4 + 8 * r;
    if (row >= num_rows) continue;
    auto* pairs = reinterpret_cast<uint32_t*>(out + row * stride + 2 * (lane % 4));
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      pairs[4 * n] =
          Numeric<T>::FromFloats(state.out[n][2 * r] * inverse, state.out[n][2 * r + 1] * inverse);
    }
  }
}

}  // namespace sluice
