// AWQ GEMM linears against a straightforward encoder, and the vector of the format.
#include "tests/services/checkpoint/checkpoint_builder.h"
#include "tests/services/checkpoint/fails.h"

namespace sluice::checkpoint {
namespace {

constexpr int kN = 32, kK = 64, kGroup = 32;  // mlp.down_proj of the tiny Llama.
constexpr char kName[] = "layers.0.mlp.down_proj.weight";
constexpr int kOrder[8] = {0, 2, 4, 6, 1, 3, 5, 7};  // Nibble i holds output 8c + kOrder[i].

uint32_t Code(int k, int n) { return (k * 5 + n * 11) % 16; }
uint32_t Zero(int g, int n) { return (g * 3 + n) % 16; }
float Scale(int g, int n) {
  return 0.125F * static_cast<float>(g + 1) * static_cast<float>(n % 5 + 1);
}

template <typename F>
std::vector<uint32_t> Pack(int rows, F value) {
  std::vector<uint32_t> words(rows * kN / 8);
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < kN / 8; ++c) {
      for (int i = 0; i < 8; ++i) words[r * kN / 8 + c] |= value(r, 8 * c + kOrder[i]) << (4 * i);
    }
  }
  return words;
}

TensorMap Parts() {
  std::vector<uint16_t> scales(kK / kGroup * kN);
  for (size_t i = 0; i < scales.size(); ++i) {
    scales[i] = FloatToHalf(Scale(static_cast<int>(i) / kN, static_cast<int>(i) % kN));
  }
  return {{"qweight", {"I32", {kK, kN / 8}, Bytes(Pack(kK, Code))}},
          {"qzeros", {"I32", {kK / kGroup, kN / 8}, Bytes(Pack(kK / kGroup, Zero))}},
          {"scales", {"F16", {kK / kGroup, kN}, Bytes(scales)}}};
}

class AwqTest : public testing::Test {
 protected:
  AwqTest() : model_(TinyModel::Llama()) {
    model_.config["quantization_config"] = {{"quant_method", "awq"},
                                            {"bits", 4},
                                            {"group_size", kGroup},
                                            {"zero_point", true},
                                            {"version", "gemm"}};
  }
  absl::StatusOr<QuantizedMatrix> Read(const TensorMap& parts) {
    TinyModel model = model_;
    model.Quantize("mlp.down_proj", parts);
    absl::StatusOr<std::unique_ptr<Checkpoint>> checkpoint = model.Open(dir_);
    if (!checkpoint.ok()) return checkpoint.status();
    EXPECT_EQ((*checkpoint)->description().quant().detail(), "gemm");
    return ReadNamed(**checkpoint, kName);
  }
  TempDir dir_;
  TinyModel model_;
};

TEST_F(AwqTest, Reads) {
  const absl::StatusOr<QuantizedMatrix> matrix = Read(Parts());
  ASSERT_TRUE(matrix.ok()) << matrix.status();
  std::vector<float> want;
  for (int n = 0; n < kN; ++n) {
    for (int k = 0; k < kK; ++k) {
      const int g = k / kGroup;
      const int difference = static_cast<int>(Code(k, n)) - static_cast<int>(Zero(g, n));
      want.push_back(Scale(g, n) * static_cast<float>(difference));
    }
  }
  EXPECT_EQ(Dequantize(*matrix), want);
}

// Outputs 0..7 holding 0..7 are 0x75316420.
TEST_F(AwqTest, OrderOfNibbles) {
  TensorMap parts = Parts();
  parts["qweight"].data = Repeat<uint32_t>(0x75316420, kK * kN / 8);
  parts["qzeros"].data = Repeat<uint32_t>(0x75316420, kK / kGroup * kN / 8);
  const absl::StatusOr<QuantizedMatrix> matrix = Read(parts);
  ASSERT_TRUE(matrix.ok()) << matrix.status();
  for (int n = 0; n < kN; ++n) {
    EXPECT_EQ(matrix->codes()[n * kK / 2], n % 8 * 17) << n;  // Both nibbles.
    EXPECT_EQ(matrix->zeros()[n * 2], n % 8) << n;
  }
}

TEST_F(AwqTest, OneGroupARow) {
  model_.config["quantization_config"]["group_size"] = -1;
  TensorMap parts = Parts();
  parts["qzeros"] = {"I32", {1, kN / 8}, std::string(kN / 2, 0)};
  parts["scales"] = {"F16", {1, kN}, Repeat<uint16_t>(0x3C00, kN)};
  const absl::StatusOr<QuantizedMatrix> matrix = Read(parts);
  ASSERT_TRUE(matrix.ok()) << matrix.status();
  EXPECT_EQ(matrix->spec.group_size, kK);
}

TEST_F(AwqTest, ShapesAreChecked) {
  TensorMap parts = Parts();
  parts["qzeros"] = {"I32", {2, 3}, std::string(24, 0)};
  EXPECT_TRUE(Invalid(Read(parts).status(), {"down_proj.qzeros", "[2, 3]"}));
  parts = Parts();
  parts["qweight"] = {"I16", {kN / 4, kK}, std::string(kN / 4 * kK * 2, 0)};
  EXPECT_TRUE(Unsupported(Read(parts).status(), {"gemv_fast", "gemm"}));
  parts = Parts();
  parts["qweight"] = {"I32", {kK / 8, kN}, std::string(kN * kK / 2, 0)};  // GPTQ's shape.
  EXPECT_TRUE(Invalid(Read(parts).status(), {"down_proj.qweight", "[64, 4]"}));
  model_.config["quantization_config"]["group_size"] = 48;
  EXPECT_TRUE(Invalid(Read(Parts()).status(), {"group size 48"}));
}

}  // namespace
}  // namespace sluice::checkpoint
