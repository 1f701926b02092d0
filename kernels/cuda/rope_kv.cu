// One thread an item: kVec elements of a head's first half and their partners of the second, or
// kVec elements that are only copied.
#include "kernels/cuda/rope_kv.h"

#include "kernels/cuda/attention_device.cuh"

namespace sluice {
namespace {

constexpr int kThreads = 128;

struct RopeParams {
  DeviceStep step;
  void* qkv;
  void* k;
  void* v;
  int64_t qkv_stride;
  int num_heads, num_kv_heads, head_dim, block_size;
  int half_dim;  // 0 without rope
};

template <typename T, int kVec>
struct alignas(sizeof(T) * kVec) Elements {
  T values[kVec];
};

// Turns the elements at `a` and `a + half_dim`, and copies them to `to` unless it is null.
template <typename T, int kVec>
__device__ __forceinline__ void TurnPair(T* a, const float* cos, const float* sin, int half_dim,
                                         T* to) {
  using Vector = Elements<T, kVec>;
  Vector first = *reinterpret_cast<const Vector*>(a);
  Vector second = *reinterpret_cast<const Vector*>(a + half_dim);
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    const float2 turned = Turn(Numeric<T>::ToFloat(first.values[i]),
                               Numeric<T>::ToFloat(second.values[i]), cos[i], sin[i]);
    first.values[i] = Numeric<T>::FromFloat(turned.x);
    second.values[i] = Numeric<T>::FromFloat(turned.y);
  }
  *reinterpret_cast<Vector*>(a) = first;
  *reinterpret_cast<Vector*>(a + half_dim) = second;
  if (to == nullptr) return;
  *reinterpret_cast<Vector*>(to) = first;
  *reinterpret_cast<Vector*>(to + half_dim) = second;
}

// Items of a row: pairs of q and k heads, what of k does not turn, v.
template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads) RopeKernel(const RopeParams p) {
  LetNextStart();
  WaitForPrevious();
  const int row = blockIdx.y;
  const int position = p.step.positions[row];
  if (position < 0) return;
  int item = blockIdx.x * kThreads + threadIdx.x;
  const int turned_heads = p.num_heads + p.num_kv_heads;
  const int pairs = p.half_dim / kVec;
  const int copied = (p.head_dim - 2 * p.half_dim) / kVec;  // Of a k head
  const int whole = p.head_dim / kVec;
  T* qkv = static_cast<T*>(p.qkv) + row * p.qkv_stride;
  const int32_t* table = p.step.block_tables + p.step.sequences[row] * p.step.block_table_stride;
  const auto slot_of = [&](void* cache, int head) {
    return static_cast<T*>(cache) +
           static_cast<size_t>(KvRow(table, position, head, p.num_kv_heads, p.block_size)) *
               p.head_dim;
  };
  using Vector = Elements<T, kVec>;
  if (item < turned_heads * pairs) {
    const int head = item / pairs;
    const int i = item % pairs * kVec;
    const int64_t angle = static_cast<int64_t>(row) * p.half_dim + i;
    T* to = head < p.num_heads ? nullptr : slot_of(p.k, head - p.num_heads) + i;
    TurnPair<T, kVec>(qkv + head * p.head_dim + i, p.step.cos + angle, p.step.sin + angle,
                      p.half_dim, to);
    return;
  }
  item -= turned_heads * pairs;
  if (item < p.num_kv_heads * copied) {
    const int head = item / copied;
    const int i = 2 * p.half_dim + item % copied * kVec;
    *reinterpret_cast<Vector*>(slot_of(p.k, head) + i) =
        *reinterpret_cast<const Vector*>(qkv + (p.num_heads + head) * p.head_dim + i);
    return;
  }
  item -= p.num_kv_heads * copied;
  if (item < p.num_kv_heads * whole) {
    const int head = item / whole;
    const int i = item % whole * kVec;
    *reinterpret_cast<Vector*>(slot_of(p.v, head) + i) =
        *reinterpret_cast<const Vector*>(qkv + (turned_heads + head) * p.head_dim + i);
  }
}

template <typename T, int kVec>
void LaunchRope(const LaunchContext& context, const RopeParams& params) {
  const int items = ((params.num_heads + params.num_kv_heads) * params.half_dim +
                     params.num_kv_heads * (2 * params.head_dim - 2 * params.half_dim)) /
                    kVec;
  const dim3 grid((items + kThreads - 1) / kThreads, params.step.rows);
  Launch(context, &RopeKernel<T, kVec>, grid, dim3(kThreads), 0, params);
}

template <typename T>
void LaunchRope(const LaunchContext& context, const RopeParams& params) {
  if (params.half_dim % 8 == 0) {
    LaunchRope<T, 8>(context, params);
  } else {
    LaunchRope<T, 1>(context, params);
  }
}

}  // namespace

void RopeAndWriteKv(const LaunchContext& context, const DeviceStep& step,
                    const AttentionShape& shape, void* qkv, int64_t qkv_stride, bool rope,
                    const KvLayer& kv) {
  SLUICE_CHECK(AttentionSupports(shape)) << shape.head_dim;
  if (step.rows == 0) return;
  RopeParams params = {};
  params.step = step;
  params.qkv = qkv;
  params.k = kv.k;
  params.v = kv.v;
  params.qkv_stride = qkv_stride;
  params.num_heads = shape.num_heads;
  params.num_kv_heads = shape.num_kv_heads;
  params.head_dim = shape.head_dim;
  params.block_size = shape.block_size;
  params.half_dim = rope ? step.half_dim : 0;
  SLUICE_CHECK(2 * params.half_dim <= shape.head_dim) << params.half_dim;
  if (shape.dtype == DType::kF16) {
    LaunchRope<__half>(context, params);
  } else {
    LaunchRope<__nv_bfloat16>(context, params);
  }
}

}  // namespace sluice
