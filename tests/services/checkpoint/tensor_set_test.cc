// Which weight files of a folder are taken, and whether an index agrees with its shards.
#include "services/checkpoint/tensor_set.h"

#include <filesystem>

#include "tests/services/checkpoint/checkpoint_builder.h"
#include "tests/services/checkpoint/fails.h"
#include "tests/services/checkpoint/torch_builder.h"

namespace sluice::checkpoint {
namespace {

class IndexTest : public testing::Test {
 protected:
  void SetUp() override {
    dir_.Write("one.safetensors", SafetensorsFile({{"a", {"U8", {1}, "x"}}}));
    dir_.Write("two.safetensors",
               SafetensorsFile({{"b", {"U8", {1}, "y"}}, {"c", {"U8", {1}, "z"}}}));
  }

  absl::Status Open(const std::string& index) {
    dir_.Write("model.safetensors.index.json", index);
    absl::StatusOr<ModelDir> model = ModelDir::Open(dir_.path());
    return TensorSet::Open(*model).status();
  }

  TempDir dir_;
};

TEST_F(IndexTest, ReadsShards) {
  EXPECT_TRUE(Open(R"({"metadata":{},"weight_map":{"a":"one.safetensors","b":"two.safetensors",)"
                   R"("c":"two.safetensors"}})")
                  .ok());
}

// F15
TEST_F(IndexTest, MustAgreeWithItsShards) {
  EXPECT_TRUE(Invalid(Open(R"({"weight_map":{"a":"one.safetensors","b":"two.safetensors"}})"),
                      {"tensor c is not in the index"}));
  EXPECT_TRUE(Invalid(Open(R"({"weight_map":{"a":"one.safetensors","d":"one.safetensors"}})"),
                      {"tensor d is not in the file"}));
  EXPECT_TRUE(Fails(Open(R"({"weight_map":{"a":"one.safetensors","b":"gone.safetensors"}})"),
                    absl::StatusCode::kNotFound, {"gone.safetensors"}));
  dir_.Write("two.safetensors", SafetensorsFile({{"a", {"U8", {1}, "y"}}}));
  EXPECT_TRUE(Invalid(Open(R"({"weight_map":{"a":"one.safetensors","b":"two.safetensors"}})"),
                      {"tensor a is in another file"}));
}

// F14, F5
TEST_F(IndexTest, RefusesPathsAndDuplicates) {
  for (const char* name : {"../one.safetensors", "/etc/passwd", "", "..", "sub/one.safetensors",
                           "one.safetensors\\u0000x"}) {
    const std::string index = std::string(R"({"weight_map":{"a":")") + name + "\"}}";
    EXPECT_TRUE(Invalid(Open(index), {"one plain name"})) << name;
  }
  EXPECT_TRUE(Invalid(Open(R"({"weight_map":{"a":"one.safetensors","a":"two.safetensors"}})"),
                      {"appears twice"}));
  EXPECT_TRUE(Invalid(Open("{}"), {"weight_map"}));
  EXPECT_TRUE(Invalid(Open(R"({"weight_map":{"a":5}})"), {"weight_map"}));
}

class FolderTest : public testing::Test {
 protected:
  // A safetensors file of one tensor.
  static std::string Safetensors(const std::string& tensor) {
    return SafetensorsFile({{tensor, {"U8", {1}, "x"}}});
  }
  // A PyTorch file of one tensor.
  static std::string Bin(const std::string& tensor) {
    return TorchFile(Pickle(Dict({Text(tensor), PickledTensor().Code()})), {std::string(12, 'x')});
  }

  absl::Status Status() const { return TensorSet::Open(*ModelDir::Open(dir_.path())).status(); }
  // The name of the only tensor.
  std::string Taken() const {
    const auto set = TensorSet::Open(*ModelDir::Open(dir_.path()));
    return set.ok() ? set->tensors()[0].name : set.status().ToString();
  }

