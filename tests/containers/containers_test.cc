// The same tensors in every container that people have them in: one safetensors file, several with
// an index, PyTorch's .bin, one or several, and a Hugging Face cache. The model computes the same
// logits, bit for bit. The checkpoints are those that the real libraries wrote, as they lie in
// tests/testdata (safetensors, and .bin files that torch wrote) and repacked here.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/core/check.h"
#include "services/checkpoint/checkpoint.h"
#include "services/checkpoint/tensor_set.h"
#include "tests/services/checkpoint/checkpoint_builder.h"
#include "tests/services/checkpoint/torch_builder.h"
#include "tests/support/backend_tensors.h"
#include "tests/worker/engine/golden.h"

namespace sluice {
namespace {

namespace fs = std::filesystem;

using checkpoint::Checkpoint;
using checkpoint::ModelDir;
using checkpoint::TempDir;
using checkpoint::TensorMap;
using checkpoint::TensorSet;
using worker::Golden;

constexpr size_t kShards = 3;
const std::string kCommit(40, 'c');

TensorSet OpenSet(const std::string& folder) {
  const auto dir = ModelDir::Open(folder);
  SLUICE_CHECK(dir.ok()) << dir.status();
  auto set = TensorSet::Open(*dir);
  SLUICE_CHECK(set.ok()) << set.status();
  return *std::move(set);
}

// Everything but the weights.
void CopyConfigs(const fs::path& from, const std::string& to) {
  for (const auto& entry : fs::directory_iterator(from)) {
    const std::string name = entry.path().filename().string();
    if (name.ends_with("config.json")) fs::copy(entry.path(), to);
  }
}

// The tensors of `set`, dealt out to `parts` maps in turn.
std::vector<TensorMap> Deal(const TensorSet& set, size_t parts) {
  std::vector<TensorMap> dealt(parts);
  size_t next = 0;
  for (const checkpoint::StoredTensor& tensor : set.tensors()) {
    std::string data(tensor.bytes, '\0');
    const absl::Status status = tensor.file->ReadAt(tensor.offset, tensor.bytes, data.data());
    SLUICE_CHECK(status.ok()) << status;
    dealt[next++ % parts][tensor.name] = {tensor.dtype.name, tensor.shape, std::move(data)};
  }
  return dealt;
}

// As torch would save these tensors.
std::string TorchBin(const TensorMap& tensors) {
  const TempDir dir;
  dir.Write("model.safetensors", checkpoint::SafetensorsFile(tensors));
  return checkpoint::TorchFile(OpenSet(dir.path()));
}

std::string SafetensorsBin(const TensorMap& tensors) {
  return checkpoint::SafetensorsFile(tensors);
}

// PREFIX-00001-of-00003.SUFFIX and so on, and INDEX.
void WriteShards(const TensorSet& set, const std::string& prefix, const std::string& suffix,
                 const std::function<std::string(const TensorMap&)>& file, const TempDir& to) {
  nlohmann::json index = {{"metadata", {{"total_size", 0}}}};
  const std::vector<TensorMap> shards = Deal(set, kShards);
  for (size_t i = 0; i < shards.size(); ++i) {
    const std::string name = absl::StrCat(prefix, "-0000", i + 1, "-of-0000", kShards, suffix);
    to.Write(name, file(shards[i]));
    for (const auto& [tensor, built] : shards[i]) index["weight_map"][tensor] = name;
  }
  to.Write(absl::StrCat(prefix, suffix, ".index.json"), index.dump());
}

// models--org--name with blobs, a snapshot of links to them, and the branch main.
void WriteCache(const std::string& folder, const TempDir& to) {
  const fs::path model = fs::path(to.path()) / "models--org--name";
  const fs::path snapshot = model / "snapshots" / kCommit;
  fs::create_directories(snapshot);
  fs::create_directories(model / "blobs");
  fs::create_directories(model / "refs");
  int blob = 0;
  for (const auto& entry : fs::directory_iterator(folder)) {
    if (!entry.is_regular_file()) continue;
    const std::string name = absl::StrCat("blob", ++blob);
    fs::copy(entry.path(), model / "blobs" / name);
    fs::create_symlink(fs::path("../../blobs") / name, snapshot / entry.path().filename());
  }
  to.Write("models--org--name/refs/main", kCommit);
}

worker::Outcome RunModel(const std::string& model, const std::string& revision,
                         const Golden& golden) {
  const auto source = Checkpoint::Open(model, revision);
  SLUICE_CHECK(source.ok()) << source.status();
  const uint32_t stages = std::min(2u, (*source)->description().config().num_layers());
  return worker::RunGolden(**source, golden, stages, /*chunk=*/40);
}

// Runs the containers of one checkpoint, whose safetensors lie in `folder`.
class Containers {
 public:
  Containers(const std::string& folder, Golden golden)
      : golden_(std::move(golden)), expected_(RunModel(folder, "", golden_)) {}

  const worker::Outcome& expected() const { return expected_; }

