// GPTQ linears against a straightforward encoder, and the vectors of the format.
#include <algorithm>
#include <functional>
#include <numeric>
#include <random>

#include "tests/services/checkpoint/checkpoint_builder.h"
#include "tests/services/checkpoint/fails.h"

namespace sluice::checkpoint {
namespace {

constexpr int kN = 32, kK = 64;  // mlp.down_proj of the tiny Llama.
constexpr char kName[] = "layers.0.mlp.down_proj.weight";

// A GPTQ linear as numbers. code(k, n), zero(g, n), scale(g, n), group(k).
struct Linear {
  int group_size = 32;
  std::vector<int> groups = {};  // Of each column; empty: k / group_size, and no g_idx is written.
  std::function<uint32_t(int, int)> code = [](int k, int n) { return (k * 7 + n * 3) % 16; };
  std::function<uint32_t(int, int)> stored_zero = [](int g, int n) { return (g * 5 + n) % 15; };
  std::function<float(int, int)> scale = [](int g, int n) { return 0.25F * (1 + g) * (n % 4 + 1); };

  int GroupOf(int k) const { return groups.empty() ? k / group_size : groups[k]; }
  int Count() const { return (kK + group_size - 1) / group_size; }

  TensorMap Parts() const {
    std::vector<uint32_t> qweight(kK / 8 * kN), qzeros(Count() * kN / 8);
    std::vector<uint16_t> scales(Count() * kN);
    for (int k = 0; k < kK; ++k) {
      for (int n = 0; n < kN; ++n) qweight[k / 8 * kN + n] |= code(k, n) << (4 * (k % 8));
    }
    for (int g = 0; g < Count(); ++g) {
      for (int n = 0; n < kN; ++n) {
        qzeros[g * kN / 8 + n / 8] |= stored_zero(g, n) << (4 * (n % 8));
        scales[g * kN + n] = FloatToHalf(scale(g, n));
      }
    }
    const auto count = static_cast<uint64_t>(Count());
    TensorMap parts = {{"qweight", {"I32", {kK / 8, kN}, Bytes(qweight)}},
                       {"qzeros", {"I32", {count, kN / 8}, Bytes(qzeros)}},
                       {"scales", {"F16", {count, kN}, Bytes(scales)}}};
    if (!groups.empty()) parts["g_idx"] = {"I32", {kK}, Bytes(groups)};
    return parts;
  }

  // With `add` put on each stored zero.
  std::vector<float> Expected(int add) const {
    std::vector<float> weights(kN * kK);
    for (int n = 0; n < kN; ++n) {
      for (int k = 0; k < kK; ++k) {
        const int g = GroupOf(k);
        const int zero = static_cast<int>(stored_zero(g, n)) + add;
        weights[n * kK + k] = scale(g, n) * static_cast<float>(static_cast<int>(code(k, n)) - zero);
      }
    }
    return weights;
  }
};

class GptqTest : public testing::Test {
 protected:
  GptqTest() : model_(TinyModel::Llama()) {
    model_.config["quantization_config"] = {{"quant_method", "gptq"},
                                            {"bits", 4},
                                            {"group_size", 32},
                                            {"sym", false},
                                            {"desc_act", false}};
  }
  Json& Quant() { return model_.config["quantization_config"]; }

  absl::StatusOr<QuantizedMatrix> Read(const TensorMap& parts) {
    TinyModel model = model_;
    model.Quantize("mlp.down_proj", parts);
    absl::StatusOr<std::unique_ptr<Checkpoint>> checkpoint = model.Open(dir_);
    if (!checkpoint.ok()) return checkpoint.status();
    description_ = (*checkpoint)->description();
    return ReadNamed(**checkpoint, kName);
  }

