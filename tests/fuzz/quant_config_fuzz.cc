// quantization_config and the side files: up to three JSON texts with zero bytes between them.
#include "services/checkpoint/quant_config.h"

#include "absl/strings/str_split.h"
#include "tests/fuzz/fuzz_target.h"

namespace sluice::fuzz {

std::vector<std::string> Seeds() {
  const std::string gptq =
      R"({"quantization_config":{"quant_method":"gptq","bits":4,"group_size":128,"sym":false,)"
      R"("checkpoint_format":"gptq","meta":{"quantizer":["gptqmodel:7.7.0"]},"dynamic":{"a":{}}}})";
  const std::string awq =
      R"({"quantization_config":{"quant_method":"awq","w_bit":4,"q_group_size":64,)"
      R"("zero_point":true,"version":"gemm","backend":"autoawq"}})";
  const std::string bnb =
      R"({"quantization_config":{"quant_method":"bitsandbytes","load_in_4bit":true}})";
  const std::string side = R"({"bits":4,"group_size":32,"desc_act":true,"sym":true})";
  const std::string zero(1, '\0');
  return {gptq, awq, bnb, "{}" + zero + side, gptq + zero + side + zero + side};
}

}  // namespace sluice::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace sluice;  // NOLINT(google-build-using-namespace)
  const std::string text(reinterpret_cast<const char*>(data), size);
  const std::vector<std::string> texts = absl::StrSplit(text, absl::MaxSplits('\0', 2));
  checkpoint::QuantConfigFiles files;
  checkpoint::Json* const targets[] = {&files.config, &files.quantize_config, &files.quant_config};
  for (size_t i = 0; i < texts.size(); ++i) {
    auto json = checkpoint::ParseJsonObject(texts[i], "config.json");
    if (json.ok()) *targets[i] = *std::move(json);
  }
  if (!files.config.is_object()) files.config = checkpoint::Json::object();
  (void)checkpoint::ParseQuantConfig(files);
  return 0;
}
