// config.json and generation_config.json: two JSON texts with a zero byte between them.
#include "services/checkpoint/hf_config.h"
#include "services/checkpoint/layout.h"
#include "tests/fuzz/fuzz_target.h"
#include "tests/services/checkpoint/checkpoint_builder.h"

namespace sluice::fuzz {

std::vector<std::string> Seeds() {
  checkpoint::Json rope = checkpoint::TinyModel::Llama().config;
  rope["rope_scaling"] = {{"rope_type", "llama3"},
                          {"factor", 8.0},
                          {"low_freq_factor", 1.0},
                          {"high_freq_factor", 4.0},
                          {"original_max_position_embeddings", 8192}};
  rope["eos_token_id"] = {1, 2};
  return {checkpoint::TinyModel::Llama().config.dump(), checkpoint::TinyModel::Opt().config.dump(),
          rope.dump() + '\0' + R"({"eos_token_id":[1,2],"bos_token_id":1})"};
}

}  // namespace sluice::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace sluice;  // NOLINT(google-build-using-namespace)
  const std::string text(reinterpret_cast<const char*>(data), size);
  const size_t cut = text.find('\0');
  const auto config = checkpoint::ParseJsonObject(text.substr(0, cut), "config.json");
  if (!config.ok()) return 0;
  checkpoint::Json generation;
  if (cut != std::string::npos) {
    const auto second = checkpoint::ParseJsonObject(text.substr(cut + 1), "generation_config.json");
    if (second.ok()) generation = *second;
  }
  const auto parsed = checkpoint::ParseHfConfig(*config, generation);
  if (parsed.ok()) (void)checkpoint::ExpectedTensors(*parsed);
  return 0;
}
