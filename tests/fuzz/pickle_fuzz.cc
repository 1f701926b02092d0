// data.pkl alone, then inside of a sound archive with one storage of 12 bytes.
#include "services/checkpoint/pickle.h"

#include "services/checkpoint/torch_bin.h"
#include "tests/fuzz/fuzz_target.h"
#include "tests/services/checkpoint/torch_builder.h"

namespace sluice::fuzz {

std::vector<std::string> Seeds() {
  using namespace checkpoint;  // NOLINT(google-build-using-namespace)
  const std::string tensor = PickledTensor().Code();
  const std::string parameter =
      Global("torch._utils", "_rebuild_parameter") +
      Tuple({tensor, "\x88", Global("collections", "OrderedDict") + ")R"}) + "R";
  return {Pickle(Dict({Text("a"), tensor})),
          Pickle(Dict({Text("a"), tensor, Text("b"), parameter})),
          Pickle(Global("collections", "OrderedDict") + ")R}b"), Pickle("}q\x01h\x01\x86"),
          Pickle("](K\x01M\x01\x02J\x01\x02\x03\x04U\x01xNe")};
}

}  // namespace sluice::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace sluice;  // NOLINT(google-build-using-namespace)
  const std::string pickle(reinterpret_cast<const char*>(data), size);
  if (!checkpoint::ReadPickle(pickle, "data.pkl").ok()) return 0;
  const std::string archive = checkpoint::TorchFile(pickle, {std::string(12, '\1')});
  const auto file = fuzz::FileOf(reinterpret_cast<const uint8_t*>(archive.data()), archive.size(),
                                 "pytorch_model.bin");
  (void)checkpoint::ReadTorchBin(*file);
  return 0;
}
