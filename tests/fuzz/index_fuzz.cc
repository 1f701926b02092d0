// model.safetensors.index.json beside two sound shards.
#include "services/checkpoint/tensor_set.h"
#include "tests/fuzz/fuzz_target.h"
#include "tests/services/checkpoint/checkpoint_builder.h"

namespace sluice::fuzz {

std::vector<std::string> Seeds() {
  return {
      R"({"metadata":{"total_size":8},"weight_map":{"a":"one.safetensors","b":"two.safetensors"}})",
      R"({"weight_map":{"a":"one.safetensors"}})",
      R"({"weight_map":{"a":"../one.safetensors","b":"/dev/zero"}})", R"({"weight_map":{}})"};
}

}  // namespace sluice::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace sluice;  // NOLINT(google-build-using-namespace)
  static const auto* const kDir = [] {
    fuzz::WriteFile("one.safetensors", checkpoint::SafetensorsFile({{"a", {"F16", {2}, "1234"}}}));
    fuzz::WriteFile("two.safetensors", checkpoint::SafetensorsFile({{"b", {"F16", {2}, "1234"}}}));
    return new auto(checkpoint::ModelDir::Open(fuzz::Folder()));
  }();
  fuzz::WriteFile("model.safetensors.index.json", data, size);
  (void)checkpoint::TensorSet::Open(**kDir);
  return 0;
}
