// PyTorch files that torch itself wrote (tests/testdata/torch_bin), and the checkpoints of
// tests/testdata written anew as such files: the same tensors come out as from safetensors.
#include "services/checkpoint/torch_bin.h"

#include <algorithm>
#include <cstring>
#include <filesystem>

#include "tests/services/checkpoint/checkpoint_builder.h"
#include "tests/services/checkpoint/fails.h"
#include "tests/services/checkpoint/torch_builder.h"

namespace sluice::checkpoint {
namespace {

namespace fs = std::filesystem;

const fs::path kData = fs::path(SLUICE_TESTDATA) / "torch_bin";

void CopyFiles(const fs::path& from, const std::string& suffix, const TempDir& to) {
  for (const auto& entry : fs::directory_iterator(from)) {
    if (entry.is_regular_file() && entry.path().string().ends_with(suffix)) {
      fs::copy(entry.path(), to.path());
    }
  }
}

// Every canonical tensor, byte by byte.
void ExpectSame(const std::string& left, const std::string& right) {
  const auto a = Checkpoint::Open(left), b = Checkpoint::Open(right);
  ASSERT_TRUE(a.ok()) << a.status();
  ASSERT_TRUE(b.ok()) << b.status();
  const auto& tensors = (*a)->description().tensors();
  ASSERT_GT(tensors.size(), 5);
  ASSERT_EQ(tensors.size(), (*b)->description().tensors_size());
  EXPECT_NE((*a)->description().model_digest(), (*b)->description().model_digest());
  for (int i = 0; i < tensors.size(); ++i) {
    EXPECT_EQ(tensors[i].SerializeAsString(), (*b)->description().tensors(i).SerializeAsString());
    const auto one = (*a)->Read(i), other = (*b)->Read(i);
    ASSERT_TRUE(one.ok() && other.ok()) << one.status() << other.status();
    ASSERT_EQ(one->planes.size(), other->planes.size());
    EXPECT_EQ(std::memcmp(one->planes.data(), other->planes.data(), one->planes.size()), 0)
        << tensors[i].name();
  }
}

TEST(TorchBinTest, FilesOfTorchGiveTheTensorsOfSafetensors) {
  for (const char* files : {"llama/single", "llama/sharded", "opt/single"}) {
    SCOPED_TRACE(files);
    const fs::path folder = kData / fs::path(files).parent_path();
    const TempDir dir;
    CopyFiles(folder, "config.json", dir);
    CopyFiles(kData / files, "", dir);
    ExpectSame(folder.string(), dir.path());
  }
}

TEST(TorchBinTest, EveryFormatGoesThroughIt) {
  int checkpoints = 0;
  for (const auto& entry : fs::directory_iterator(fs::path(SLUICE_TESTDATA) / "checkpoints")) {
    if (!fs::exists(entry.path() / "config.json")) continue;
    SCOPED_TRACE(entry.path().filename());
    const auto set = TensorSet::Open(*ModelDir::Open(entry.path().string()));
    ASSERT_TRUE(set.ok()) << set.status();
    const TempDir dir;
    for (const auto& file : fs::directory_iterator(entry.path())) {
      if (file.path().string().ends_with("config.json")) fs::copy(file.path(), dir.path());
    }
    dir.Write("pytorch_model.bin", TorchFile(*set));
    ExpectSame(entry.path().string(), dir.path());
    ++checkpoints;
  }
  EXPECT_GT(checkpoints, 20);
}

class KindsTest : public testing::Test {
 protected:
  void SetUp() override {
    absl::StatusOr<ModelDir> dir = ModelDir::Open(kData.string());
    auto file = dir->OpenFile("kinds.bin");
    ASSERT_TRUE(file.ok());
    file_ = *std::move(file);
    absl::StatusOr<TensorFile> found = ReadTorchBin(*file_);
    ASSERT_TRUE(found.ok()) << found.status();
    found_ = *std::move(found);
  }

  const StoredTensor& Named(const std::string& name) const {
    for (const StoredTensor& tensor : found_.tensors) {
      if (tensor.name == name) return tensor;
    }
    ADD_FAILURE() << name;
    return found_.tensors[0];
  }

