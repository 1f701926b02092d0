#include "tests/bad_files/bad_file.h"

#include <unistd.h>

#include <csignal>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <sstream>

#include "tests/bad_files/heap_meter.h"

namespace sluice::bad_files {
namespace {

constexpr int64_t kMostBytes = 64 << 20;
constexpr unsigned kHangSeconds = 30;
constexpr int kLeastCases = 400;

char g_case[256];  // For the handler.

void OnHang(int) {
  const char text[] = "hangs: ";
  (void)!write(STDERR_FILENO, text, sizeof(text) - 1);
  (void)!write(STDERR_FILENO, g_case, strlen(g_case));
  _exit(1);
}

// Counts, by container and rule; at the end it prints them and wants enough of them.
class Totals : public testing::Environment {
 public:
  static Totals& Get() {
    static auto* const totals = static_cast<Totals*>(testing::AddGlobalTestEnvironment(new Totals));
    return *totals;
  }
  void Add(const std::string& container, const std::string& rule) {
    ++counts_[container][rule];
    ++total_;
  }
  void AddPeak(int64_t bytes, const std::string& name) {
    if (bytes <= peak_) return;
    peak_ = bytes;
    peak_name_ = name;
  }

  void TearDown() override {
    for (const auto& [container, rules] : counts_) {
      int sum = 0;
      std::string text;
      for (const auto& [rule, count] : rules) {
        sum += count;
        text += " " + rule + ":" + std::to_string(count);
      }
      std::printf("%-18s %4d %s\n", container.c_str(), sum, text.c_str());
    }
    std::printf("%d bad files; most memory %.1f MiB (%s)\n", total_,
                static_cast<double>(peak_) / (1 << 20), peak_name_.c_str());
    if (testing::GTEST_FLAG(filter) == "*") {
      EXPECT_GE(total_, kLeastCases);
    }
  }

 private:
  std::map<std::string, std::map<std::string, int>> counts_;
  int total_ = 0;
  int64_t peak_ = 0;
  std::string peak_name_;
};

// One line with a way out: what to do after "; ", or the rule itself says what a value must be.
bool HasWayOut(const std::string& message) {
  return message.find("; ") != std::string::npos && message.find('\n') == std::string::npos &&
         message.size() < 4096;
}

void ExpectRefused(const std::string& container, const BadFile& bad, const Open& open) {
  const std::string name = container + ", " + bad.rule + ": " + bad.name;
  SCOPED_TRACE(name);
  std::strncpy(g_case, name.c_str(), sizeof(g_case) - 1);
  const TempDir dir;
  bad.write(dir);
  std::signal(SIGALRM, OnHang);
  alarm(kHangSeconds);
  const HeapMeter meter;
  const absl::Status status = open(dir.path());
  const int64_t peak = meter.peak_bytes(), read = meter.read_bytes();
  alarm(0);
  EXPECT_TRUE(checkpoint::Fails(status, bad.code, bad.words));
  EXPECT_TRUE(HasWayOut(std::string(status.message()))) << status;
  EXPECT_LE(peak, kMostBytes);
  EXPECT_LE(read, kMostBytes);
  Totals::Get().Add(container, bad.rule);
  Totals::Get().AddPeak(peak, name);
}

absl::Status OpenAt(const std::string& path) {
  const auto checkpoint = checkpoint::Checkpoint::Open(path);
  if (!checkpoint.ok()) return checkpoint.status();
  for (int i = 0; i < (*checkpoint)->description().tensors_size(); ++i) {
    if (const auto matrix = (*checkpoint)->Read(i); !matrix.ok()) return matrix.status();
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status OpenModel(const std::string& folder) { return OpenAt(folder); }
absl::Status OpenGguf(const std::string& folder) { return OpenAt(folder + "/model.gguf"); }

absl::Status OpenTokenizer(const std::string& folder) {
  text::TokenizerFiles files;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    std::ostringstream content;
    content << std::ifstream(entry.path(), std::ios::binary).rdbuf();
    files[entry.path().filename()] = content.str();
  }
  const auto tokenizer = text::Tokenizer::Load(files);
  if (!tokenizer.ok()) return tokenizer.status();
  const std::vector<text::Tokenizer::ChatMessage> messages = {{"user", "ab"}, {"x", "a"}};
  return (*tokenizer)->ApplyChatTemplate(messages, true).status();
}

void ExpectRefused(const char* container, const std::vector<BadFile>& cases, const Open& open) {
  for (const BadFile& bad : cases) ExpectRefused(std::string(container), bad, open);
}

std::string Copies(size_t count, const std::string& text) {
  std::string out;
  out.reserve(count * text.size());
  for (size_t i = 0; i < count; ++i) out += text;
  return out;
}

std::function<void(const TempDir&)> File(const std::string& name, const std::string& content) {
  return [=](const TempDir& dir) { dir.Write(name, content); };
}

// Environments must be known before the tests run.
const Totals& g_totals = Totals::Get();

}  // namespace sluice::bad_files
