// What an item of flash decode (attention_decode.cu) ends with: the sum over the warps of a block
// and over the parts of a row. Included by .cu files only.
#pragma once

#include "kernels/cuda/attention_decode_rows.cuh"

namespace sluice {

// Floats of one part: see DecodeParams::partials.
__host__ __device__ constexpr int PartFloats(int head_dim) { return kHeads * (head_dim + 2); }

template <typename T>
__device__ __forceinline__ void StoreFour(T* out, float4 values) {
  *reinterpret_cast<uint2*>(out) = {Numeric<T>::FromFloats(values.x, values.y),
                                    Numeric<T>::FromFloats(values.z, values.w)};
}
__device__ __forceinline__ void AddScaled(float4* sum, float weight, float4 values) {
  sum->x += weight * values.x;
  sum->y += weight * values.y;
  sum->z += weight * values.z;
  sum->w += weight * values.w;
}

// weights[head][s]: what part s of a row counts for.
template <int kHeadDim>
__device__ __forceinline__ void WeighParts(const float* parts, int splits, int head,
                                           float* weights) {
  constexpr int kPart = PartFloats(kHeadDim);
  const float* first = parts + kHeads * kHeadDim + 2 * head;
  float max[kMaxSplits / 32], sum[kMaxSplits / 32];
  float highest = kLowest;
#pragma unroll
  for (int i = 0; i < kMaxSplits / 32; ++i) {
    const int s = threadIdx.x % 32 + 32 * i;
    float2 both = {kLowest, 0.0f};
    if (s < splits) both = __ldcg(reinterpret_cast<const float2*>(first + s * kPart));
    max[i] = both.x;
    sum[i] = both.y;
    highest = fmaxf(highest, both.x);
  }
#pragma unroll
  for (int i = 16; i > 0; i /= 2) {
    highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, i));
  }
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kMaxSplits / 32; ++i) {
    max[i] = Exp2(max[i] - highest);
    total += max[i] * sum[i];
  }
#pragma unroll
  for (int i = 16; i > 0; i /= 2) total += __shfl_xor_sync(0xffffffffu, total, i);
#pragma unroll
  for (int i = 0; i < kMaxSplits / 32; ++i) {
    weights[threadIdx.x % 32 + 32 * i] = max[i] / total;
  }
}

// Adds up the parts of a row; `parts` is the first.
template <typename T, int kHeadDim, int kThreads>
__device__ __forceinline__ void MergeParts(const float* parts, int splits, int heads,
                                           float (*weights)[kMaxSplits], T* out) {
  constexpr int kBatch = 8;  // Loads in flight
  constexpr int kPart = PartFloats(kHeadDim);
  const auto load = [&](int s, int e) {
    return __ldcg(reinterpret_cast<const float4*>(parts + s * kPart + 4 * e));
  };
  const int count = heads * kHeadDim / 4;
  float4 values[kBatch];
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
    if (i < splits && threadIdx.x < count) values[i] = load(i, threadIdx.x);
  }
  for (int head = threadIdx.x / 32; head < heads; head += kThreads / 32) {
    WeighParts<kHeadDim>(parts, splits, head, weights[head]);
  }
  __syncthreads();
  for (int e = threadIdx.x; e < count; e += kThreads) {
    const float* weight = weights[4 * e / kHeadDim];
    float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int first = 0; first < splits; first += kBatch) {
      if (e != threadIdx.x || first > 0) {
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          if (first + i < splits) values[i] = load(first + i, e);
        }
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (first + i < splits) AddScaled(&sum, weight[first + i], values[i]);
      }
    }
    StoreFour(out + 4 * e, sum);
  }
}

// Leaves the warp's result for CombineWarps, the output at `shared`.
template <typename T, int kHeadDim, int kWarps>
__device__ __forceinline__ void ShareResult(const WarpState<T, kHeadDim>& result, int heads,
                                            float* shared, BlockState<T, kHeadDim, kWarps>* state) {
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  float sum = result.sum;
  sum += __shfl_xor_sync(0xffffffffu, sum, 1);
  sum += __shfl_xor_sync(0xffffffffu, sum, 2);
  if (lane % 4 == 0) {
    state->max[warp][lane / 4] = result.max;
    state->sum[warp][lane / 4] = sum;
  }
  if (lane == 0) state->outputs[warp] = shared;
  if (shared == nullptr) return;
#pragma unroll
  for (int j = 0; j < kHeadDim / 16; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int head = 2 * (lane % 4) + i % 2;
      if (head < heads) {
        shared[head * (kHeadDim + 4) + 16 * j + lane / 4 + i / 2 * 8] = result.out[j][i];
      }
    }
  }
}

