#include <algorithm>
#include <memory>
#include <numeric>

#include "gtest/gtest.h"
#include "kernels/backend.h"
#include "tests/support/backend_tensors.h"
#include "tests/support/random_tensor.h"
#include "tests/support/reference.h"
#include "tests/support/simd_targets.h"

namespace sluice {
namespace {

struct Shape {
  int64_t heads, kv_heads, head_dim, block_size;
};

// A cache with `length` positions of one sequence in shuffled blocks; what no one wrote is NaN.
class Cache {
 public:
  Cache(Backend& backend, const Shape& shape, int64_t length, uint64_t seed)
      : backend_(backend),
        shape_(shape),
        blocks_((length + shape.block_size - 1) / shape.block_size + 2),
        table_(blocks_),
        k_(backend, 1, Size()),
        v_(backend, 1, Size()) {
    std::iota(table_.begin(), table_.end(), 0u);
    std::shuffle(table_.begin(), table_.end(), std::mt19937_64(seed));
    RandomTensors random(seed);
    qkv_ = random.Normals(length * Cols());
    std::vector<float> rows = qkv_;
    const TestTensor tensor(backend, length, Cols(), rows);
    backend.RopeAndWriteKv(tensor.view(), nullptr, {{0, length, 0, table_.data()}}, Layer());
  }

  int64_t Cols() const { return (shape_.heads + 2 * shape_.kv_heads) * shape_.head_dim; }
  KvLayer Layer() const {
    return {k_.view().data,    v_.view().data,  blocks_,
            shape_.block_size, shape_.kv_heads, shape_.head_dim};
  }
  const float* Row(int64_t position) const { return &qkv_[position * Cols()]; }
  const uint32_t* table() const { return table_.data(); }

  // Attention of positions [begin, end) as one step.
  std::vector<float> Attend(Backend& backend, int64_t begin, int64_t end) const {
    const TestTensor tensor(backend, end - begin, Cols(),
                            {Row(begin), Row(begin) + (end - begin) * Cols()}, 3);
    const TestTensor out(backend, end - begin, shape_.heads * shape_.head_dim, /*gap=*/1);
    backend.PagedAttention(tensor.view(), {{0, end - begin, begin, table_.data()}}, Layer(), 0.25f,
                           out.view());
    return out.Read();
  }

  BoundedRow Expected(int64_t position) const {
    BoundedRow row;
    for (int64_t head = 0; head < shape_.heads; ++head) {
      const int64_t kv_head = head / (shape_.heads / shape_.kv_heads);
      std::vector<const float*> keys, values;
      for (int64_t p = 0; p <= position; ++p) {
        keys.push_back(Row(p) + (shape_.heads + kv_head) * shape_.head_dim);
        values.push_back(Row(p) + (shape_.heads + shape_.kv_heads + kv_head) * shape_.head_dim);
      }
      const BoundedRow one = ReferenceAttention(Row(position) + head * shape_.head_dim, keys,
                                                values, shape_.head_dim, 0.25f);
      row.insert(row.end(), one.begin(), one.end());
    }
    return row;
  }

 private:
  int64_t Size() const { return blocks_ * shape_.kv_heads * shape_.block_size * shape_.head_dim; }

  Backend& backend_;
  Shape shape_;
  int64_t blocks_;
  std::vector<uint32_t> table_;
  TestTensor k_, v_;
  std::vector<float> qkv_;
};

std::unique_ptr<Backend> NewBackend(int threads) {
  auto backend = *MakeCpuBackend(threads);
  SLUICE_CHECK(backend->Reserve({64, 64, 64, 32, 512}).ok());
  return backend;
}

const Shape kShapes[] = {{9, 3, 64, 16}, {4, 4, 16, 16},  {8, 2, 80, 32}, {6, 1, 20, 16},
                         {2, 2, 7, 48},  {3, 3, 128, 16}, {32, 2, 8, 16}, {4, 2, 64, 8},
                         {4, 2, 12, 20}, {2, 1, 33, 5}};

class AttentionTest : public SimdTargetTest {};

TEST_P(AttentionTest, MatchesTheReference) {
  const auto backend = NewBackend(2);
  uint64_t seed = 0;
  for (const Shape& shape : kShapes) {
    const int64_t length = 150;
    const Cache cache(*backend, shape, length, ++seed);
    const std::vector<float> out = cache.Attend(*backend, 0, length);
    const int64_t cols = shape.heads * shape.head_dim;
    for (const int64_t row : {0, 1, 14, 15, 16, 17, 77, 149}) {
      EXPECT_TRUE(WithinBounds({out.begin() + row * cols, out.begin() + (row + 1) * cols},
                               cache.Expected(row)))
          << "head_dim " << shape.head_dim << " block " << shape.block_size << " row " << row;
    }
  }
}

TEST_P(AttentionTest, ChunksAndThreadsChangeNoBit) {
  uint64_t seed = 50;
  for (const Shape& shape : kShapes) {
    std::vector<float> expected;
    ++seed;
    for (const int threads : {1, 2, 3}) {
      const auto backend = NewBackend(threads);
      const int64_t length = 70, cols = shape.heads * shape.head_dim;
      const Cache cache(*backend, shape, length, seed);
      const std::vector<float> together = cache.Attend(*backend, 0, length);
      if (expected.empty()) expected = together;
      ASSERT_TRUE(SameBits(together, expected))
          << threads << " threads, head_dim " << shape.head_dim;
      for (const auto& [begin, end] :
           {std::pair<int64_t, int64_t>{0, 1}, {69, 70}, {31, 33}, {5, 10}, {13, 31}}) {
        ASSERT_TRUE(SameBits(cache.Attend(*backend, begin, end),
                             {together.begin() + begin * cols, together.begin() + end * cols}))
            << begin << ".." << end << " head_dim " << shape.head_dim << " block "
            << shape.block_size;
      }
    }
  }
}

TEST_P(AttentionTest, BatchMatesChangeNoBit) {
  const auto backend = NewBackend(2);
  const Shape shape = {9, 3, 64, 16};
  const int64_t cols = shape.heads * shape.head_dim;
  const Cache cache(*backend, shape, 100, 99);
  // The same cache seen as three sequences of one step: a chunk and two single rows of different
  // length.
  std::vector<float> rows;
  for (const int64_t position : {20, 21, 22, 99, 3}) {
    rows.insert(rows.end(), cache.Row(position), cache.Row(position) + cache.Cols());
  }
  const TestTensor qkv(*backend, 5, cache.Cols(), rows), out(*backend, 5, cols);
  const SequenceRows sequences[] = {
      {0, 3, 20, cache.table()}, {3, 1, 99, cache.table()}, {4, 1, 3, cache.table()}};
  backend->PagedAttention(qkv.view(), sequences, cache.Layer(), 0.25f, out.view());
  std::vector<float> expected;
  for (const int64_t position : {20, 21, 22, 99, 3}) {
    const std::vector<float> one = cache.Attend(*backend, position, position + 1);
    expected.insert(expected.end(), one.begin(), one.end());
  }
  EXPECT_TRUE(SameBits(out.Read(), expected));
}

INSTANTIATE_TEST_SUITE_P(Targets, AttentionTest, testing::ValuesIn(SimdTargets()), SimdTargetLabel);

}  // namespace
}  // namespace sluice
