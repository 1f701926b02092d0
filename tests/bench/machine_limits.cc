#include "tests/bench/machine_limits.h"

#include <atomic>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "tests/bench/machine_limits.cc"
#include "hwy/foreach_target.h"  // Must come before highway.h
// clang-format off
#include "hwy/highway.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace sluice {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::ScalableTag<float>;

// `count` is a multiple of 64.
float ReadPiece(const float* data, int64_t count) {
  const DF df;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(df));
  auto a = hn::Zero(df), b = a, c = a, d = a;
  for (int64_t i = 0; i < count; i += 4 * lanes) {
    a = hn::Add(a, hn::LoadU(df, data + i));
    b = hn::Add(b, hn::LoadU(df, data + i + lanes));
    c = hn::Add(c, hn::LoadU(df, data + i + 2 * lanes));
    d = hn::Add(d, hn::LoadU(df, data + i + 3 * lanes));
  }
  return hn::GetLane(hn::SumOfLanes(df, hn::Add(hn::Add(a, b), hn::Add(c, d))));
}

// 12 chains: more than the latency of an add times the adds a cycle on any processor so far.
int64_t MultiplyAddPiece(int64_t rounds, float* sink) {
  const DF df;
  constexpr int kChains = 12;
  hn::Vec<DF> chains[kChains];
  for (int i = 0; i < kChains; ++i) chains[i] = hn::Set(df, static_cast<float>(i));
  const auto factor = hn::Set(df, 0.999f), term = hn::Set(df, 0.001f);
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) chains[i] = hn::MulAdd(chains[i], factor, term);
  }
  for (int i = 1; i < kChains; ++i) chains[0] = hn::Add(chains[0], chains[i]);
  *sink = hn::GetLane(hn::SumOfLanes(df, chains[0]));
  return rounds * kChains * 2 * static_cast<int64_t>(hn::Lanes(df));
}

}  // namespace HWY_NAMESPACE
}  // namespace sluice
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace sluice {

HWY_EXPORT(ReadPiece);
HWY_EXPORT(MultiplyAddPiece);

float ReadAll(const float* data, int64_t count, ThreadPool& pool) {
  constexpr int64_t kPiece = 65536;
  std::atomic<float> sum = 0;
  pool.ParallelFor(count / kPiece, [&](int64_t i, int) {
    sum.store(HWY_DYNAMIC_DISPATCH(ReadPiece)(data + i * kPiece, kPiece),
              std::memory_order_relaxed);
  });
  return sum;
}

int64_t MultiplyAddAll(int64_t rounds, ThreadPool& pool, float* sink) {
  std::atomic<int64_t> operations = 0;
  constexpr int64_t kPieces = 64;
  pool.ParallelFor(kPieces, [&](int64_t, int) {
    float result;
    operations += HWY_DYNAMIC_DISPATCH(MultiplyAddPiece)(rounds / kPieces, &result);
    if (result == 1234.5f) *sink = result;  // Never; keeps the chains alive
  });
  return operations;
}

}  // namespace sluice
#endif  // HWY_ONCE