  void ExpectSame(const std::string& model, const std::string& revision = "") const {
    const worker::Outcome other = RunModel(model, revision, golden_);
    ASSERT_EQ(other.logits.size(), expected_.logits.size());
    for (size_t i = 0; i < expected_.logits.size(); ++i) {
      EXPECT_TRUE(SameBits(other.logits[i], expected_.logits[i])) << "position " << i;
    }
    EXPECT_EQ(other.sampled, expected_.sampled);
  }

 private:
  const Golden golden_;
  const worker::Outcome expected_;
};

// The first greedy ids suffice: every weight is used at each.
Golden Shortened(Golden golden) {
  golden.greedy_ids.resize(std::min<size_t>(golden.greedy_ids.size(), 4));
  return golden;
}

class ContainersTest : public testing::TestWithParam<std::string> {};

TEST_P(ContainersTest, GiveEqualLogits) {
  const std::string folder = (worker::CheckpointFolder() / GetParam()).string();
  const Containers containers(folder, Shortened(worker::ReadGolden(folder)));
  ASSERT_FALSE(containers.expected().logits.empty());
  const TensorSet set = OpenSet(folder);
  struct Kind {
    const char* what;
    std::function<void(const TempDir&)> write;
  };
  const Kind kinds[] = {
      {"single safetensors",
       [&](const TempDir& dir) {
         dir.Write("model.safetensors", SafetensorsBin(Deal(set, 1)[0]));
       }},
      {"sharded safetensors",
       [&](const TempDir& dir) { WriteShards(set, "model", ".safetensors", SafetensorsBin, dir); }},
      {"single .bin",
       [&](const TempDir& dir) { dir.Write("pytorch_model.bin", TorchBin(Deal(set, 1)[0])); }},
      {"sharded .bin",
       [&](const TempDir& dir) { WriteShards(set, "pytorch_model", ".bin", TorchBin, dir); }},
  };
  for (const Kind& kind : kinds) {
    SCOPED_TRACE(kind.what);
    const TempDir dir;
    CopyConfigs(folder, dir.path());
    kind.write(dir);
    containers.ExpectSame(dir.path());
    const TempDir cache;
    WriteCache(dir.path(), cache);
    ASSERT_EQ(setenv("HF_HUB_CACHE", cache.path().c_str(), 1), 0);
    SCOPED_TRACE("in the cache");
    containers.ExpectSame("org/name", "main");
  }
}

// A check that cannot fail is none: one weight that differs by a bit is seen.
TEST_P(ContainersTest, OneBitIsSeen) {
  const std::string folder = (worker::CheckpointFolder() / GetParam()).string();
  const Golden golden = Shortened(worker::ReadGolden(folder));
  const Containers containers(folder, golden);
  TensorMap tensors = Deal(OpenSet(folder), 1)[0];
  const auto norm = std::find_if(tensors.begin(), tensors.end(), [](const auto& entry) {
    return entry.first.find("norm.weight") != entry.first.npos;
  });
  ASSERT_NE(norm, tensors.end());
  norm->second.data[0] = static_cast<char>(norm->second.data[0] ^ 1);
  norm->second.data[1] = static_cast<char>(norm->second.data[1] ^ 1);
  const TempDir dir;
  CopyConfigs(folder, dir.path());
  dir.Write("model.safetensors", checkpoint::SafetensorsFile(tensors));
  EXPECT_NE(RunModel(dir.path(), "", golden).logits, containers.expected().logits);
}

std::string TestName(const testing::TestParamInfo<std::string>& info) {
  std::string name = info.param;
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
}

INSTANTIATE_TEST_SUITE_P(Checkpoints, ContainersTest, testing::ValuesIn(worker::CheckpointNames()),
                         TestName);

TEST(ContainersDataTest, IsThere) { EXPECT_GE(worker::CheckpointNames().size(), 20u); }

// Files that torch.save and save_pretrained of the real library wrote.
TEST(TorchFilesTest, GiveEqualLogits) {
  const fs::path data = fs::path(SLUICE_TESTDATA) / "torch_bin";
  Golden golden;
  golden.prompt_ids = {3, 1, 4, 1, 5, 9, 2, 6};
  golden.greedy_ids = {5, 3, 5, 8};
  golden.max_model_len = 32;
  for (const char* files : {"llama/single", "llama/sharded", "opt/single"}) {
    SCOPED_TRACE(files);
    const fs::path folder = data / fs::path(files).parent_path();
    const TempDir dir;
    CopyConfigs(folder, dir.path());
    for (const auto& entry : fs::directory_iterator(data / files)) fs::copy(entry, dir.path());
    const Containers containers(folder.string(), golden);
    containers.ExpectSame(dir.path());
    const TempDir cache;
    WriteCache(dir.path(), cache);
    ASSERT_EQ(setenv("HF_HUB_CACHE", cache.path().c_str(), 1), 0);
    containers.ExpectSame("org/name", kCommit);
  }
}

}  // namespace
}  // namespace sluice
