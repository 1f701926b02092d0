// A model.safetensors and what is made from it. The first byte picks the config.json that lies
// beside it: none quantized, GPTQ, AWQ or bitsandbytes.
#include "services/checkpoint/safetensors.h"
#include "tests/fuzz/fuzz_target.h"
#include "tests/fuzz/quantized_models.h"

namespace sluice::fuzz {

std::vector<std::string> Seeds() {
  std::vector<std::string> seeds;
  for (uint8_t kind = 0; kind < kNumKinds; ++kind) {
    seeds.push_back(static_cast<char>(kind) +
                    checkpoint::SafetensorsFile(ModelOfKind(kind).tensors));
  }
  const std::string zero(1, '\0');
  seeds.push_back(zero + checkpoint::SafetensorsFile({{"a", {"F16", {2}, "1234"}}}));
  seeds.push_back(zero + checkpoint::SafetensorsFile("{\"__metadata__\":{\"a\":\"b\"}}  ", ""));
  return seeds;
}

}  // namespace sluice::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace sluice;  // NOLINT(google-build-using-namespace)
  if (size == 0) return 0;
  const auto file = fuzz::FileOf(data + 1, size - 1, "model.safetensors");
  if (!checkpoint::ReadSafetensors(*file).ok()) return 0;
  static int written = -1;
  const int kind = data[0] % fuzz::kNumKinds;
  if (kind != written) {
    fuzz::WriteFile("config.json", fuzz::ModelOfKind(static_cast<uint8_t>(kind)).config.dump());
  }
  written = kind;
  fuzz::WriteFile("model.safetensors", data + 1, size - 1);
  fuzz::OpenAndRead(fuzz::Folder());
  return 0;
}
