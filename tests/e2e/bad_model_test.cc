// Bad models offered to real processes while a service runs and answers. A running service takes no
// other model: what can be offered one is a loader (or a whole service) that starts, and a loader
// that comes back. What must hold:
//   headers       the loader ends with code 1 and one line that names file, field and rule
//   values        the loader serves; the worker's fetch is refused by name, nothing serves, no
//                 process ends
//   tokenizer     the controller stays up, not ready, and names the file
//   the other     every answer of the running service is whole and right all the while
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <atomic>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <sstream>
#include <thread>

#include "tests/e2e/cluster.h"

namespace sluice::e2e {
namespace {

namespace fs = std::filesystem;

using ::testing::HasSubstr;

constexpr char kModel[] = "llama-gptq-v1-g128";

// A copy of the sound model with a tokenizer, in a folder that goes at the end.
class ModelCopy {
 public:
  ModelCopy() {
    std::string pattern = fs::temp_directory_path() / "sluice-bad-XXXXXX";
    path_ = mkdtemp(pattern.data());
    for (const auto& entry : fs::directory_iterator(CheckpointPath(kModel))) {
      fs::copy(entry.path(), path_);
    }
    fs::copy(fs::path(CheckpointPath("llama-fp16")) / "tokenizer.json", path_,
             fs::copy_options::skip_existing);
  }
  ~ModelCopy() {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
  }
  std::string At(const std::string& name) const { return path_ + "/" + name; }
  const std::string& path() const { return path_; }
  void Write(const std::string& name, const std::string& content) const {
    fs::remove(At(name));
    std::ofstream(At(name), std::ios::binary) << content;
  }
  std::string Read(const std::string& name) const {
    std::ostringstream content;
    content << std::ifstream(At(name), std::ios::binary).rdbuf();
    return content.str();
  }

 private:
  std::string path_;
};

struct BadModel {
  const char* name;
  std::function<void(const ModelCopy&)> spoil;
  std::vector<std::string> words;  // Of the loader's one error
};

std::vector<BadModel> BadModels() {
  const std::string weights = "model.safetensors";
  return {
      {"config.json is not JSON",
       [](const ModelCopy& m) { m.Write("config.json", "{"); },
       {"config.json", "broken JSON"}},
      {"10^9 layers",
       [](const ModelCopy& m) {
         m.Write("config.json", R"({"model_type":"llama","num_hidden_layers":1000000000})");
       },
       {"config.json", "num_hidden_layers"}},
      {"weights cut in the data",
       [=](const ModelCopy& m) {
         fs::resize_file(m.At(weights), fs::file_size(m.At(weights)) - 1);
       },
       {weights, "ends at byte"}},
      {"header of 2^63 bytes",
       [=](const ModelCopy& m) { m.Write(weights, std::string(7, '\0') + "\x80{}"); },
       {weights, "header of"}},
      {"weights a pipe",
       [=](const ModelCopy& m) {
         fs::remove(m.At(weights));
         mkfifo(m.At(weights).c_str(), 0600);
       },
       {weights, "not a regular file"}},
      {"weights a link to /dev/zero",
       [=](const ModelCopy& m) {
         fs::remove(m.At(weights));
         fs::create_symlink("/dev/zero", m.At(weights));
       },
       {weights, "link out of"}},
      {"an index that names /etc/passwd",
       [=](const ModelCopy& m) {
         fs::remove(m.At(weights));
         m.Write(weights + ".index.json", R"({"weight_map":{"a":"../../etc/passwd"}})");
       },
       {"index.json", "one plain name"}},
      {"a pickle that calls os.system",
       [=](const ModelCopy& m) {
         fs::remove(m.At(weights));
         m.Write("pytorch_model.bin",
                 "\x80\x02"
                 "cos\nsystem\n.");
       },
       {"pytorch_model.bin"}},
      {"no weights",
       [=](const ModelCopy& m) {
         fs::remove(m.At(weights));
         fs::remove(m.At("golden_logits.bin"));
       },
       {"no weights", "looked for"}},
  };
}

std::string LogOf(const std::string& path) {
  std::ostringstream content;
  content << std::ifstream(path).rdbuf();
  return content.str();
}

size_t Count(const std::string& text, const std::string& part) {
  size_t count = 0;
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++count;
  return count;
}

// Asks the service for the same answer again and again, and wants it whole and right each time.
class Client {
 public:
  explicit Client(const Cluster& cluster) : cluster_(cluster) {
    request_ = GreedyRequest(ReadGolden(kModel).prompt, 16);
    const Answer first = cluster_.Stream(request_);
    EXPECT_TRUE(first.status.ok()) << first.status.error_message();
    whole_ = first.ids;
    thread_ = std::thread([this] {
      while (!stop_) {
        const Answer answer = cluster_.Stream(request_);
        EXPECT_TRUE(answer.status.ok()) << answer.status.error_message();
        EXPECT_EQ(answer.ids, whole_);
        ++answers_;
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
      }
    });
  }
  ~Client() {
    stop_ = true;
    thread_.join();
  }
  int answers() const { return answers_; }

