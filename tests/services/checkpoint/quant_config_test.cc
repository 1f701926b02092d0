#include "services/checkpoint/quant_config.h"

#include "tests/services/checkpoint/fails.h"

namespace sluice::checkpoint {
namespace {

QuantConfigFiles Config(const Json& quantization) {
  return {{{"model_type", "llama"}, {"quantization_config", quantization}}, nullptr, nullptr};
}

absl::Status StatusOf(const Json& quantization) {
  return ParseQuantConfig(Config(quantization)).status();
}

TEST(QuantConfigTest, NoneWithoutAnyFile) {
  const auto config = ParseQuantConfig({Json::object(), nullptr, nullptr});
  ASSERT_TRUE(config.ok());
  EXPECT_EQ(config->method, QuantMethod::kNone);
}

TEST(QuantConfigTest, ReadsGptqVersions) {
  Json json = {{"quant_method", "gptq"}, {"bits", 4}, {"group_size", 128}, {"sym", true}};
  auto config = ParseQuantConfig(Config(json));
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->group_size, 128);
  EXPECT_FALSE(config->zero_is_true);
  json["checkpoint_format"] = "gptq_v2";
  EXPECT_TRUE(ParseQuantConfig(Config(json))->zero_is_true);
  json["checkpoint_format"] = "gptq";
  EXPECT_FALSE(ParseQuantConfig(Config(json))->zero_is_true);
}

TEST(QuantConfigTest, PackedZerosOnlyForNewGptqModelAndAsymmetricV1) {
  const auto packed = [](const char* format, bool sym, const Json& quantizer) {
    const auto config = ParseQuantConfig(Config({{"quant_method", "gptq"},
                                                 {"bits", 4},
                                                 {"sym", sym},
                                                 {"checkpoint_format", format},
                                                 {"meta", {{"quantizer", quantizer}}}}));
    return config.ok() && config->packed_zeros;
  };
  EXPECT_TRUE(packed("gptq", false, "gptqmodel:7.7.0"));
  EXPECT_TRUE(packed("gptq", false, {"gptqmodel:0.9.0"}));
  EXPECT_FALSE(packed("gptq", false, {"gptqmodel:0.8.7"}));
  EXPECT_FALSE(packed("gptq", false, "optimum:2.0"));
  EXPECT_FALSE(packed("gptq", true, "gptqmodel:7.7.0"));
  EXPECT_FALSE(packed("gptq_v2", false, "gptqmodel:7.7.0"));
}

TEST(QuantConfigTest, ConfigJsonWinsAndSideFilesFillIn) {
  QuantConfigFiles files = Config({{"quant_method", "gptq"}, {"bits", 4}, {"group_size", 64}});
  files.quantize_config = {{"bits", 4}, {"group_size", 128}, {"checkpoint_format", "gptq_v2"}};
  const auto config = ParseQuantConfig(files);
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->group_size, 64);
  EXPECT_TRUE(config->zero_is_true);
  ASSERT_EQ(config->warnings.size(), 1U);
  EXPECT_NE(config->warnings[0].find("quantize_config.json: group_size disagrees"),
            std::string::npos);
}

TEST(QuantConfigTest, ReadsSideFilesAlone) {
  QuantConfigFiles files{
      Json::object(), {{"bits", 4}, {"group_size", 128}, {"desc_act", false}}, nullptr};
  EXPECT_EQ(ParseQuantConfig(files)->method, QuantMethod::kGptq);
  files = {Json::object(),
           nullptr,
           {{"w_bit", 4}, {"q_group_size", 64}, {"zero_point", true}, {"version", "GEMM"}}};
  const auto awq = ParseQuantConfig(files);
  ASSERT_TRUE(awq.ok()) << awq.status();
  EXPECT_EQ(awq->method, QuantMethod::kAwq);
  EXPECT_EQ(awq->group_size, 64);
}

TEST(QuantConfigTest, ReadsBitsAndBytesWithoutMethod) {
  EXPECT_EQ(ParseQuantConfig(Config({{"load_in_4bit", true}}))->method, QuantMethod::kBitsAndBytes);
  EXPECT_EQ(
      ParseQuantConfig(Config({{"_load_in_4bit", true}, {"quant_method", "bitsandbytes"}}))->bits,
      4U);
}

TEST(QuantConfigTest, ReadsAutoRoundByPacking) {
  EXPECT_EQ(ParseQuantConfig(Config({{"quant_method", "auto-round"},
                                     {"packing_format", "auto_round:auto_gptq"},
                                     {"bits", 4}}))
                ->method,
            QuantMethod::kGptq);
}

TEST(QuantConfigTest, RefusesWhatIsNotSupportedByName) {
  EXPECT_TRUE(
      Unsupported(StatusOf({{"quant_method", "gptq"}, {"bits", 3}}), {"3-bit", "4-bit version"}));
  EXPECT_TRUE(Unsupported(StatusOf({{"quant_method", "gptq"}, {"bits", 8}}), {"8-bit"}));
  EXPECT_TRUE(Unsupported(
      StatusOf({{"quant_method", "gptq"}, {"bits", 4}, {"checkpoint_format", "gptq_p"}}),
      {"planar"}));
  EXPECT_TRUE(Unsupported(
      StatusOf({{"quant_method", "gptq"}, {"bits", 4}, {"is_marlin_format", true}}), {"Marlin"}));
  EXPECT_TRUE(
      Unsupported(StatusOf({{"quant_method", "gptq"}, {"bits", 4}, {"pack_dtype", "int64"}}),
                  {"pack_dtype", "int64"}));
  EXPECT_TRUE(Unsupported(StatusOf({{"quant_method", "awq"}, {"bits", 4}, {"version", "gemv"}}),
                          {"gemv", "gemm"}));
  EXPECT_TRUE(Unsupported(StatusOf({{"quant_method", "awq"}, {"bits", 4}, {"version", "marlin"}}),
                          {"marlin"}));
  EXPECT_TRUE(Unsupported(StatusOf({{"quant_method", "bitsandbytes"}, {"load_in_8bit", true}}),
                          {"LLM.int8"}));
  EXPECT_TRUE(
      Unsupported(StatusOf({{"quant_method", "compressed-tensors"}}), {"compressed-tensors"}));
  EXPECT_TRUE(Unsupported(StatusOf({{"quant_method", "fp8"}}), {"fp8"}));
}

// F16
TEST(QuantConfigTest, RefusesAbsurdNumbers) {
  for (const char* bits : {"3.5", "0", "255", "-4", "\"4\""}) {
    EXPECT_TRUE(
        Invalid(StatusOf({{"quant_method", "gptq"}, {"bits", Json::parse(bits)}}), {"bits"}))
        << bits;
  }
  for (const char* size : {"0", "-2", "7", "100000000", "\"128\"", "12"}) {
    EXPECT_TRUE(Invalid(
        StatusOf({{"quant_method", "gptq"}, {"bits", 4}, {"group_size", Json::parse(size)}}),
        {"group_size"}))
        << size;
  }
  EXPECT_TRUE(Invalid(StatusOf("gptq"), {"quantization_config"}));
}

}  // namespace
}  // namespace sluice::checkpoint