// Adds up the results of the warps: to `out` where the row is not cut, to `part` otherwise.
template <typename T, int kHeadDim, int kWarps>
__device__ __forceinline__ void CombineWarps(const BlockState<T, kHeadDim, kWarps>& state,
                                             int heads, T* out, float* part) {
  for (int e = threadIdx.x; e < heads * kHeadDim / 4; e += kWarps * 32) {
    const int head = 4 * e / kHeadDim;
    const int column = 4 * e % kHeadDim;
    float highest = state.max[0][head];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) highest = fmaxf(highest, state.max[w][head]);
    float4 value = {0.0f, 0.0f, 0.0f, 0.0f};
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      if (state.outputs[w] == nullptr) continue;
      const float weight = Exp2(state.max[w][head] - highest);
      const float* from = state.outputs[w] + head * (kHeadDim + 4) + column;
      AddScaled(&value, weight, *reinterpret_cast<const float4*>(from));
      total += weight * state.sum[w][head];
    }
    if (part == nullptr) {
      const float inverse = 1.0f / total;
      StoreFour(out + 4 * e,
                float4{value.x * inverse, value.y * inverse, value.z * inverse, value.w * inverse});
    } else {
      *reinterpret_cast<float4*>(part + 4 * e) = value;
      if (column == 0) {
        *reinterpret_cast<float2*>(part + kHeads * kHeadDim + 2 * head) = {highest, total};
      }
    }
  }
}

// Adds one. What the block wrote before its barrier can be read by whoever finds the sum.
__device__ __forceinline__ int AddInOrder(int32_t* counter) {
  int before;
  asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;"
               : "=r"(before)
               : "l"(counter)
               : "memory");
  return before;
}

// The end of an item, from the warps' results on. Every warp may go on filling its ring except for
// the stage that its result is in, until this returns.
template <typename T, int kHeadDim, int kWarps>
__device__ __forceinline__ void FinishItem(const DecodeParams& p, int item,
                                           const Work<kWarps>& work,
                                           BlockState<T, kHeadDim, kWarps>* state) {
  const int heads = min(kHeads, p.group - work.first_head);
  T* out = static_cast<T*>(p.out) + work.row * p.out_stride +
           static_cast<int64_t>(work.kv_head * p.group + work.first_head) * kHeadDim;
  const int unit = item / p.splits;
  float* parts = p.partials + static_cast<int64_t>(unit) * p.splits * PartFloats(kHeadDim);
  const bool cut = work.splits > 1;
  __syncthreads();
  CombineWarps(*state, heads, out, cut ? parts + work.split * PartFloats(kHeadDim) : nullptr);
  __syncthreads();
  if (!cut) return;
  if (threadIdx.x == 0) {
    state->last = AddInOrder(p.arrived + unit) == work.splits - 1;
    if (state->last) p.arrived[unit] = 0;
  }
  __syncthreads();
  if (state->last) {
    MergeParts<T, kHeadDim, kWarps * 32>(parts, work.splits, heads, state->weights, out);
  }
}

// Output of a padding row.
template <typename T, int kHeadDim, int kWarps>
__device__ __forceinline__ void WriteZeros(const DecodeParams& p, const Work<kWarps>& work) {
  const int heads = min(kHeads, p.group - work.first_head);
  T* out = static_cast<T*>(p.out) + work.row * p.out_stride +
           static_cast<int64_t>(work.kv_head * p.group + work.first_head) * kHeadDim;
  for (int e = threadIdx.x; e < heads * kHeadDim / 4; e += kWarps * 32) {
    StoreFour(out + 4 * e, float4{0.0f, 0.0f, 0.0f, 0.0f});
  }
}

}  // namespace sluice
