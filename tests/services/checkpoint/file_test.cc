#include "services/checkpoint/file.h"

#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>

#include "tests/services/checkpoint/checkpoint_builder.h"
#include "tests/services/checkpoint/fails.h"

namespace sluice::checkpoint {
namespace {

class FileTest : public testing::Test {
 protected:
  absl::Status Open(const std::string& name) {
    return ModelDir::Open(dir_.path())->OpenFile(name).status();
  }
  std::string Path(const std::string& name) const { return dir_.path() + "/" + name; }
  TempDir dir_;
  TempDir outside_;
};

TEST_F(FileTest, ReadsWithinBounds) {
  dir_.Write("f", "0123456789");
  const absl::StatusOr<ModelDir> dir = ModelDir::Open(dir_.path());
  const auto file = dir->OpenFile("f");
  ASSERT_TRUE(file.ok());
  char out[4] = {};
  EXPECT_TRUE((*file)->ReadAt(6, 4, out).ok());
  EXPECT_EQ(std::string(out, 4), "6789");
  EXPECT_TRUE(Invalid((*file)->ReadAt(7, 4, out), {"f", "outside"}));
  EXPECT_TRUE(Invalid((*file)->ReadAt(UINT64_MAX, 4, out), {"outside"}));
  EXPECT_TRUE(Invalid((*file)->ReadAt(4, UINT64_MAX, out), {"outside"}));
  EXPECT_TRUE(Invalid((*file)->ReadAll(9).status(), {"10 bytes"}));
  EXPECT_EQ(*(*file)->ReadAll(10), "0123456789");
}

TEST_F(FileTest, SeesAFileThatChanges) {
  dir_.Write("f", "0123456789");
  const auto file = ModelDir::Open(dir_.path())->OpenFile("f");
  char out[10];
  std::filesystem::resize_file(Path("f"), 5);
  EXPECT_TRUE(Fails((*file)->ReadAt(0, 10, out), absl::StatusCode::kDataLoss, {"shorter"}));
  EXPECT_TRUE(Fails((*file)->ReadAt(0, 5, out), absl::StatusCode::kDataLoss, {"changed"}));
}

// F14: nothing but regular files of the folder is opened.
TEST_F(FileTest, RefusesEverythingButRegularFiles) {
  outside_.Write("secret", "x");
  std::filesystem::create_symlink(outside_.path() + "/secret", Path("link_out"));
  std::filesystem::create_symlink("/dev/zero", Path("link_device"));
  std::filesystem::create_symlink("nowhere", Path("link_dead"));
  std::filesystem::create_directory(Path("folder"));
  ASSERT_EQ(mkfifo(Path("pipe").c_str(), 0600), 0);
  EXPECT_TRUE(Invalid(Open("link_out"), {"link out of the model's folder"}));
  EXPECT_TRUE(Invalid(Open("link_device"), {"link_device"}));
  EXPECT_TRUE(Invalid(Open("link_dead"), {"link_dead", "leads to nothing"}));
  EXPECT_TRUE(Invalid(Open("folder"), {"not a regular file"}));
  EXPECT_TRUE(Invalid(Open("pipe"), {"not a regular file"}));
  EXPECT_TRUE(Fails(Open("gone"), absl::StatusCode::kNotFound, {"gone"}));
  for (const std::string& name :
       {std::string("../x"), std::string("/etc/passwd"), std::string("."), std::string(".."),
        std::string(), std::string("a\0b", 3), std::string(300, 'a')}) {
    EXPECT_TRUE(Invalid(Open(name), {"one plain name"})) << name;
  }
}

TEST_F(FileTest, FollowsLinksWithinTheFolder) {
  dir_.Write("real", "x");
  std::filesystem::create_symlink("real", Path("link"));
  EXPECT_TRUE(Open("link").ok());
}

TEST_F(FileTest, FollowsLinksOfAHubCache) {
  const std::string snapshot = Path("models--org--name/snapshots/0123");
  std::filesystem::create_directories(snapshot);
  std::filesystem::create_directories(Path("models--org--name/blobs"));
  dir_.Write("models--org--name/blobs/etag", "x");
  dir_.Write("other", "x");
  std::filesystem::create_symlink("../../blobs/etag", snapshot + "/config.json");
  std::filesystem::create_symlink("../../../other", snapshot + "/bad");
  const absl::StatusOr<ModelDir> dir = ModelDir::Open(snapshot);
  EXPECT_TRUE(dir->OpenFile("config.json").ok());
  EXPECT_TRUE(Invalid(dir->OpenFile("bad").status(), {"link out"}));
}

TEST_F(FileTest, NamesLfsPointers) {
  dir_.Write("tokenizer.json", "version https://git-lfs.github.com/spec/v1\n");
  const absl::StatusOr<ModelDir> dir = ModelDir::Open(dir_.path());
  EXPECT_TRUE(Invalid((*dir->OpenFile("tokenizer.json"))->ReadAll(100).status(), {"git lfs pull"}));
}

}  // namespace
}  // namespace sluice::checkpoint
