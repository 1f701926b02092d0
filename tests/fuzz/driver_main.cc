// Runs a fuzz target without libFuzzer: every seed, every file of its folder of earlier findings,
// then mutations of the seeds from a fixed sequence. Ends with a line that says how many.
//
// usage: NAME_fuzz_run [MUTATIONS] [FINDINGS_FOLDER]
#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <random>
#include <sstream>

#include <unistd.h>

#include "tests/fuzz/fuzz_target.h"

namespace sluice::fuzz {
namespace {

constexpr unsigned kHangSeconds = 30;  // For one input
constexpr size_t kMaxBytes = 1 << 16;

std::string g_input;  // What runs now, for the handler of a crash

// Leaves the input behind, so that it can be run again.
void OnCrash(int signal) {
  std::ofstream("fuzz-crash.bin", std::ios::binary) << g_input;
  std::fprintf(stderr, "signal %d%s; the input is in fuzz-crash.bin\n", signal,
               signal == SIGALRM ? " (an input ran longer than 30 s)" : "");
  std::_Exit(1);
}

void Run(const std::string& input) {
  g_input = input;
  alarm(kHangSeconds);
  LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(input.data()), input.size());
}

class Mutator {
 public:
  explicit Mutator(std::vector<std::string> seeds) : seeds_(std::move(seeds)) {}

  std::string Next() {
    std::string input = Any();
    for (uint32_t i = Below(4) + 1; i > 0; --i) Change(&input);
    input.resize(std::min(input.size(), kMaxBytes));
    return input;
  }

 private:
  uint32_t Below(size_t limit) { return static_cast<uint32_t>(random_() % limit); }
  const std::string& Any() { return seeds_[Below(seeds_.size())]; }

  void Change(std::string* input) {
    if (input->empty()) *input = Any();
    if (input->empty()) return;
    // Headers come first: half of the changes go there.
    const size_t within = Below(2) == 0 ? std::min<size_t>(input->size(), 256) : input->size();
    const size_t at = Below(within);
    switch (Below(8)) {
      case 0:
        (*input)[at] ^= static_cast<char>(1 << Below(8));
        break;
      case 1:
        (*input)[at] = static_cast<char>(random_());
        break;
      case 2:
        input->resize(at);
        break;
      case 3:
        input->erase(at, Below(16) + 1);
        break;
      case 4:
        input->insert(at, input->substr(Below(input->size()), Below(32)));
        break;
      case 5:
        input->insert(at, 1, static_cast<char>(random_()));
        break;
      case 6: {
        static constexpr uint64_t kEdges[] = {0, 1, 0x7F, 0xFF, 0x7FFFFFFF, 0xFFFFFFFF, 1ULL << 63};
        const uint64_t edge = kEdges[Below(std::size(kEdges))];
        const size_t width = size_t{1} << Below(4);
        for (size_t i = 0; i < width && at + i < input->size(); ++i) {
          (*input)[at + i] = static_cast<char>(edge >> (8 * i));
        }
        break;
      }
      default: {
        const std::string& other = Any();
        if (!other.empty()) *input = input->substr(0, at) + other.substr(Below(other.size()));
        break;
      }
    }
  }

  const std::vector<std::string> seeds_;
  std::mt19937 random_{1};
};

std::vector<std::string> FilesIn(const std::string& folder) {
  std::vector<std::string> contents;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(folder, error)) {
    std::ostringstream content;
    content << std::ifstream(entry.path(), std::ios::binary).rdbuf();
    contents.push_back(content.str());
  }
  return contents;
}

int Main(int argc, char** argv) {
  for (const int signal : {SIGALRM, SIGABRT, SIGSEGV, SIGBUS, SIGFPE, SIGILL}) {
    std::signal(signal, OnCrash);
  }
  const long mutations = argc > 1 ? std::atol(argv[1]) : 1000;
  const std::vector<std::string> seeds = Seeds();
  const std::vector<std::string> findings =
      argc > 2 ? FilesIn(argv[2]) : std::vector<std::string>();
  for (const std::string& seed : seeds) Run(seed);
  for (const std::string& finding : findings) Run(finding);
  Mutator mutator(seeds);
  for (long i = 0; i < mutations; ++i) Run(mutator.Next());
  std::printf("%zu seeds, %zu earlier findings, %ld mutations: nothing found\n", seeds.size(),
              findings.size(), mutations);
  return 0;
}

}  // namespace
}  // namespace sluice::fuzz

int main(int argc, char** argv) { return sluice::fuzz::Main(argc, argv); }
