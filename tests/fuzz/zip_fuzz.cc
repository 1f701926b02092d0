// A PyTorch file: the zip archive, and when that is sound the pickle and the tensors in it.
#include "services/checkpoint/zip.h"

#include "services/checkpoint/torch_bin.h"
#include "tests/fuzz/fuzz_target.h"
#include "tests/services/checkpoint/torch_builder.h"

namespace sluice::fuzz {

std::vector<std::string> Seeds() {
  using namespace checkpoint;  // NOLINT(google-build-using-namespace)
  const std::string storage(12, '\1');
  const std::string pickle = Pickle(Dict({Text("a"), PickledTensor().Code()}));
  const std::vector<ZipEntry> entries = {{"m/data.pkl", pickle}, {"m/data/0", storage}};
  return {TorchFile(pickle, {storage}), ZipFile(entries), Zip64File(entries, 2),
          Testdata("torch_bin/kinds.bin")};
}

}  // namespace sluice::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace sluice;  // NOLINT(google-build-using-namespace)
  const auto file = fuzz::FileOf(data, size, "pytorch_model.bin");
  if (!checkpoint::ReadZipDirectory(*file).ok()) return 0;
  (void)checkpoint::ReadTorchBin(*file);
  return 0;
}
