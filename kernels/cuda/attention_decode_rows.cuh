// What an item of flash decode (attention_decode.cu) begins with: its queries and, for the last
// part of a row, the newest key and value, turned on the way. Included by .cu files only.
#pragma once

#include "kernels/cuda/attention_decode_tiles.cuh"

namespace sluice {

template <typename T>
struct alignas(8) Four {
  T values[4];
};

// Elements d to d + 3 of a head whose elements are at `head`, turned if they belong to the first
// 2 * half_dim; cos and sin are the row's.
template <typename T>
__device__ __forceinline__ Four<T> LoadTurned(const T* head, int d, const float* cos,
                                              const float* sin, int half_dim) {
  if (half_dim == 0) return *reinterpret_cast<const Four<T>*>(head + d);
  Four<T> out;
  if (half_dim % 4 == 0) {
    if (d >= 2 * half_dim) return *reinterpret_cast<const Four<T>*>(head + d);
    const int first = d < half_dim ? d : d - half_dim;
    const Four<T> a = *reinterpret_cast<const Four<T>*>(head + first);
    const Four<T> b = *reinterpret_cast<const Four<T>*>(head + first + half_dim);
    const float4 c = *reinterpret_cast<const float4*>(cos + first);
    const float4 s = *reinterpret_cast<const float4*>(sin + first);
    const float cosines[4] = {c.x, c.y, c.z, c.w};
    const float sines[4] = {s.x, s.y, s.z, s.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 turned = Turn(Numeric<T>::ToFloat(a.values[i]), Numeric<T>::ToFloat(b.values[i]),
                                 cosines[i], sines[i]);
      out.values[i] = Numeric<T>::FromFloat(d < half_dim ? turned.x : turned.y);
    }
    return out;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int element = d + i;
    const int first = element % half_dim;
    out.values[i] = head[element];
    if (element >= 2 * half_dim) continue;
    const float2 turned = Turn(Numeric<T>::ToFloat(head[first]),
                               Numeric<T>::ToFloat(head[first + half_dim]), cos[first], sin[first]);
    out.values[i] = Numeric<T>::FromFloat(element < half_dim ? turned.x : turned.y);
  }
  return out;
}

// What the warps of a block share.
template <typename T, int kHeadDim, int kWarps>
struct BlockState {
  // The item's q, the newest k and the newest v. 16 bytes behind every row for the banks.
  alignas(16) T rows[kHeads + 2][kHeadDim + 8];
  float max[kWarps][kHeads];
  float sum[kWarps][kHeads];
  const float* outputs[kWarps];  // [kHeads, head_dim + 4], null from a warp without tiles
  float weights[kHeads][kMaxSplits];
  int next;  // Item after the next
  bool last;
};

// Brings q, and for the last part the newest k and v, to state->rows; writes the latter to the
// cache.
template <typename T, int kHeadDim, int kWarps>
__device__ __forceinline__ void LoadRows(const DecodeParams& p, const Work<kWarps>& work,
                                         BlockState<T, kHeadDim, kWarps>* state) {
  constexpr int kFours = kHeadDim / 4;
  const int heads = min(kHeads, p.group - work.first_head);
  const T* qkv = static_cast<const T*>(p.qkv) + work.row * p.qkv_stride;
  const int half_dim = p.new_keys == NewKeys::kTurnAndWrite ? p.step.half_dim : 0;
  const float* cos = p.step.cos + static_cast<int64_t>(work.row) * half_dim;
  const float* sin = p.step.sin + static_cast<int64_t>(work.row) * half_dim;
  const bool newest = work.split == work.splits - 1;
  const bool write = newest && p.new_keys != NewKeys::kReady && work.first_head == 0;
  for (int i = threadIdx.x; i < (heads + (newest ? 2 : 0)) * kFours; i += kWarps * 32) {
    const int which = i / kFours;
    const int d = i % kFours * 4;
    int head = work.kv_head * p.group + work.first_head + which;
    if (which >= heads) {
      head = p.num_kv_heads * (p.group + which - heads) + work.kv_head;
    }
    const Four<T> four = LoadTurned(qkv + static_cast<int64_t>(head) * kHeadDim, d, cos, sin,
                                    which <= heads ? half_dim : 0);
    const int to = which < heads ? which : kHeads + which - heads;
    *reinterpret_cast<Four<T>*>(&state->rows[to][d]) = four;
    if (which < heads || !write) continue;
    T* cache = static_cast<T*>(which == heads ? p.k : p.v);
    const size_t row = KvRow(work.table, work.position, work.kv_head, p.num_kv_heads, p.block_size);
    *reinterpret_cast<Four<T>*>(cache + row * kHeadDim + d) = four;
  }
}

// Lane l: elements 16 j + 2 (l % 4) + {0, 1} and those + 8 of head l / 4.
template <typename T, int kHeadDim>
__device__ __forceinline__ void LoadQuery(const T (*q)[kHeadDim + 8],
                                          uint32_t (&out)[kHeadDim / 16][2]) {
  const auto* pairs = reinterpret_cast<const uint32_t*>(q[threadIdx.x % 32 / 4]) + threadIdx.x % 4;
#pragma unroll
  for (int j = 0; j < kHeadDim / 16; ++j) {
    out[j][0] = pairs[8 * j];
    out[j][1] = pairs[8 * j + 4];
  }
}

}  // namespace sluice