 private:
  const Cluster& cluster_;
  v1::StreamGenerateRequest request_;
  std::vector<uint32_t> whole_;
  std::atomic<bool> stop_ = false;
  std::atomic<int> answers_ = 0;
  std::thread thread_;
};

std::string Program(const std::string& name) { return std::string(SLUICE_BIN) + "/" + name; }

TEST(BadModelTest, ALoaderRefusesAndARunningServiceGoesOn) {
  Cluster cluster({.model = CheckpointPath(kModel)});
  ASSERT_TRUE(cluster.WaitReady()) << cluster.Logs();
  const Client client(cluster);
  cluster.loader().Kill();  // The worker has its weights: the service needs no loader to serve.
  for (const BadModel& bad : BadModels()) {
    SCOPED_TRACE(bad.name);
    const ModelCopy model;
    bad.spoil(model);
    const std::string log = model.At("loader.log");
    const int before = client.answers();
    Process loader({Program("sluice-loader"), "--model", model.path(), "--listen", "127.0.0.1:0"},
                   log);
    EXPECT_EQ(loader.Wait(60), 1) << LogOf(log);
    const std::string text = LogOf(log);
    EXPECT_EQ(Count(text, "loader_failed"), 1U) << text;
    EXPECT_EQ(Count(text, "\n"), 1U) << text;
    for (const std::string& word : bad.words) EXPECT_THAT(text, HasSubstr(word));
    while (client.answers() == before) std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  cluster.StartLoader();  // The sound one comes back.
  EXPECT_TRUE(cluster.WaitReady()) << cluster.Logs();
}

// Waits for a text in the logs of a cluster.
bool WaitForLog(const Cluster& cluster, const std::vector<std::string>& words) {
  for (int i = 0; i < 600; ++i) {
    const std::string logs = cluster.Logs();
    bool all = true;
    for (const std::string& word : words) all = all && logs.find(word) != std::string::npos;
    if (all) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  }
  return false;
}

TEST(BadModelTest, BadValuesAndTokenizersLeaveEveryProcessUp) {
  Cluster good({.model = CheckpointPath(kModel)});
  ASSERT_TRUE(good.WaitReady()) << good.Logs();
  const Client client(good);
  const auto spoilt_scale = [](const ModelCopy& m) {
    std::string file = m.Read("model.safetensors");
    uint64_t header = 0;
    std::memcpy(&header, file.data(), sizeof(header));
    const auto json = nlohmann::json::parse(file.substr(8, header));
    const uint64_t at = json["model.layers.0.mlp.down_proj.scales"]["data_offsets"][0];
    file[8 + header + at] = '\0';
    file[8 + header + at + 1] = '\x7E';  // NaN as float16
    m.Write("model.safetensors", file);
  };
  const struct {
    const char* name;
    std::function<void(const ModelCopy&)> spoil;
    std::vector<std::string> words;
  } kCases[] = {
      {"a scale that is not a number", spoilt_scale, {"down_proj", "scales[0]"}},
      {"a pattern that backtracks",
       [](const ModelCopy& m) {
         auto json = nlohmann::json::parse(m.Read("tokenizer.json"));
         json["pre_tokenizer"] = {{"type", "Split"}, {"pattern", {{"Regex", "(a+)+"}}}};
         m.Write("tokenizer.json", json.dump());
       },
       {"tokenizer.json", "regex"}},
      {"tokenizer.json is not JSON",
       [](const ModelCopy& m) { m.Write("tokenizer.json", "{"); },
       {"tokenizer.json", "not acceptable JSON"}},
  };
  for (const auto& bad : kCases) {
    SCOPED_TRACE(bad.name);
    const ModelCopy model;
    bad.spoil(model);
    Cluster cluster({.model = model.path()});
    EXPECT_TRUE(WaitForLog(cluster, bad.words)) << cluster.Logs();
    EXPECT_FALSE(cluster.WaitReady(1));
    EXPECT_TRUE(cluster.loader().running()) << cluster.Logs();
    EXPECT_TRUE(cluster.controller().running()) << cluster.Logs();
    EXPECT_TRUE(cluster.worker(0).running()) << cluster.Logs();
  }
  EXPECT_GT(client.answers(), 0);
}

}  // namespace
}  // namespace sluice::e2e
