#include "kernels/cpu/pack.h"

#include <cstring>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/backend_tensors.h"
#include "tests/support/kernel_formats.h"
#include "tests/support/random_tensor.h"

namespace sluice {
namespace {

TEST(PackTest, FollowsTheDrawing) {
  QuantSpec spec;
  spec.format = QuantFormat::kInt4Offset;
  spec.n = 2;
  spec.k = 8;
  spec.group_size = 8;
  QuantizedMatrix matrix(spec);
  const uint8_t codes[] = {0x21, 0x43, 0x65, 0x87, 0x99, 0x99, 0x99, 0x99};
  std::memcpy(matrix.codes(), codes, sizeof(codes));
  StoreFloat(DType::kF16, matrix.scales(), 0, 0.5f);
  StoreFloat(DType::kF16, matrix.scales(), 1, 2.0f);
  StoreFloat(DType::kF16, matrix.offsets(), 0, -1.0f);
  StoreFloat(DType::kF16, matrix.offsets(), 1, 3.0f);
  const auto packed = Pack({&matrix});
  ASSERT_TRUE(packed.ok()) << packed.status();
  ASSERT_EQ((*packed)->parts().size(), 1u);
  const PackedPart& part = (*packed)->parts()[0];
  EXPECT_EQ(part.block_bytes, 128);
  uint16_t header[32];
  std::memcpy(header, part.Block(0, 0), sizeof(header));
  EXPECT_EQ(header[0], FloatToHalf(0.5f));
  EXPECT_EQ(header[1], FloatToHalf(2.0f));
  EXPECT_EQ(header[16], FloatToHalf(-1.0f));
  EXPECT_EQ(header[17], FloatToHalf(3.0f));
  uint32_t words[16];
  std::memcpy(words, part.Block(0, 0) + part.header_bytes, sizeof(words));
  EXPECT_EQ(words[0], 0x87654321u);
  EXPECT_EQ(words[1], 0x99999999u);
  for (int lane = 2; lane < 16; ++lane) EXPECT_EQ(words[lane], 0u) << lane;
}

TEST(PackTest, KeepsFloat32ScalesThatFloat16WouldRound) {
  QuantSpec spec;
  spec.format = QuantFormat::kInt8;
  spec.scale_dtype = DType::kF32;
  spec.n = spec.k = spec.group_size = 1;
  for (const bool exact : {true, false}) {
    QuantizedMatrix matrix(spec);
    StoreFloat(DType::kF32, matrix.scales(), 0, exact ? 0.125f : 0.1f);
    const auto packed = Pack({&matrix});
    ASSERT_TRUE(packed.ok());
    EXPECT_EQ((*packed)->parts()[0].half_params, exact);
  }
}

class PackFormatTest : public testing::TestWithParam<WeightFormat> {};

TEST_P(PackFormatTest, UnpackedRowsAreTheDequantizedRows) {
  for (const auto& [n, k] :
       {std::pair<int64_t, int64_t>{1, 1}, {16, 64}, {17, 65}, {33, 127}, {5, 200}}) {
    RandomTensors random(static_cast<uint64_t>(n * 1000 + k));
    const QuantizedMatrix first = random.Matrix(GetParam().Spec(n, k));
    const QuantizedMatrix second = random.Matrix(GetParam().Spec(3, k));
    const auto packed = Pack({&first, &second});
    ASSERT_TRUE(packed.ok()) << packed.status();
    ASSERT_EQ((*packed)->n(), n + 3);
    for (int64_t row = 0; row < n + 3; ++row) {
      std::vector<float> expected(k), actual(k, NAN);
      row < n ? DequantizeRow(first, row, expected.data())
              : DequantizeRow(second, row - n, expected.data());
      UnpackRow(**packed, row, actual.data());
      ASSERT_TRUE(SameBits(actual, expected)) << n << "x" << k << " row " << row;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Formats, PackFormatTest, testing::ValuesIn(AllWeightFormats()),
                         WeightFormatLabel);

TEST(PackTest, RefusesMatricesOfDifferentInputs) {
  RandomTensors random(1);
  const QuantizedMatrix a = random.Matrix(WeightFormat{}.Spec(4, 8));
  const QuantizedMatrix b = random.Matrix(WeightFormat{}.Spec(4, 9));
  EXPECT_EQ(Pack({&a, &b}).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(Pack({}).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(PackTest, RefusesPlanesShorterThanTheSpec) {
  QuantizedMatrix matrix = RandomTensors(1).Matrix(WeightFormat{}.Spec(4, 8));
  matrix.spec.n = 5;
  EXPECT_EQ(Pack({&matrix}).status().code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace sluice
