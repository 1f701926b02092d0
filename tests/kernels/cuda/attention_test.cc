// RopeAndWriteKv, DecodeAttention and PrefillAttention against double precision on the host: head
// sizes x query groups x dtypes, ragged lengths, block sizes, padding rows. Every slot of the cache
// that no key lies in is NaN, and so is the output before a run.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/core/dtype.h"
#include "kernels/cuda/attention.h"
#include "kernels/cuda/rope_kv.h"

namespace sluice {
namespace {

constexpr uint16_t kPoison = 0x7fff;  // NaN in both dtypes

// Device memory for the length of a test.
class DeviceMemory {
 public:
  explicit DeviceMemory(size_t bytes) : bytes_(std::max<size_t>(bytes, 16)) {
    EXPECT_EQ(cudaMalloc(&data_, bytes_), cudaSuccess);
    EXPECT_EQ(cudaMemset(data_, 0, bytes_), cudaSuccess);
  }
  template <typename T>
  explicit DeviceMemory(const std::vector<T>& values) : DeviceMemory(values.size() * sizeof(T)) {
    Set(values);
  }
  ~DeviceMemory() { cudaFree(data_); }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  template <typename T>
  void Set(const std::vector<T>& values) {
    const size_t bytes = values.size() * sizeof(T);
    EXPECT_EQ(cudaMemcpy(data_, values.data(), bytes, cudaMemcpyHostToDevice), cudaSuccess);
  }
  template <typename T>
  std::vector<T> Get(size_t count) const {
    std::vector<T> values(count);
    EXPECT_EQ(cudaMemcpy(values.data(), data_, count * sizeof(T), cudaMemcpyDeviceToHost),
              cudaSuccess);
    return values;
  }
  void* data() const { return data_; }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  size_t bytes_;
  void* data_ = nullptr;
};

float Decode(DType dtype, uint16_t bits) {
  return dtype == DType::kF16 ? HalfToFloat(bits) : BFloat16ToFloat(bits);
}
uint16_t Encode(DType dtype, float value) {
  return dtype == DType::kF16 ? FloatToHalf(value) : FloatToBFloat16(value);
}
double UnitRoundoff(DType dtype) { return dtype == DType::kF16 ? 0x1p-11 : 0x1p-8; }

// Rows of one sequence in the step: positions [start, start + rows). A start of -1 is padding.
struct Rows {
  int start = 0;
  int count = 1;
};

// A step with everything the kernels read, on host and device.
struct Step {
  AttentionShape shape;
  int half_dim = 0;
  std::vector<Rows> sequences;
  int num_blocks = 0;
  std::vector<int32_t> positions, row_sequences, tables, decode_rows;
  std::vector<PrefillTile> tiles;
  std::vector<float> cos, sin;
  std::vector<uint16_t> qkv, k, v;

