// Models by name, in a cache folder that the test makes.
#include "services/checkpoint/hf_cache.h"

#include <cstdlib>
#include <filesystem>

#include "tests/services/checkpoint/checkpoint_builder.h"
#include "tests/services/checkpoint/fails.h"

namespace sluice::checkpoint {
namespace {

namespace fs = std::filesystem;

const std::string kFirst(40, '1'), kSecond(40, '2');

class HfCacheTest : public testing::Test {
 protected:
  void SetUp() override {
    for (const char* name : {"HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"}) unsetenv(name);
    Set("HF_HUB_CACHE", dir_.path());
    Ref("main", kFirst);
    Ref("v1.0", kSecond);
    Ref("refs/pr/1", kSecond);
    for (const std::string& commit : {kFirst, kSecond}) fs::create_directories(Snapshot(commit));
  }

  static void Set(const char* name, const std::string& value) { setenv(name, value.c_str(), 1); }
  std::string Model() const { return dir_.path() + "/models--facebook--opt-tiny"; }
  std::string Snapshot(const std::string& commit) const { return Model() + "/snapshots/" + commit; }
  void Ref(const std::string& name, const std::string& content) const {
    const std::string path = "models--facebook--opt-tiny/refs/" + name;
    fs::create_directories(fs::path(dir_.path() + "/" + path).parent_path());
    dir_.Write(path, content);
  }
  static std::string Resolved(const std::string& model, const std::string& revision) {
    const absl::StatusOr<std::string> path = ResolveModel(model, revision);
    return path.ok() ? *path : path.status().ToString();
  }

  TempDir dir_;
};

TEST_F(HfCacheTest, FindsBranchTagAndCommit) {
  EXPECT_EQ(Resolved("facebook/opt-tiny", ""), Snapshot(kFirst));
  EXPECT_EQ(Resolved("facebook/opt-tiny", "main"), Snapshot(kFirst));
  EXPECT_EQ(Resolved("facebook/opt-tiny", "v1.0"), Snapshot(kSecond));
  EXPECT_EQ(Resolved("facebook/opt-tiny", "refs/pr/1"), Snapshot(kSecond));
  EXPECT_EQ(Resolved("facebook/opt-tiny", kSecond), Snapshot(kSecond));
  Ref("main", kSecond + "\n");
  EXPECT_EQ(Resolved("facebook/opt-tiny", ""), Snapshot(kSecond));
}

TEST_F(HfCacheTest, LooksWhereHuggingFaceDoes) {
  const std::string found = Snapshot(kFirst);
  const TempDir home;
  fs::create_directories(home.path() + "/huggingface");
  fs::create_directory_symlink(dir_.path(), home.path() + "/hub");
  fs::create_directory_symlink(dir_.path(), home.path() + "/huggingface/hub");
  fs::create_directory_symlink(home.path(), home.path() + "/.cache");
  unsetenv("HF_HUB_CACHE");
  const std::string tail = "/models--facebook--opt-tiny/snapshots/" + kFirst;
  Set("HOME", home.path());
  EXPECT_EQ(Resolved("facebook/opt-tiny", ""), home.path() + "/.cache/huggingface/hub" + tail);
  Set("XDG_CACHE_HOME", home.path());
  EXPECT_EQ(Resolved("facebook/opt-tiny", ""), home.path() + "/huggingface/hub" + tail);
  Set("HF_HOME", home.path());
  EXPECT_EQ(Resolved("facebook/opt-tiny", ""), home.path() + "/hub" + tail);
  Set("HUGGINGFACE_HUB_CACHE", dir_.path());
  EXPECT_EQ(Resolved("facebook/opt-tiny", ""), found);
}

TEST_F(HfCacheTest, AWrongNameListsTheModels) {
  fs::create_directory(dir_.path() + "/models--gpt2");
  fs::create_directory(dir_.path() + "/datasets--a--b");
  EXPECT_TRUE(Fails(ResolveModel("facebook/opt-tinny", "").status(), absl::StatusCode::kNotFound,
                    {"facebook/opt-tinny", dir_.path(), "holds facebook/opt-tiny, gpt2;",
                     "hf download facebook/opt-tinny"}));
  Set("HF_HUB_CACHE", dir_.path() + "/gone");
  EXPECT_TRUE(Fails(ResolveModel("facebook/opt-tiny", "").status(), absl::StatusCode::kNotFound,
                    {"/gone", "holds nothing"}));
}

TEST_F(HfCacheTest, AWrongRevisionListsTheRevisions) {
  EXPECT_TRUE(Fails(
      ResolveModel("facebook/opt-tiny", "dev").status(), absl::StatusCode::kNotFound,
      {"revision dev", "main, refs/pr/1, v1.0, " + kFirst + ", " + kSecond, "--revision dev"}));
  EXPECT_TRUE(Fails(ResolveModel("facebook/opt-tiny", std::string(40, '3')).status(),
                    absl::StatusCode::kNotFound, {"main, "}));
  fs::remove_all(Snapshot(kFirst));  // A download that did not end.
  EXPECT_TRUE(Fails(ResolveModel("facebook/opt-tiny", "").status(), absl::StatusCode::kNotFound,
                    {"revision main", kSecond}));
}

TEST_F(HfCacheTest, AnExistingPathWins) {
  EXPECT_EQ(Resolved(dir_.path(), ""), dir_.path());
  EXPECT_TRUE(Invalid(ResolveModel(dir_.path(), "main").status(), {dir_.path(), "--revision"}));
}

TEST_F(HfCacheTest, NamesDoNotLeaveTheCache) {
  for (const char* name : {"../x", "a/../b", "a/b/c", "/gone", "a//b", "", "a b/c", "gone.gguf"}) {
    EXPECT_TRUE(Fails(ResolveModel(name, "").status(), absl::StatusCode::kNotFound,
                      {"No such file", "org/name"}))
        << name;
  }
  for (const char* revision : {"../main", "/etc/passwd", "a//b", "..", "a b", "main\n"}) {
    EXPECT_TRUE(Invalid(ResolveModel("facebook/opt-tiny", revision).status(), {"--revision"}))
        << revision;
  }
  for (const char* content : {"../../../../etc", "main", ""}) {
    Ref("main", content);
    EXPECT_TRUE(Invalid(ResolveModel("facebook/opt-tiny", "").status(), {"refs/main", "40 hex"}))
        << content;
  }
}

// As the hub lays files out: snapshots of links into blobs.
TEST_F(HfCacheTest, OpensASnapshotByName) {
  const TempDir flat;
  TinyModel::Opt().Write(flat);
  fs::create_directory(Model() + "/blobs");
  for (const char* name : {"config.json", "model.safetensors"}) {
    fs::copy(flat.path() + "/" + name, Model() + "/blobs/" + name + "-etag");
    fs::create_symlink(std::string("../../blobs/") + name + "-etag",
                       Snapshot(kSecond) + "/" + name);
  }
  const auto checkpoint = Checkpoint::Open("facebook/opt-tiny", "v1.0");
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  EXPECT_EQ((*checkpoint)->description().model_name(), "facebook/opt-tiny");
  EXPECT_TRUE((*checkpoint)->Read(0).ok());
  EXPECT_TRUE(Fails(Checkpoint::Open("facebook/opt-tiny").status(), absl::StatusCode::kNotFound,
                    {"config.json", "the folder holds nothing"}));
}

}  // namespace
}  // namespace sluice::checkpoint
