#include <cmath>

#include "gtest/gtest.h"
#include "kernels/backend.h"
#include "kernels/cpu/ops.h"
#include "tests/support/backend_tensors.h"
#include "tests/support/random_tensor.h"

namespace sluice {
namespace {

constexpr int64_t kHeads = 4, kKvHeads = 2, kHeadDim = 12, kBlockSize = 4, kBlocks = 8;
constexpr int64_t kCols = (kHeads + 2 * kKvHeads) * kHeadDim;

TEST(RopeTableTest, IsCosineAndSineOfTheRoundedAngle) {
  const auto backend = *MakeCpuBackend(1);
  const std::vector<float> slow = {1.0f, 0.1f, 0.003f}, fast = {2.0f, 0.7f, 0.5f};
  const std::vector<const float*> inv_freq = {slow.data(), fast.data(), slow.data()};
  const RopeRows rows = backend->RopeTable({0, 5, 70000}, inv_freq, 3, 1.25f);
  ASSERT_EQ(rows.half_dim, 3);
  for (int m = 0; m < 3; ++m) {
    const float position = m == 0 ? 0.0f : m == 1 ? 5.0f : 70000.0f;
    for (int i = 0; i < 3; ++i) {
      const double angle = position * inv_freq[m][i];
      EXPECT_NEAR(rows.cos[m * 3 + i], 1.25 * std::cos(angle), 1.25 * 2 * kUnit);
      EXPECT_NEAR(rows.sin[m * 3 + i], 1.25 * std::sin(angle), 1.25 * 2 * kUnit);
    }
  }
}

class RopeAndWriteKvTest : public testing::TestWithParam<int> {
 protected:
  // Two sequences: rows 0..2 at positions 3..5 of blocks 6 and 1, row 3 at position 0 of block 2.
  const std::vector<uint32_t> table_a_ = {6, 1}, table_b_ = {2};
  const std::vector<SequenceRows> sequences_ = {{0, 3, 3, table_a_.data()},
                                                {3, 1, 0, table_b_.data()}};
};

TEST_P(RopeAndWriteKvTest, TurnsHalvesAndFillsTheSlots) {
  const int64_t half_dim = GetParam();  // 6: the whole head; 4: a part of it; 0: no rope
  const auto backend = *MakeCpuBackend(2);
  RandomTensors random(3);
  const std::vector<float> qkv = random.Normals(4 * kCols);
  const std::vector<float> cos = random.Normals(4 * half_dim), sin = random.Normals(4 * half_dim);
  const TestTensor tensor(*backend, 4, kCols, qkv);
  const TestTensor k(*backend, 1, kBlocks * kKvHeads * kBlockSize * kHeadDim);
  const TestTensor v(*backend, 1, kBlocks * kKvHeads * kBlockSize * kHeadDim);
  const KvLayer kv = {k.view().data, v.view().data, kBlocks, kBlockSize, kKvHeads, kHeadDim};
  const RopeRows rope = {cos.data(), sin.data(), half_dim};
  backend->RopeAndWriteKv(tensor.view(), half_dim == 0 ? nullptr : &rope, sequences_, kv);

  std::vector<float> turned = qkv;
  for (int64_t m = 0; m < 4; ++m) {
    for (int64_t head = 0; head < kHeads + kKvHeads; ++head) {
      float* x = &turned[m * kCols + head * kHeadDim];
      for (int64_t i = 0; i < half_dim; ++i) {
        const float a = x[i], b = x[i + half_dim];
        x[i] = a * cos[m * half_dim + i] - b * sin[m * half_dim + i];
        x[i + half_dim] = b * cos[m * half_dim + i] + a * sin[m * half_dim + i];
      }
    }
  }
  EXPECT_TRUE(SameBits(tensor.Read(), turned));
  const uint32_t block[4] = {6, 1, 1, 2};
  const int64_t slot[4] = {3, 0, 1, 0};
  for (int64_t m = 0; m < 4; ++m) {
    for (int64_t head = 0; head < kKvHeads; ++head) {
      const KvBlock at = KvBlockAt(kv, block[m], head);
      const float* row = &turned[m * kCols + (kHeads + head) * kHeadDim];
      for (int64_t i = 0; i < kHeadDim; ++i) {
        EXPECT_EQ(at.k[i * kBlockSize + slot[m]], row[i]);
        EXPECT_EQ(at.v[slot[m] * kHeadDim + i], row[kKvHeads * kHeadDim + i]);
      }
    }
  }
  int64_t written = 0;
  for (const float value : k.Read()) written += std::isnan(value) ? 0 : 1;
  EXPECT_EQ(written, 4 * kKvHeads * kHeadDim) << "other slots must stay as they are";
}

INSTANTIATE_TEST_SUITE_P(HalfDims, RopeAndWriteKvTest, testing::Values(6, 4, 0));

}  // namespace
}  // namespace sluice