  std::unique_ptr<File> file_;
  TensorFile found_;
};

TEST_F(KindsTest, ViewsShareAStorage) {
  const StoredTensor& base = Named("base");
  EXPECT_EQ(base.bytes, 96U);
  EXPECT_EQ(Named("again").offset, base.offset);
  EXPECT_EQ(Named("view").offset, base.offset + 4 * sizeof(float));
  EXPECT_EQ(Named("view").shape, (Shape{3, 4}));
  EXPECT_EQ(Named("row").offset, base.offset + 12 * sizeof(float));
  EXPECT_EQ(Named("column_of_one").shape, (Shape{1, 3}));
  float values[6];
  ASSERT_TRUE(file_->ReadAt(Named("row").offset, sizeof(values), values).ok());
  EXPECT_EQ(values[5], 17);
}

TEST_F(KindsTest, EveryTypeHasItsSize) {
  const std::vector<std::tuple<const char*, const char*, uint64_t>> kinds = {
      {"torch.float16", "F16", 2}, {"torch.bfloat16", "BF16", 2}, {"torch.float64", "F64", 8},
      {"torch.int64", "I64", 8},   {"torch.int32", "I32", 4},     {"torch.int16", "I16", 2},
      {"torch.int8", "I8", 1},     {"torch.uint8", "U8", 1},      {"torch.bool", "BOOL", 1}};
  for (const auto& [name, dtype, width] : kinds) {
    EXPECT_EQ(Named(name).dtype.name, dtype);
    EXPECT_EQ(Named(name).bytes, 6 * width);
  }
  EXPECT_EQ(Named("parameter").shape, (Shape{2, 3}));
  EXPECT_EQ(Named("scalar").shape, Shape());
  EXPECT_EQ(Named("empty").bytes, 0U);
}

TEST(TorchBinTest, NamesATensorThatLiesInPieces) {
  const absl::StatusOr<ModelDir> dir = ModelDir::Open(kData.string());
  EXPECT_TRUE(Unsupported(ReadTorchBin(**dir->OpenFile("strided.bin")).status(),
                          {"strided.bin", "tensor t", "one piece", "contiguous"}));
}

TEST(TorchBinTest, EveryTruncationIsRefused) {
  const TempDir dir;
  const std::string whole =
      TorchFile(Pickle(Dict({Text("a"), PickledTensor().Code()})), {std::string(12, '\1')});
  const absl::StatusOr<ModelDir> model = ModelDir::Open(dir.path());
  dir.Write("pytorch_model.bin", whole);
  ASSERT_TRUE(TensorSet::Open(*model).ok()) << TensorSet::Open(*model).status();
  for (size_t size = 0; size < whole.size(); ++size) {
    dir.Write("pytorch_model.bin", whole.substr(0, size));
    EXPECT_TRUE(Invalid(TensorSet::Open(*model).status(), {"pytorch_model.bin"})) << size;
  }
}

TEST(TorchBinTest, NoFlippedBitCrashes) {
  const TempDir dir;
  const std::string whole =
      TorchFile(Pickle(Dict({Text("a"), PickledTensor().Code()})), {std::string(12, '\1')});
  const absl::StatusOr<ModelDir> model = ModelDir::Open(dir.path());
  dir.Write("pytorch_model.bin", whole);
  int refused = 0;
  for (size_t bit = 0; bit < whole.size() * 8; ++bit) {
    if (bit % 8 == 0 && bit > 0)
      dir.Overwrite("pytorch_model.bin", bit / 8 - 1, whole[bit / 8 - 1]);
    dir.Overwrite("pytorch_model.bin", bit / 8, static_cast<char>(whole[bit / 8] ^ (1 << bit % 8)));
    const absl::StatusOr<TensorSet> set = TensorSet::Open(*model);
    refused += set.ok() ? 0 : 1;
    for (const StoredTensor& tensor : set.ok() ? set->tensors() : std::vector<StoredTensor>()) {
      EXPECT_LE(tensor.offset + tensor.bytes, whole.size());
    }
  }
  EXPECT_GT(refused, 3000);
}

}  // namespace
}  // namespace sluice::checkpoint
