// With SLUICE_WRITE_SEEDS=FOLDER a libFuzzer program writes its seeds there and ends.
#include <cstdlib>
#include <fstream>

#include "tests/fuzz/fuzz_target.h"

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  const char* const folder = std::getenv("SLUICE_WRITE_SEEDS");
  if (folder == nullptr) return 0;
  int number = 0;
  for (const std::string& seed : sluice::fuzz::Seeds()) {
    std::ofstream(std::string(folder) + "/seed-" + std::to_string(number++), std::ios::binary)
        << seed;
  }
  std::exit(0);
}
