// A GGUF file: header, configuration, vocabulary, and every tensor when all that is sound.
#include "services/checkpoint/gguf.h"

#include "tests/fuzz/fuzz_target.h"
#include "tests/services/checkpoint/checkpoint_builder.h"

namespace sluice::fuzz {

std::vector<std::string> Seeds() {
  checkpoint::GgufBuilder small = checkpoint::GgufBuilder::Llama();
  checkpoint::GgufBuilder typed = small;
  typed.Raw("i8", 1, "\xFE");
  typed.Floats("floats", {1.5F, -2});
  typed.Flag("tokenizer.ggml.add_bos_token", true);
  typed.U32("general.alignment", 32);
  typed.Tensor("blk.0.ffn_down.weight", 2, {64, 32}, std::string(size_t{2} * 32 * 18, '\1'));
  typed.Tensor("blk.0.ffn_up.weight", 3, {32, 64}, std::string(size_t{64} * 20, '\1'));
  typed.Tensor("blk.0.ffn_gate.weight", 8, {32, 64}, std::string(size_t{64} * 34, '\1'));
  checkpoint::GgufBuilder empty;
  empty.Text("general.architecture", "llama");
  return {small.Build(), typed.Build(), empty.Build()};
}

}  // namespace sluice::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace sluice;  // NOLINT(google-build-using-namespace)
  if (!checkpoint::GgufFile::Open(fuzz::FileOf(data, size, "model.gguf")).ok()) return 0;
  fuzz::WriteFile("model.gguf", data, size);
  fuzz::OpenAndRead(fuzz::Folder() + "/model.gguf");
  return 0;
}