  TempDir dir_;
};

TEST_F(FolderTest, ListsWhatWasLookedForAndWhatIsThere) {
  EXPECT_TRUE(Fails(Status(), absl::StatusCode::kNotFound, {"the folder holds nothing"}));
  dir_.Write("config.json", "{}");
  dir_.Write("weights.pt", "x");
  EXPECT_TRUE(Fails(Status(), absl::StatusCode::kNotFound,
                    {"model.safetensors, model.safetensors.index.json, one other *.safetensors, "
                     "pytorch_model.bin, pytorch_model.bin.index.json, one other *.bin",
                     "the folder holds config.json, weights.pt"}));
}

// Each file that is added is preferred to those before.
TEST_F(FolderTest, PrefersSafetensorsAndUsualNames) {
  dir_.Write("gptq_model-4bit-128g.bin", Bin("other_bin"));
  EXPECT_EQ(Taken(), "other_bin");
  dir_.Write("pytorch_model-00001-of-00001.bin", Bin("indexed_bin"));
  dir_.Write("pytorch_model.bin.index.json",
             R"({"weight_map":{"indexed_bin":"pytorch_model-00001-of-00001.bin"}})");
  EXPECT_EQ(Taken(), "indexed_bin");
  dir_.Write("pytorch_model.bin", Bin("single_bin"));
  EXPECT_EQ(Taken(), "single_bin");
  dir_.Write("gptq_model-4bit-128g.safetensors", Safetensors("article"));
  EXPECT_EQ(Taken(), "article");
  dir_.Write("model-1.safetensors", Safetensors("indexed"));
  dir_.Write("model.safetensors.index.json", R"({"weight_map":{"indexed":"model-1.safetensors"}})");
  EXPECT_EQ(Taken(), "indexed");
  dir_.Write("model.safetensors", Safetensors("single"));
  EXPECT_EQ(Taken(), "single");
}

TEST_F(FolderTest, DoesNotChooseAmongSeveral) {
  dir_.Write("a.bin", Bin("a"));
  dir_.Write("b.bin", Bin("b"));
  EXPECT_TRUE(Invalid(Status(), {"several weight files", "a.bin, b.bin", "index.json"}));
  dir_.Write("c.safetensors", Safetensors("c"));
  dir_.Write("d.safetensors", Safetensors("d"));
  EXPECT_TRUE(Invalid(Status(), {"c.safetensors, d.safetensors", "model.safetensors.index.json"}));
}

TEST_F(FolderTest, DecidesByContentNotByName) {
  dir_.Write("model.safetensors", Bin("a"));
  EXPECT_TRUE(Invalid(Status(), {"model.safetensors", "header"}));
  std::filesystem::remove(dir_.path() + "/model.safetensors");
  dir_.Write("pytorch_model.bin", Safetensors("a"));
  EXPECT_TRUE(Invalid(Status(), {"pytorch_model.bin", "not a zip archive"}));
}

// F14, F15 for shards of PyTorch.
TEST_F(FolderTest, ChecksTheIndexOfPyTorchFiles) {
  dir_.Write("one.bin", Bin("a"));
  const auto index = [this](const std::string& text) {
    dir_.Write("pytorch_model.bin.index.json", text);
    return Status();
  };
  EXPECT_TRUE(index(R"({"weight_map":{"a":"one.bin"}})").ok());
  EXPECT_TRUE(Invalid(index(R"({"weight_map":{"a":"../one.bin"}})"), {"one plain name"}));
  EXPECT_TRUE(Invalid(index(R"({"weight_map":{"b":"one.bin"}})"), {"tensor b is not in the file"}));
  EXPECT_TRUE(Fails(index(R"({"weight_map":{"a":"two.bin"}})"), absl::StatusCode::kNotFound,
                    {"pytorch_model.bin.index.json", "two.bin"}));
}

}  // namespace
}  // namespace sluice::checkpoint
