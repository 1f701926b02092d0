// Rounding to nearest by groups, and its two layouts, against files that gptqmodel and autoawq wrote.
#include "services/convert/int4.h"

#include <cmath>
#include <random>

#include "gtest/gtest.h"
#include "services/convert/output_tensor.h"
#include "tests/services/checkpoint/checkpoint_builder.h"
#include "tests/services/convert/stored_parts.h"

namespace sluice::convert {
namespace {

using checkpoint::Checkpoint;
using checkpoint::TempDir;

// Float16 keeps a scale to 2^-11 of itself, and the farthest weight is 15 codes away; below 2^-14
// float16 has steps of 2^-24 instead.
float Bound(float scale) {
  return scale * (0.5F + 15 * std::exp2(-11.0F)) + 15 * std::exp2(-25.0F);
}

void ExpectWithinBound(const std::vector<float>& weights, bool symmetric) {
  std::vector<uint8_t> codes(weights.size());
  const Int4Group group =
      QuantizeGroup(weights.data(), static_cast<int64_t>(weights.size()), symmetric, codes.data());
  const float scale = HalfToFloat(group.scale);
  ASSERT_GT(scale, 0);
  EXPECT_LE(group.zero, 15);
  EXPECT_TRUE(!symmetric || group.zero == 8);
  for (size_t i = 0; i < weights.size(); ++i) {
    ASSERT_LE(codes[i], 15);
    const float back = scale * static_cast<float>(codes[i] - group.zero);
    EXPECT_LE(std::abs(back - weights[i]), Bound(scale)) << weights[i] << " became " << back;
  }
}

TEST(QuantizeGroupTest, EveryWeightIsWithinHalfAStep) {
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  for (int round = 0; round < 200; ++round) {
    const float spread = std::exp2(static_cast<float>(round % 30) - 20);  // 2^-20 .. 2^9
    const float shift = round % 3 == 0 ? 0 : spread * normal(random) * 3;
    std::vector<float> weights(64);
    for (float& w : weights) w = HalfToFloat(FloatToHalf(shift + spread * normal(random)));
    ExpectWithinBound(weights, /*symmetric=*/true);
    ExpectWithinBound(weights, /*symmetric=*/false);
  }
}

TEST(QuantizeGroupTest, EdgesOfTheRange) {
  const std::vector<std::vector<float>> groups = {
      {0, 0, 0, 0},     {1, 1, 1, 1},          {-1, -1, -1, -1}, {5, 6, 7, 5.5F},
      {-5, -6, -7, -7}, {65504, -65504, 1, 0}, {1e-7F, 0, 0, 0}, {-6e-8F, 6e-8F, 0},
      {100, 0.01F, 0},  {-1, 0.4F, 0.1F}};
  for (const std::vector<float>& group : groups) {
    SCOPED_TRACE(group[0]);
    ExpectWithinBound(group, /*symmetric=*/true);
    ExpectWithinBound(group, /*symmetric=*/false);
  }
}

TEST(QuantizeGroupTest, CodesOfAKnownGroup) {
  // Range -1 .. 2 in 15 steps of 0.2, zero 5: code = w / 0.2 + 5.
  const std::vector<float> weights = {-1, 2, 0, 0.2F, 0.29F, 0.31F, -0.09F, -0.11F};
  std::vector<uint8_t> codes(weights.size());
  Int4Group group = QuantizeGroup(weights.data(), 8, /*symmetric=*/false, codes.data());
  EXPECT_EQ(group.scale, FloatToHalf(0.2F));
  EXPECT_EQ(group.zero, 5);
  EXPECT_EQ(codes, (std::vector<uint8_t>{0, 15, 5, 6, 6, 7, 5, 4}));
  // Range -2 .. 2 in steps of 4/15, zero 8; the top is cut off at code 15.
  group = QuantizeGroup(weights.data(), 8, /*symmetric=*/true, codes.data());
  EXPECT_EQ(group.scale, FloatToHalf(4.0F / 15));
  EXPECT_EQ(group.zero, 8);
  EXPECT_EQ(codes, (std::vector<uint8_t>{4, 15, 8, 9, 9, 9, 8, 8}));
}

TEST(QuantizeInt4Test, WholeTensorIsItsGroups) {
  checkpoint::TinyModel model = checkpoint::TinyModel::Llama();
  const TempDir dir;
  const auto source = model.Open(dir);
  ASSERT_TRUE(source.ok()) << source.status();
  const auto rows = WeightRows::Open(**source, 2);  // q_proj [32, 32]
  ASSERT_TRUE(rows.ok());
  const auto matrix = QuantizeInt4(*rows, 16, /*symmetric=*/false);
  ASSERT_TRUE(matrix.ok()) << matrix.status();
  ASSERT_TRUE(CheckValues(*matrix).ok());
  const std::vector<float> before = checkpoint::Dequantize(*(*source)->Read(2));
  const std::vector<float> after = checkpoint::Dequantize(*matrix);
  for (int64_t row = 0; row < 32; ++row) {
    for (int64_t g = 0; g < 2; ++g) {
      std::vector<uint8_t> codes(16);
      const float* group = &before[row * 32 + g * 16];
      const Int4Group one = QuantizeGroup(group, 16, /*symmetric=*/false, codes.data());
      for (int64_t i = 0; i < 16; ++i) {
        EXPECT_EQ(after[row * 32 + g * 16 + i],
                  HalfToFloat(one.scale) * static_cast<float>(codes[i] - one.zero));
      }
    }
  }
}

// What the reader makes of a stored file, packed again, must be that file: all linears of it.
void ExpectSameFile(const std::string& name, bool awq, bool zeros_minus_one) {
  SCOPED_TRACE(name);
  const auto source = Checkpoint::Open(Stored(name));
  ASSERT_TRUE(source.ok()) << source.status();
  const StoredParts stored(Stored(name));
  const bool opt = (*source)->description().config().model_type() == "opt";
  int linears = 0;
  for (int i = 0; i < (*source)->description().tensors_size(); ++i) {
    const auto matrix = (*source)->Read(i);
    ASSERT_TRUE(matrix.ok()) << matrix.status();
    if (matrix->spec.format != QuantFormat::kInt4Zero) continue;
    ++linears;
    const std::string tensor = (*source)->description().tensors(i).name();
    const std::string base =
        (opt ? "model.decoder." : "model.") + tensor.substr(0, tensor.size() - 7);
    const QuantSpec& spec = matrix->spec;
    const auto parts = awq ? AwqParts(base, spec.n, spec.k, spec.group_size)
                           : GptqParts(base, spec.n, spec.k, spec.group_size);
    const auto packed = awq ? PackAwq(*matrix) : PackGptq(*matrix, zeros_minus_one);
    ASSERT_EQ(packed.size(), parts.size());
    for (size_t part = 0; part < parts.size(); ++part) {
      const checkpoint::StoredTensor* there = stored.set().Find(parts[part].name);
      ASSERT_NE(there, nullptr) << parts[part].name;
      EXPECT_EQ(there->dtype.name, parts[part].dtype) << parts[part].name;
      EXPECT_EQ(there->shape, parts[part].shape) << parts[part].name;
      EXPECT_TRUE(std::string(packed[part].begin(), packed[part].end()) ==
                  stored.Read(parts[part].name))
          << parts[part].name;
    }
  }
  EXPECT_EQ(linears, opt ? 12 : 14);
}

TEST(PackTest, GptqIsByteForByteWhatGptqmodelWrote) {
  ExpectSameFile("llama-gptq-v1-g128", /*awq=*/false, /*zeros_minus_one=*/true);
  ExpectSameFile("llama-gptq-v2-g64-asym", /*awq=*/false, /*zeros_minus_one=*/false);
}

TEST(PackTest, AwqIsByteForByteWhatAutoawqAndGptqmodelWrote) {
  for (const char* name :
       {"llama-awq-g128", "llama-awq-g32", "llama-awq-gptqmodel-g64", "opt-awq-g64"}) {
    ExpectSameFile(name, /*awq=*/true, /*zeros_minus_one=*/false);
  }
}

TEST(PackTest, PublishedVectors) {
  // Codes 0..7 in 8 neighbours: along K in a GPTQ word, along N in an AWQ word.
  QuantSpec spec;
  spec.format = QuantFormat::kInt4Zero;
  spec.n = 8;
  spec.k = 8;
  spec.group_size = 8;
  QuantizedMatrix along_k(spec), along_n(spec);
  for (int row = 0; row < 8; ++row) {
    for (int i = 0; i < 4; ++i) {
      along_k.codes()[4 * row + i] = static_cast<uint8_t>(2 * i | (2 * i + 1) << 4);
      along_n.codes()[4 * row + i] = static_cast<uint8_t>(row | row << 4);
    }
    along_k.zeros()[row] = 8;
    along_n.zeros()[row] = static_cast<uint8_t>(row);
  }
  const auto word = [](const Bytes& bytes) {
    uint32_t value = 0;
    std::memcpy(&value, bytes.data(), 4);
    return value;
  };
  EXPECT_EQ(word(PackGptq(along_k, /*zeros_minus_one=*/true)[0]), 0x76543210U);
  EXPECT_EQ(word(PackGptq(along_k, /*zeros_minus_one=*/true)[2]), 0x77777777U);
  EXPECT_EQ(word(PackGptq(along_k, /*zeros_minus_one=*/false)[2]), 0x88888888U);
  EXPECT_EQ(word(PackAwq(along_n)[0]), 0x75316420U);
  EXPECT_EQ(word(PackAwq(along_n)[2]), 0x75316420U);
}

}  // namespace
}  // namespace sluice::convert