  TempDir dir_;
  TinyModel model_;
  internal::v1::PlanShardsResponse description_;
};

TEST_F(GptqTest, ReadsV1AndV2) {
  const Linear linear;
  absl::StatusOr<QuantizedMatrix> matrix = Read(linear.Parts());
  ASSERT_TRUE(matrix.ok()) << matrix.status();
  EXPECT_EQ(Dequantize(*matrix), linear.Expected(1));
  EXPECT_EQ(description_.quant().method(), "gptq");
  EXPECT_EQ(description_.quant().detail(), "v1");
  EXPECT_EQ(description_.quant().group_size(), 32U);
  EXPECT_FALSE(description_.quant().act_order());
  Quant()["checkpoint_format"] = "gptq_v2";
  matrix = Read(linear.Parts());
  ASSERT_TRUE(matrix.ok()) << matrix.status();
  EXPECT_EQ(Dequantize(*matrix), linear.Expected(0));
}

// Rows 0..7 holding 0..7 are 0x76543210.
TEST_F(GptqTest, PacksAlongColumnsInNaturalOrder) {
  TensorMap parts = Linear().Parts();
  parts["qweight"].data = Repeat<uint32_t>(0x76543210, kK / 8 * kN);
  const absl::StatusOr<QuantizedMatrix> matrix = Read(parts);
  ASSERT_TRUE(matrix.ok()) << matrix.status();
  EXPECT_EQ(matrix->codes()[0], 0x10);
  EXPECT_EQ(matrix->codes()[3], 0x76);
}

TEST_F(GptqTest, SymmetricZeroIsEight) {
  TensorMap parts = Linear().Parts();
  parts["qzeros"].data = Repeat<uint32_t>(0x77777777, 2 * kN / 8);
  EXPECT_EQ(Read(parts)->zeros()[5], 8);
  Quant()["checkpoint_format"] = "gptq_v2";
  parts["qzeros"].data = Repeat<uint32_t>(0x88888888, 2 * kN / 8);
  EXPECT_EQ(Read(parts)->zeros()[5], 8);
}

// A stored 15 of v1 is 16 unless the writer is known to have borrowed over the word.
TEST_F(GptqTest, StoredFifteenIsSixteen) {
  Linear linear;
  linear.stored_zero = [](int, int) { return 15U; };
  const absl::StatusOr<QuantizedMatrix> matrix = Read(linear.Parts());
  ASSERT_TRUE(matrix.ok()) << matrix.status();
  EXPECT_EQ(matrix->zeros()[0], 16);
  EXPECT_EQ(Dequantize(*matrix), linear.Expected(1));
}

// Zeros [0, 8, ...]: true byte 0x80 is stored as 0x6F by gptqmodel, which takes 0x11111111 from the
// word.
TEST_F(GptqTest, PackedZerosAddWithCarry) {
  Quant()["meta"] = {{"quantizer", {"gptqmodel:7.7.0"}}};
  TensorMap parts = Linear().Parts();
  parts["qzeros"].data = Repeat<uint32_t>(0x12345680U - 0x11111111U, 2 * kN / 8);
  EXPECT_EQ(static_cast<uint8_t>(parts["qzeros"].data[0]), 0x6F);
  const absl::StatusOr<QuantizedMatrix> matrix = Read(parts);
  ASSERT_TRUE(matrix.ok()) << matrix.status();
  const int want[] = {0, 8, 6, 5, 4, 3, 2, 1};
  for (int n = 0; n < kN; ++n) EXPECT_EQ(matrix->zeros()[2 * n], want[n % 8]) << n;
}

TEST_F(GptqTest, ReadsEveryGroupSize) {
  for (const int size : {32, 64, 128, -1}) {
    Linear linear;
    linear.group_size = size == 32 ? 32 : 64;  // 64 columns: one group from 64 on.
    Quant()["group_size"] = size;
    const absl::StatusOr<QuantizedMatrix> matrix = Read(linear.Parts());
    ASSERT_TRUE(matrix.ok()) << size << matrix.status();
    EXPECT_EQ(Dequantize(*matrix), linear.Expected(1)) << size;
  }
}

TEST_F(GptqTest, LastGroupMayBeShort) {
  Linear linear;
  linear.group_size = 48;
  Quant()["group_size"] = 48;
  const absl::StatusOr<QuantizedMatrix> matrix = Read(linear.Parts());
  ASSERT_TRUE(matrix.ok()) << matrix.status();
  EXPECT_EQ(Dequantize(*matrix), linear.Expected(1));
}

TEST_F(GptqTest, ActOrderBecomesAPermutation) {
  Linear linear;
  linear.groups.resize(kK);
  for (int k = 0; k < kK; ++k) linear.groups[k] = k / 32;
  std::shuffle(linear.groups.begin(), linear.groups.end(), std::mt19937(3));
  const absl::StatusOr<QuantizedMatrix> matrix = Read(linear.Parts());
  ASSERT_TRUE(matrix.ok()) << matrix.status();
  EXPECT_TRUE(matrix->spec.has_perm);
  EXPECT_TRUE(description_.quant().act_order());
  EXPECT_EQ(Dequantize(*matrix), linear.Expected(1));
  // Stable: columns of one group keep their order.
  for (int i = 1; i < 32; ++i) EXPECT_LT(matrix->perm()[i - 1], matrix->perm()[i]);
}

TEST_F(GptqTest, NaturalGroupIndexMakesNoPermutation) {
  Linear linear;
  linear.groups.resize(kK);
  for (int k = 0; k < kK; ++k) linear.groups[k] = k / 32;
  Quant()["desc_act"] = true;  // The tensor tells, not the flag.
  const absl::StatusOr<QuantizedMatrix> matrix = Read(linear.Parts());
  ASSERT_TRUE(matrix.ok()) << matrix.status();
  EXPECT_FALSE(matrix->spec.has_perm);
}

// F18
TEST_F(GptqTest, GroupIndexMustBeInRange) {
  for (const int bad : {2, -1, 2147483647}) {
    Linear linear;
    linear.groups.assign(kK, 0);
    TensorMap parts = linear.Parts();
    linear.groups[17] = bad;
    parts["g_idx"].data = Bytes(linear.groups);
    EXPECT_TRUE(Invalid(Read(parts).status(), {"down_proj.g_idx[17]", "outside the groups 0..1"}));
  }
  Linear linear;
  linear.groups.assign(kK, 0);  // 64 columns in group 0 of 32.
  EXPECT_TRUE(Invalid(Read(linear.Parts()).status(), {"g_idx", "group 1 has not 32 columns"}));
}

TEST_F(GptqTest, NegativeAndWideScalesAreLegal) {
  Linear linear;
  linear.scale = [](int g, int n) { return n % 2 == 0 ? -0.5F : 2.0F + static_cast<float>(g); };
  EXPECT_EQ(Dequantize(*Read(linear.Parts())), linear.Expected(1));
  TensorMap parts = linear.Parts();
  std::vector<float> scales(2 * kN);
  for (int i = 0; i < 2 * kN; ++i) scales[i] = linear.scale(i / kN, i % kN);
  parts["scales"] = {"F32", {2, kN}, Bytes(scales)};
  EXPECT_EQ(Dequantize(*Read(parts)), linear.Expected(1));
}

// F19, F20
TEST_F(GptqTest, ShapesDtypesAndValuesAreChecked) {
  const TensorMap good = Linear().Parts();
  const auto with = [&good](const char* part, const BuiltTensor& tensor) {
    TensorMap parts = good;
    parts[part] = tensor;
    return parts;
  };
  EXPECT_TRUE(Invalid(Read(with("qzeros", {"I32", {2, 3}, std::string(24, 0)})).status(),
                      {"down_proj.qzeros", "[2, 3]", "[2, 4]"}));
  EXPECT_TRUE(
      Invalid(Read(with("qzeros", {"F32", {2, 4}, std::string(32, 0)})).status(), {"qzeros"}));
  EXPECT_TRUE(
      Invalid(Read(with("scales", {"F16", {2, 31}, std::string(124, 0)})).status(), {"scales"}));
  EXPECT_TRUE(
      Invalid(Read(with("scales", {"I16", {2, 32}, std::string(128, 0)})).status(), {"scales"}));
  EXPECT_TRUE(Invalid(Read(with("g_idx", {"I32", {63}, std::string(252, 0)})).status(), {"g_idx"}));
  EXPECT_TRUE(
      Invalid(Read(with("qweight", {"I64", {8, 32}, std::string(2048, 0)})).status(), {"qweight"}));
  EXPECT_TRUE(Unsupported(Read(with("qweight", {"I32", {16, 32}, std::string(2048, 0)})).status(),
                          {"8-bit GPTQ"}));
  BuiltTensor scales = good.at("scales");
  scales.data[0] = '\xFF';
  scales.data[1] = '\x7F';
  EXPECT_TRUE(Invalid(Read(with("scales", scales)).status(), {kName, "scales[0]"}));
  TensorMap parts = good;
  parts.erase("qzeros");
  EXPECT_TRUE(Invalid(Read(parts).status(), {"down_proj.qzeros is missing"}));
}

TEST_F(GptqTest, GroupSizeOfTheConfigurationMustFit) {
  Quant()["group_size"] = 16;
  EXPECT_TRUE(Invalid(Read(Linear().Parts()).status(), {"qzeros", "[4, 4]"}));
  Quant()["dynamic"] = {{"+:.*down.*", {{"group_size", 32}}}};
  EXPECT_EQ(Dequantize(*Read(Linear().Parts())), Linear().Expected(1));
}

// Old AutoGPTQ writes zeros for biases that a Llama has not.
TEST_F(GptqTest, ExtraBiasIsDroppedWhenZero) {
  TensorMap parts = Linear().Parts();
  parts["bias"] = {"F16", {kN}, Repeat<uint16_t>(0x8000, kN)};  // -0
  ASSERT_TRUE(Read(parts).ok());
  EXPECT_NE(description_.warnings(description_.warnings_size() - 1).find("bias"),
            std::string::npos);
  parts["bias"] = {"F16", {kN}, Repeat<uint16_t>(0x3C00, kN)};
  EXPECT_TRUE(Invalid(Read(parts).status(), {"down_proj.bias", "mlp_bias"}));
}

TEST_F(GptqTest, NeedsAConfiguration) {
  model_.config.erase("quantization_config");
  EXPECT_TRUE(Invalid(Read(Linear().Parts()).status(), {"qweight", "quantization_config"}));
}

}  // namespace
}  // namespace sluice::checkpoint