  int rows() const { return static_cast<int>(positions.size()); }
  int64_t qkv_columns() const {
    return static_cast<int64_t>(shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim;
  }
  int64_t out_columns() const { return static_cast<int64_t>(shape.num_heads) * shape.head_dim; }
  int64_t table_stride() const {
    int64_t most = 0;
    for (const Rows& r : sequences) most = std::max<int64_t>(most, r.start + r.count);
    return (most + shape.block_size - 1) / shape.block_size + 1;
  }
  int64_t Slot(int sequence, int position, int kv_head) const {
    const int64_t block = tables[sequence * table_stride() + position / shape.block_size];
    return ((block * shape.num_kv_heads + kv_head) * shape.block_size +
            position % shape.block_size) *
           shape.head_dim;
  }
};

// A random value of about unit size, rounded to the dtype.
uint16_t RandomBits(DType dtype, std::mt19937* random) {
  const auto integer = static_cast<int32_t>((*random)());
  return Encode(dtype, static_cast<float>(integer) * (1.7f / 2147483648.0f));
}

void AddRows(Step* step, int sequence) {
  const Rows& rows = step->sequences[sequence];
  const int begin = step->rows();
  for (int i = 0; i < rows.count; ++i) {
    step->positions.push_back(rows.start < 0 ? kPaddingPosition : rows.start + i);
    step->row_sequences.push_back(rows.start < 0 ? 0 : sequence);
  }
  if (rows.count == 1) {
    step->decode_rows.push_back(begin);
    return;
  }
  for (int i = 0; i < rows.count; i += kPrefillTileRows) {
    step->tiles.push_back(
        {sequence, begin + i, std::min(kPrefillTileRows, rows.count - i), rows.start + i});
  }
}

Step MakeStep(const AttentionShape& shape, std::vector<Rows> sequences, int half_dim, int seed) {
  std::mt19937 random(seed);
  Step step;
  step.shape = shape;
  step.half_dim = half_dim;
  step.sequences = std::move(sequences);
  const auto num_sequences = static_cast<int>(step.sequences.size());
  const int64_t stride = step.table_stride();
  step.num_blocks = static_cast<int>(num_sequences * stride) + 3;
  std::vector<int32_t> blocks(step.num_blocks);
  std::iota(blocks.begin(), blocks.end(), 0);
  std::shuffle(blocks.begin(), blocks.end(), random);
  step.tables.assign(blocks.begin(), blocks.begin() + num_sequences * stride);
  for (int s = 0; s < num_sequences; ++s) AddRows(&step, s);
  const int64_t cache = static_cast<int64_t>(step.num_blocks) * shape.num_kv_heads *
                        shape.block_size * shape.head_dim;
  step.k.assign(cache, kPoison);
  step.v.assign(cache, kPoison);
  for (int s = 0; s < num_sequences; ++s) {
    for (int position = 0; position < step.sequences[s].start; ++position) {
      for (int head = 0; head < shape.num_kv_heads; ++head) {
        const int64_t slot = step.Slot(s, position, head);
        for (int i = 0; i < shape.head_dim; ++i) {
          step.k[slot + i] = RandomBits(shape.dtype, &random);
          step.v[slot + i] = RandomBits(shape.dtype, &random);
        }
      }
    }
  }
  step.qkv.resize(step.rows() * step.qkv_columns());
  for (uint16_t& bits : step.qkv) bits = RandomBits(shape.dtype, &random);
  std::uniform_real_distribution<float> angle(0.0f, 6.28f);
  for (int i = 0; i < step.rows() * half_dim; ++i) {
    const float a = angle(random);
    step.cos.push_back(std::cos(a));
    step.sin.push_back(std::sin(a));
  }
  return step;
}

LaunchContext MakeContext() {
  LaunchContext context;
  cudaDeviceProp properties;
  EXPECT_EQ(cudaGetDeviceProperties(&properties, 0), cudaSuccess);
  context.num_sms = properties.multiProcessorCount;
  context.max_shared_bytes = static_cast<int>(properties.sharedMemPerBlockOptin);
  context.dependent_launch = properties.major >= 9;
  return context;
}

// The step on the device, and runs of the kernels.
class DeviceRun {
 public:
  explicit DeviceRun(const Step& step, int max_shared_bytes = 0)
      : host_(step),
        context_(MakeContext()),
        positions_(step.positions),
        sequences_(step.row_sequences),
        tables_(step.tables),
        decode_rows_(step.decode_rows),
        tiles_(step.tiles),
        cos_(step.cos),
        sin_(step.sin),
        qkv_(step.qkv),
        k_(step.k),
        v_(step.v),
        out_(step.rows() * step.out_columns() * 2),
        scratch_(DecodeScratchBytes(step.shape, context_.num_sms)) {
    if (max_shared_bytes > 0) context_.max_shared_bytes = max_shared_bytes;
    step_.rows = step.rows();
    step_.positions = positions_.as<int32_t>();
    step_.sequences = sequences_.as<int32_t>();
    step_.block_tables = tables_.as<int32_t>();
    step_.block_table_stride = step.table_stride();
    step_.num_decode_rows = static_cast<int32_t>(step.decode_rows.size());
    step_.decode_rows = decode_rows_.as<int32_t>();
    step_.num_prefill_tiles = static_cast<int32_t>(step.tiles.size());
    step_.prefill_tiles = tiles_.as<PrefillTile>();
    step_.cos = cos_.as<float>();
    step_.sin = sin_.as<float>();
    step_.half_dim = step.half_dim;
    kv_ = {k_.data(),
           v_.data(),
           step.num_blocks,
           step.shape.block_size,
           step.shape.num_kv_heads,
           step.shape.head_dim};
  }

