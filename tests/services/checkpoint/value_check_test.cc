// What only the values tell: a model that is whole but damaged, and zero points that contradict the
// configuration.
#include "services/checkpoint/value_check.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/services/checkpoint/checkpoint_builder.h"

namespace sluice::checkpoint {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

constexpr uint64_t kN = 32, kK = 64;  // mlp.down_proj of the tiny Llama

ValueReport Check(const TinyModel& model) {
  const TempDir dir;
  const auto checkpoint = model.Open(dir);
  EXPECT_TRUE(checkpoint.ok()) << checkpoint.status();
  return CheckAllValues(**checkpoint, [](int) { return true; });
}

// `stored`: every zero point as v1 stores it.
TinyModel Gptq(uint32_t stored, bool symmetric) {
  TinyModel model = TinyModel::Llama();
  model.config["quantization_config"] = {
      {"quant_method", "gptq"}, {"bits", 4}, {"group_size", kK}, {"sym", symmetric}};
  model.Quantize("mlp.down_proj",
                 {{"qweight", {"I32", {kK / 8, kN}, Repeat<uint32_t>(0x76543210, kK / 8 * kN)}},
                  {"qzeros", {"I32", {1, kN / 8}, Repeat<uint32_t>(stored * 0x11111111U, kN / 8)}},
                  {"scales", {"F16", {1, kN}, Repeat<uint16_t>(0x3800, kN)}}});
  return model;
}

TEST(ValueCheckTest, AWholeModelGivesNeither) {
  const ValueReport report = Check(TinyModel::Llama());
  EXPECT_THAT(report.errors, IsEmpty());
  EXPECT_THAT(report.warnings, IsEmpty());
  EXPECT_THAT(Check(Gptq(7, true)).warnings, IsEmpty());
}

TEST(ValueCheckTest, NamesAValueThatIsNotFinite) {
  TinyModel model = TinyModel::Llama();
  BuiltTensor& norm = model.tensors.at("model.norm.weight");
  norm.data.replace(6, 2, Bytes<uint16_t>({0x7e00}));  // NaN
  const ValueReport report = Check(model);
  ASSERT_EQ(report.errors.size(), 1u);
  EXPECT_THAT(report.errors[0], HasSubstr("tensor norm.weight: element 3 is not finite"));
}

TEST(ValueCheckTest, AScaleThatIsNotFiniteIsAnError) {
  TinyModel model = Gptq(7, true);
  model.tensors.at("model.layers.0.mlp.down_proj.scales")
      .data.replace(4, 2, Bytes<uint16_t>({0x7c00}));
  const ValueReport report = Check(model);
  ASSERT_EQ(report.errors.size(), 1u);
  EXPECT_THAT(report.errors[0], HasSubstr("down_proj"));
}

TEST(ValueCheckTest, TheSymmetricFlagMayLie) {
  EXPECT_THAT(Check(Gptq(5, true)).warnings,
              ElementsAre(HasSubstr("32 of 32 zero points are not 8")));
  EXPECT_THAT(Check(Gptq(7, false)).warnings, ElementsAre(HasSubstr("as good as symmetric")));
}

TEST(ValueCheckTest, TellsOfZeroPointsThatOthersReadDifferently) {
  EXPECT_THAT(Check(Gptq(15, false)).warnings, ElementsAre(HasSubstr("32 zero points are 16")));
}

TEST(ValueCheckTest, EndsWhenTold) {
  const TempDir dir;
  const auto checkpoint = TinyModel::Llama().Open(dir);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  int last = 0;
  CheckAllValues(**checkpoint, [&](int done) { return (last = done) < 3; });
  EXPECT_EQ(last, 3);
}

}  // namespace
}  // namespace sluice::checkpoint
