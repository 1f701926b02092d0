// Bad model.safetensors.index.json and pytorch_model.bin.index.json beside sound shards, and shards
// that disagree with a sound index.
#include <gtest/gtest.h>

#include <filesystem>

#include "tests/bad_files/bad_file.h"
#include "tests/services/checkpoint/torch_builder.h"

namespace sluice::bad_files {
namespace {

using checkpoint::SafetensorsFile;
using checkpoint::TinyModel;

constexpr char kIndex[] = "model.safetensors.index.json";

// Shards one.safetensors ("a") and two.safetensors ("b"), and the index.
std::function<void(const TempDir&)> Index(const std::string& index) {
  return [index](const TempDir& dir) {
    dir.Write("config.json", TinyModel::Llama().config.dump());
    dir.Write("one.safetensors", SafetensorsFile({{"a", {"F16", {2}, "1234"}}}));
    dir.Write("two.safetensors", SafetensorsFile({{"b", {"F16", {2}, "1234"}}}));
    dir.Write(kIndex, index);
  };
}
std::function<void(const TempDir&)> Map(const std::string& map) {
  return Index("{\"weight_map\":" + map + "}");
}
// The sound map with `b` in a file of this name, as JSON text.
std::function<void(const TempDir&)> Shard(const std::string& name) {
  return Map(R"({"a":"one.safetensors","b":)" + name + "}");
}
// A sound index; `change` spoils the shards.
std::function<void(const TempDir&)> Shards(const std::function<void(const TempDir&)>& change) {
  return [change](const TempDir& dir) {
    Map(R"({"a":"one.safetensors","b":"two.safetensors"})")(dir);
    change(dir);
  };
}

// NOLINTNEXTLINE(readability-function-size): a table
TEST(BadFilesTest, IndexTexts) {
  ExpectRefused(
      "index",
      {
          {"F6", "empty", Index(""), {kIndex, "broken JSON"}},
          {"F6", "a list", Index("[]"), {kIndex, "one JSON object"}},
          {"F6", "cut off", Index(R"({"weight_map":{"a":"one.s)"), {kIndex, "broken JSON"}},
          {"F6",
           "LFS pointer",
           Index("version https://git-lfs.github.com/spec/v1\n"),
           {kIndex, "git lfs pull"}},
          {"F15", "no map", Index("{}"), {kIndex, "weight_map is missing"}},
          {"F15", "empty map", Map("{}"), {kIndex, "weight_map is missing or empty"}},
          {"F15", "map a list", Map("[\"one.safetensors\"]"), {kIndex, "weight_map"}},
          {"F15", "map null", Map("null"), {kIndex, "weight_map"}},
          {"F15", "file a number", Map("{\"a\":1}"), {kIndex, "weight_map must map names"}},
          {"F15", "file null", Map("{\"a\":null}"), {kIndex, "weight_map must map names"}},
          {"F15", "file a list", Map(R"({"a":["one.safetensors"]})"), {kIndex, "weight_map must"}},
          {"F5",
           "a tensor twice",
           Map(R"({"a":"one.safetensors","a":"two.safetensors"})"),
           {kIndex, "\"a\" appears twice"}},
          {"F5",
           "two maps",
           Index(R"({"weight_map":{"a":"one.safetensors"},"weight_map":{}})"),
           {kIndex, "\"weight_map\" appears twice"}},
          {"F3",
           "10,000 nested objects",
           Index([] {
             std::string text;
             for (int i = 0; i < 10'000; ++i) text += "{\"a\":";
             return text;
           }()),
           {kIndex, "deeper than 32"}},
          {"F3",
           "1,001 files",
           Map([] {
             std::string map = "{";
             for (int i = 0; i <= 1'000; ++i) {
               const std::string number = std::to_string(i);
               map += (i == 0 ? "\"" : ",\"") + number + "\":\"" + number + ".safetensors\"";
             }
             return map + "}";
           }()),
           {kIndex, "more than 1000 files"}},
          {"F3",
           "300,000 names",
           Map([] {
             std::string map = "{";
             for (int i = 0; i <= 300'000; ++i) {
               map += (i == 0 ? "\"" : ",\"") + std::to_string(i) + R"(":"one.safetensors")";
             }
             return map + "}";
           }()),
           {kIndex, "values of more than"}},
          {"F3",
           "26 MB",
           [](const TempDir& dir) {
             Index("{}")(dir);
             std::filesystem::resize_file(dir.path() + "/" + kIndex, 26'000'000);
           },
           {kIndex, "26000000 bytes"}},
          {"F3",
           "1 TiB",
           [](const TempDir& dir) {
             Index("{}")(dir);
             std::filesystem::resize_file(dir.path() + "/" + kIndex, 1ULL << 40);
           },
           {kIndex, "bytes, more than"}},
      });
}

// transformers #46097, #47176, accelerate #4067: an index that names files outside of the model.
TEST(BadFilesTest, IndexNames) {
  const std::vector<std::string> plain = {kIndex, "one plain name"};
  ExpectRefused(
      "index",
      {
          {"F14", "path up", Shard(R"("../../etc/passwd")"), plain},
          {"F14", "absolute path", Shard(R"("/etc/passwd")"), plain},
          {"F14", "device", Shard(R"("/dev/zero")"), plain},
          {"F14", "folder below", Shard(R"("sub/two.safetensors")"), plain},
          {"F14", "this folder", Shard(R"("./two.safetensors")"), plain},
          {"F14", "..", Shard(R"("..")"), plain},
          {"F14", ".", Shard(R"(".")"), plain},
          {"F14", "empty name", Shard(R"("")"), plain},
          {"F14", "name with NUL", Shard(R"("two.safetensors\u0000.txt")"), plain},
          {"F14", "name of 5000 bytes", Shard("\"" + std::string(5000, 'n') + "\""), plain},
          {"F14", "escaped slash", Shard(R"("..\u002f..\u002fetc\u002fpasswd")"), plain},
          {"F14",
           "a link to a device",
           [](const TempDir& dir) {
             Shard(R"("zero.safetensors")")(dir);
             std::filesystem::create_symlink("/dev/zero", dir.path() + "/zero.safetensors");
           },
           {kIndex, "zero.safetensors", "out of the model's folder"}},
          {"F15",
           "file that is not there",
           Shard(R"("three.safetensors")"),
           {kIndex, "three.safetensors", "No such file"},
           kNotFound},
          {"F15",
           "windows separators",
           Shard(R"("..\\two.safetensors")"),
           {kIndex, "No such file"},
           kNotFound},
          {"F15", "a file that is no safetensors", Shard(R"("config.json")"), {"config.json"}},
          {"F15", "the index itself", Shard("\"" + std::string(kIndex) + "\""), {kIndex}},
      });
}

TEST(BadFilesTest, IndexAgainstShards) {
  const std::string a = SafetensorsFile({{"a", {"F16", {2}, "1234"}}});
  ExpectRefused(
      "index",
      {
          {"F15",
           "a tensor that no file has",
           Map(R"({"a":"one.safetensors","b":"two.safetensors","c":"two.safetensors"})"),
           {kIndex, "tensor c is not in the file"}},
          {"F15",
           "a tensor in the wrong file",
           Map(R"({"a":"two.safetensors","b":"one.safetensors"})"),
           {kIndex, "tensor a is not in"}},
          {"F15",
           "a tensor in two files",
           Shards([a](const TempDir& dir) { dir.Write("two.safetensors", a); }),
           {"two.safetensors", "tensor a is in another file"}},
          {"F15",
           "a tensor that the index does not name",
           Shards([](const TempDir& dir) {
             dir.Write("two.safetensors",
                       SafetensorsFile({{"b", {"F16", {2}, "1234"}}, {"c", {"F16", {2}, "1234"}}}));
           }),
           {"two.safetensors", "tensor c is not in the index"}},
          {"F6",
           "an empty shard",
           Shards([](const TempDir& dir) { dir.Write("two.safetensors", ""); }),
           {"two.safetensors", "shorter"}},
          {"F6",
           "a shard cut in its data",
           Shards([a](const TempDir& dir) {
             dir.Write("two.safetensors", a.substr(0, a.size() - 1));
           }),
           {"two.safetensors", "ends at byte 4 of 3"}},
          {"F6",
           "a shard that is an LFS pointer",
           Shards([](const TempDir& dir) {
             dir.Write("two.safetensors", "version https://git-lfs.github.com/spec/v1\n");
           }),
           {"two.safetensors", "git lfs pull"}},
          {"F15",
           "a .bin shard in an index of safetensors",
           Shards([](const TempDir& dir) { dir.Write("two.safetensors", "PK\3\4"); }),
           {"two.safetensors"}},
          {"F15",
           "several weight files and no index",
           Shards([](const TempDir& dir) { std::filesystem::remove(dir.path() + "/" + kIndex); }),
           {"several weight files", "one.safetensors, two.safetensors"}},
          {"F15",
           "index of .bin with a safetensors shard",
           [](const TempDir& dir) {
             Map("{}")(dir);
             std::filesystem::remove(dir.path() + "/" + kIndex);
             std::filesystem::remove(dir.path() + "/two.safetensors");
             std::filesystem::rename(dir.path() + "/one.safetensors", dir.path() + "/one.bin");
             dir.Write("pytorch_model.bin.index.json", R"({"weight_map":{"a":"one.bin"}})");
           },
           {"one.bin", "not a zip archive"}},
      });
}

}  // namespace
}  // namespace sluice::bad_files