  void Rope() {
    RopeAndWriteKv(context_, step_, host_.shape, qkv_.data(), host_.qkv_columns(),
                   host_.half_dim > 0, kv_);
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  }
  // Bits of out.
  std::vector<uint16_t> Attend(NewKeys new_keys = NewKeys::kReady) {
    out_.Set(std::vector<uint16_t>(host_.rows() * host_.out_columns(), kPoison));
    DecodeAttention(context_, step_, host_.shape, qkv_.data(), host_.qkv_columns(), kv_,
                    out_.data(), host_.out_columns(), scratch_.data(), new_keys);
    PrefillAttention(context_, step_, host_.shape, qkv_.data(), host_.qkv_columns(), kv_,
                     out_.data(), host_.out_columns());
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    return out_.Get<uint16_t>(host_.rows() * host_.out_columns());
  }
  std::vector<uint16_t> Qkv() const { return qkv_.Get<uint16_t>(host_.qkv.size()); }
  std::vector<uint16_t> K() const { return k_.Get<uint16_t>(host_.k.size()); }
  std::vector<uint16_t> V() const { return v_.Get<uint16_t>(host_.v.size()); }

 private:
  const Step& host_;
  LaunchContext context_;
  DeviceMemory positions_, sequences_, tables_, decode_rows_, tiles_, cos_, sin_;
  DeviceMemory qkv_, k_, v_, out_, scratch_;
  DeviceStep step_;
  KvLayer kv_;
};

// --- References ---

// Turns a head in place; the products have float precision on the device.
void TurnHead(const Step& step, int row, int64_t begin, std::vector<double>* turned) {
  for (int i = 0; i < step.half_dim; ++i) {
    const double cos = step.cos[row * step.half_dim + i];
    const double sin = step.sin[row * step.half_dim + i];
    const int64_t at = begin + i;
    const double a = Decode(step.shape.dtype, step.qkv[at]);
    const double b = Decode(step.shape.dtype, step.qkv[at + step.half_dim]);
    (*turned)[at] = a * cos - b * sin;
    (*turned)[at + step.half_dim] = b * cos + a * sin;
  }
}

// What qkv and the cache must hold after RopeAndWriteKv.
void CheckRope(const Step& step, const DeviceRun& run) {
  const AttentionShape& shape = step.shape;
  const std::vector<uint16_t> qkv = run.Qkv();
  std::vector<double> turned(step.qkv.size());
  for (size_t i = 0; i < turned.size(); ++i) turned[i] = Decode(shape.dtype, step.qkv[i]);
  std::vector<uint16_t> k = step.k;
  std::vector<uint16_t> v = step.v;
  for (int row = 0; row < step.rows(); ++row) {
    if (step.positions[row] == kPaddingPosition) continue;
    const int64_t begin = row * step.qkv_columns();
    for (int head = 0; head < shape.num_heads + shape.num_kv_heads; ++head) {
      TurnHead(step, row, begin + static_cast<int64_t>(head) * shape.head_dim, &turned);
    }
    for (int head = 0; head < shape.num_kv_heads; ++head) {
      const int64_t slot = step.Slot(step.row_sequences[row], step.positions[row], head);
      const uint16_t* from =
          qkv.data() + begin + static_cast<int64_t>(shape.num_heads + head) * shape.head_dim;
      std::copy_n(from, shape.head_dim, k.data() + slot);
      from += static_cast<int64_t>(shape.num_kv_heads) * shape.head_dim;
      std::copy_n(from, shape.head_dim, v.data() + slot);
    }
  }
  for (size_t i = 0; i < qkv.size(); ++i) {
    const double tolerance = 1.01 * UnitRoundoff(shape.dtype) * std::abs(turned[i]) + 1e-6;
    ASSERT_NEAR(Decode(shape.dtype, qkv[i]), turned[i], tolerance)
        << "row " << i / step.qkv_columns() << " column " << i % step.qkv_columns();
  }
  EXPECT_TRUE(run.K() == k);
  EXPECT_TRUE(run.V() == v);
}

// What was on the device after a run.
struct Results {
  Results(const DeviceRun& run, std::vector<uint16_t> attended)
      : qkv(run.Qkv()), k(run.K()), v(run.V()), out(std::move(attended)) {}
  std::vector<uint16_t> qkv, k, v, out;
};

// One row and head in double. Weights are rounded to the dtype on the device (relative to the
// largest of some keys, so that each may lose 2^-25 of it in float16), scores and sums to float.
void CheckHead(const Step& step, const Results& results, int row, int head) {
  const auto& [qkv, k, v, out] = results;
  const AttentionShape& shape = step.shape;
  const int dim = shape.head_dim;
  const int kv_head = head / (shape.num_heads / shape.num_kv_heads);
  const int length = step.positions[row] + 1;
  const uint16_t* q = qkv.data() + row * step.qkv_columns() + static_cast<int64_t>(head) * dim;
  const uint16_t* got = out.data() + row * step.out_columns() + static_cast<int64_t>(head) * dim;
  std::vector<float> query(dim);
  for (int i = 0; i < dim; ++i) query[i] = Decode(shape.dtype, q[i]);
  std::vector<double> weights(length);
  double score_error = 0.0;
  for (int key = 0; key < length; ++key) {
    const int64_t slot = step.Slot(step.row_sequences[row], key, kv_head);
    double sum = 0.0;
    double size = 0.0;
    for (int i = 0; i < dim; ++i) {
      const double product = query[i] * Decode(shape.dtype, k[slot + i]);
      sum += product;
      size += std::abs(product);
    }
    weights[key] = sum * shape.scale;
    score_error = std::max(score_error, (dim + 4) * 0x1p-23 * size * shape.scale);
  }
  const double max = length == 0 ? 0.0 : *std::max_element(weights.begin(), weights.end());
  double total = 0.0;
  for (double& weight : weights) total += weight = std::exp(weight - max);
  std::vector<double> want(dim), size(dim), lost(dim);
  for (int key = 0; key < length; ++key) {
    const int64_t slot = step.Slot(step.row_sequences[row], key, kv_head);
    for (int i = 0; i < dim; ++i) {
      const double value = Decode(shape.dtype, v[slot + i]);
      want[i] += weights[key] / total * value;
      size[i] += weights[key] / total * std::abs(value);
      lost[i] += 0x1p-25 / total * std::abs(value);
    }
  }
  const double unit = UnitRoundoff(shape.dtype);
  for (int i = 0; i < dim; ++i) {
    const double tolerance = size[i] * (unit + 2 * score_error + (length + 64) * 0x1p-23) +
                             unit * std::abs(want[i]) + lost[i] + 0x1p-24;
    ASSERT_NEAR(Decode(shape.dtype, got[i]), want[i], tolerance)
        << "row " << row << " position " << length - 1 << " head " << head << " element " << i;
  }
}

void CheckAttention(const Step& step, const Results& results) {
  for (int row = 0; row < step.rows(); ++row) {
    for (int head = 0; head < step.shape.num_heads; ++head) {
      CheckHead(step, results, row, head);
      if (testing::Test::HasFatalFailure()) return;
    }
  }
}

// --- Tests ---

class CudaAttention : public testing::Test {
 protected:
  void SetUp() override {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) GTEST_SKIP() << "no GPU";
  }
};

// Decode rows of ragged lengths, padding, whole prompts, chunks that go on, all in one step.
const std::vector<Rows> kMixed = {{0, 1},  {14, 1},  {15, 1}, {16, 1},   {-1, 1}, {510, 1},
                                  {0, 70}, {999, 1}, {37, 5}, {300, 65}, {-1, 1}};

struct Heads {
  int heads, kv_heads;
};
void PrintTo(const Heads& heads, std::ostream* os) { *os << heads.heads << "/" << heads.kv_heads; }

using Case = std::tuple<int, Heads, DType>;
class CudaAttentionShapes : public CudaAttention, public testing::WithParamInterface<Case> {};

TEST_P(CudaAttentionShapes, AgreesWithDoublePrecision) {
  const auto& [head_dim, heads, dtype] = GetParam();
  const AttentionShape shape = {
      heads.heads, heads.kv_heads, head_dim, 16, 1.0f / std::sqrt(static_cast<float>(head_dim)),
      dtype};
  const Step step = MakeStep(shape, kMixed, head_dim / 2, 1 + head_dim);
  DeviceRun run(step);
  run.Rope();
  CheckRope(step, run);
  CheckAttention(step, Results(run, run.Attend()));
}

std::string NameOfCase(const testing::TestParamInfo<Case>& info) {
  const Heads heads = std::get<1>(info.param);
  return std::to_string(std::get<0>(info.param)) + "x" + std::to_string(heads.heads) + "over" +
         std::to_string(heads.kv_heads) + NameOf(std::get<2>(info.param));
}

INSTANTIATE_TEST_SUITE_P(All, CudaAttentionShapes,
                         testing::Combine(testing::Values(32, 64, 80, 96, 128, 256),
                                          testing::Values(Heads{8, 8}, Heads{8, 2}, Heads{8, 1},
                                                          Heads{6, 2}, Heads{12, 1}),
                                          testing::Values(DType::kF16, DType::kBF16)),
                         NameOfCase);

TEST_F(CudaAttention, AnyBlockSize) {
  for (const int block_size : {1, 5, 8, 24, 32, 48}) {
    SCOPED_TRACE(block_size);
    const AttentionShape shape = {4, 2, 64, block_size, 0.125f, DType::kF16};
    const Step step = MakeStep(shape, kMixed, 32, block_size);
    DeviceRun run(step);
    run.Rope();
    CheckRope(step, run);
    CheckAttention(step, Results(run, run.Attend()));
  }
}

TEST_F(CudaAttention, TurnsPartOfAHeadOrNothing) {
  for (const int half_dim : {0, 10, 16, 1}) {
    SCOPED_TRACE(half_dim);
    const AttentionShape shape = {4, 2, 80, 16, 0.1f, DType::kBF16};
    const Step step = MakeStep(shape, {{0, 9}, {20, 1}, {-1, 1}}, half_dim, half_dim);
    DeviceRun run(step);
    run.Rope();
    CheckRope(step, run);
  }
}

// From one row, whose keys are cut into as many parts as there may be, to more rows than blocks.
TEST_F(CudaAttention, AnyNumberOfRows) {
  for (const int rows : {1, 2, 7, 10, 20, 33, 40, 150, 900}) {
    SCOPED_TRACE(rows);
    const AttentionShape shape = {8, 4, 64, 16, 0.125f, DType::kF16};
    std::vector<Rows> sequences;
    for (int i = 0; i < rows; ++i)
      sequences.push_back({(i * 37 + 3000 / rows) % (rows < 200 ? 3001 : 101), 1});
    const Step step = MakeStep(shape, sequences, 0, rows);
    DeviceRun run(step);
    run.Rope();
    CheckAttention(step, Results(run, run.Attend()));
  }
}

// Cards before sm_90 allow a block 99 KiB of shared memory.
TEST_F(CudaAttention, FitsInto99KiB) {
  for (const int head_dim : {128, 256}) {
    const AttentionShape shape = {8, 2, head_dim, 16, 0.08f, DType::kF16};
    const Step step = MakeStep(shape, kMixed, 0, head_dim);
    DeviceRun run(step, 99 << 10);
    run.Rope();
    CheckAttention(step, Results(run, run.Attend()));
  }
}

// Many tiles: blocks of two heads. Where the kernel is the same, they have the bits of blocks of
// one head; how much shared memory there is decides on kernel and block.
TEST_F(CudaAttention, ManyPrefillTiles) {
  for (const int head_dim : {32, 64, 80, 96, 128}) {
    for (const DType dtype : {DType::kF16, DType::kBF16}) {
      SCOPED_TRACE(head_dim);
      const AttentionShape shape = {16, 8, head_dim, 16, 0.09f, dtype};
      const Step step = MakeStep(shape, std::vector<Rows>(34, {100, 64}), 0, 3);
      std::vector<std::vector<uint16_t>> outs;
      for (const int shared : {16 << 10, 160 << 10, 0}) {
        DeviceRun run(step, shared);
        run.Rope();
        const Results results(run, run.Attend());
        for (const int row : {0, 70, step.rows() - 1}) {
          for (const int head : {0, 15}) CheckHead(step, results, row, head);
        }
        outs.push_back(results.out);
      }
      EXPECT_TRUE(outs[0] == outs[1]);
    }
  }
}

// Decode that turns and writes by itself leaves the same bits, in the cache as well.
TEST_F(CudaAttention, DecodeWritesNewKeysItself) {
  const std::vector<Rows> sequences = {{0, 1},    {15, 1},  {16, 1}, {-1, 1},
                                       {1000, 1}, {300, 1}, {31, 1}, {63, 1}};
  for (const int half_dim : {0, 40, 15}) {
    for (const Heads heads : {Heads{4, 4}, Heads{8, 2}, Heads{12, 1}}) {
      const AttentionShape shape = {heads.heads, heads.kv_heads, 80, 16, 0.1f, DType::kF16};
      const Step step = MakeStep(shape, sequences, half_dim, half_dim);
      DeviceRun apart(step);
      apart.Rope();
      DeviceRun fused(step);
      const NewKeys new_keys = half_dim > 0 ? NewKeys::kTurnAndWrite : NewKeys::kWrite;
      EXPECT_TRUE(fused.Attend(new_keys) == apart.Attend());
      EXPECT_TRUE(fused.K() == apart.K());
      EXPECT_TRUE(fused.V() == apart.V());
      EXPECT_TRUE(fused.Qkv() == step.qkv);
    }
  }
}

// Large scores: the softmax must not overflow, and one key takes all the weight.
TEST_F(CudaAttention, LargeScores) {
  const AttentionShape shape = {4, 2, 64, 16, 4.0f, DType::kBF16};
  const Step step = MakeStep(shape, kMixed, 0, 5);
  DeviceRun run(step);
  run.Rope();
  const std::vector<uint16_t> out = run.Attend();
  for (const uint16_t bits : out) ASSERT_TRUE(std::isfinite(Decode(DType::kBF16, bits)));
}

TEST_F(CudaAttention, EqualRunsGiveEqualBits) {
  for (const Heads heads : {Heads{4, 4}, Heads{8, 8}, Heads{8, 2}}) {
    const AttentionShape shape = {heads.heads, heads.kv_heads, 128, 16, 0.09f, DType::kF16};
    const Step step = MakeStep(shape, kMixed, 64, 7);
    DeviceRun run(step);
    run.Rope();
    const std::vector<uint16_t> first = run.Attend();
    for (int i = 0; i < 5; ++i) EXPECT_TRUE(run.Attend() == first);
  }
}

// Another length, content and place of the other rows changes no bit of a row.
TEST_F(CudaAttention, BatchMatesChangeNothing) {
  const AttentionShape shape = {8, 2, 128, 16, 0.09f, DType::kF16};
  Step step = MakeStep(shape, {{700, 1}, {50, 1}, {1200, 1}, {0, 100}, {3, 1}}, 0, 11);
  DeviceRun run(step);
  run.Rope();
  const std::vector<uint16_t> first = run.Attend();
  Step other = step;
  other.positions[1] = 20;
  other.positions[2] = kPaddingPosition;
  for (int64_t i = step.qkv_columns(); i < 3 * step.qkv_columns(); ++i) other.qkv[i] ^= 0x8001;
  std::swap(other.decode_rows[0], other.decode_rows[3]);
  DeviceRun other_run(other);
  other_run.Rope();
  const std::vector<uint16_t> second = other_run.Attend();
  const int64_t columns = step.out_columns();
  for (int row = 0; row < step.rows(); ++row) {
    if (row == 1 || row == 2) continue;
    EXPECT_TRUE(std::equal(first.begin() + row * columns, first.begin() + (row + 1) * columns,
                           second.begin() + row * columns))
        << row;
  }
}

}  // namespace
}  // namespace sluice
