// What a model's folder may not be or hold: links out of it, pipes, devices, folders by the name of
// a file; and files that change while they are read. No device or pipe is opened: one that were
// would hang, which the guard of ExpectRefused() sees.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <thread>

#include "tests/bad_files/bad_file.h"

namespace sluice::bad_files {
namespace {

namespace fs = std::filesystem;

using checkpoint::Checkpoint;
using checkpoint::TinyModel;

// A sound model with `name` replaced by what `make` puts at its path.
std::function<void(const TempDir&)> Instead(const std::string& name,
                                            const std::function<void(const std::string&)>& make) {
  return [=](const TempDir& dir) {
    TinyModel::Llama().Write(dir);
    dir.Write("generation_config.json", "{}");
    fs::remove(dir.path() + "/" + name);
    make(dir.path() + "/" + name);
  };
}
void MakePipe(const std::string& path) { ASSERT_EQ(mkfifo(path.c_str(), 0600), 0); }
void MakeFolder(const std::string& path) { fs::create_directory(path); }
void MakeSocket(const std::string& path) {
  const int fd = socket(AF_UNIX, SOCK_STREAM, 0);
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::strncpy(address.sun_path, path.c_str(), sizeof(address.sun_path) - 1);
  ASSERT_EQ(bind(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
  close(fd);
}
std::function<void(const std::string&)> LinkTo(const std::string& target) {
  return [=](const std::string& path) { fs::create_symlink(target, path); };
}

TEST(BadFilesTest, SpecialFiles) {
  std::vector<BadFile> cases;
  // The first file of each kind that is opened.
  for (const std::string name : {"config.json", "generation_config.json", "model.safetensors"}) {
    const std::vector<std::string> regular = {name, "not a regular file"};
    cases.push_back({"F14", name + " a pipe", Instead(name, MakePipe), regular});
    cases.push_back({"F14", name + " a folder", Instead(name, MakeFolder), regular});
    cases.push_back({"F14", name + " a socket", Instead(name, MakeSocket), regular});
    const std::vector<std::string> out = {name, "a link out of the model's folder"};
    cases.push_back(
        {"F14", name + " a link to /dev/zero", Instead(name, LinkTo("/dev/zero")), out});
    cases.push_back(
        {"F14", name + " a link to /etc/passwd", Instead(name, LinkTo("/etc/passwd")), out});
    cases.push_back(
        {"F14", name + " a link up", Instead(name, LinkTo("../../../etc/passwd")), out});
    // Ollama CVE-2024-37032, -2026-103663: names that lead out of the store.
    cases.push_back({"F14", name + " a link to a link out",
                     Instead(name,
                             [](const std::string& path) {
                               const fs::path middle = fs::path(path).parent_path() / "middle";
                               fs::create_symlink("/etc/hostname", middle);
                               fs::create_symlink("middle", path);
                             }),
                     out});
    cases.push_back({"F14",
                     name + " a link to this folder",
                     Instead(name, LinkTo(".")),
                     {name, "out of the model's folder"}});
    cases.push_back({"F14", name + " a link to a pipe in here",
                     Instead(name,
                             [](const std::string& path) {
                               MakePipe(fs::path(path).parent_path() / "pipe");
                               fs::create_symlink("pipe", path);
                             }),
                     regular});
  }
  ExpectRefused("paths", cases);
}

// What is not there at all is an error of its own when the file is needed.
TEST(BadFilesTest, LinksToNothing) {
  ExpectRefused(
      "paths",
      {
          {"F14",
           "config.json a link to nothing",
           Instead("config.json", LinkTo("nothing")),
           {"config.json", "leads to nothing"}},
          {"F14",
           "config.json a link to itself",
           Instead("config.json", LinkTo("config.json")),
           {"config.json", "leads to nothing"}},
          {"F14",
           "generation_config.json a link to nothing",
           Instead("generation_config.json", LinkTo("../../blobs/0")),
           {"generation_config.json", "leads to nothing"}},
          {"F14",
           "weights a link to nothing",
           Instead("model.safetensors", LinkTo("nothing")),
           {"model.safetensors", "leads to nothing"}},
          {"F14", "an empty folder", [](const TempDir&) {}, {"looked for config.json"}, kNotFound},
          {"F14",
           "no weights",
           Instead("model.safetensors", [](const std::string&) {}),
           {"no weights", "looked for model.safetensors"},
           kNotFound},
          {"F14",
           "10,001 files",
           [](const TempDir& dir) {
             for (int i = 0; i <= 10'000; ++i) dir.Write(std::to_string(i), "");
           },
           {"more than 10000 entries"}},
      });
}

TEST(BadFilesTest, GgufPaths) {
  ExpectRefused("paths",
                {
                    {"F14",
                     "model.gguf a pipe",
                     [](const TempDir& dir) { MakePipe(dir.path() + "/model.gguf"); },
                     {"model.gguf", "not a regular file"}},
                    {"F14",
                     "model.gguf a socket",
                     [](const TempDir& dir) { MakeSocket(dir.path() + "/model.gguf"); },
                     {"model.gguf", "not a regular file"}},
                },
                OpenGguf);
}

// Names that are given on the command line.
TEST(BadFilesTest, ModelNames) {
  for (const std::string name : {"/dev/zero", "/etc/passwd", "no/such/folder", "../..//nothing",
                                 "a\nb", "org/name/more", "models--a--b/../../etc"}) {
    const auto code = name[0] == '/' ? kInvalid : kNotFound;
    ExpectRefused("paths", {{"F14", "model " + name.substr(0, 8), [](const TempDir&) {}, {}, code}},
                  [&](const std::string&) { return Checkpoint::Open(name).status(); });
  }
  for (const std::string revision : {"../../etc", "/etc", "a/../../b", "..", "x\ny"}) {
    ExpectRefused(
        "paths",
        {{"F14", "revision " + revision.substr(0, 8), [](const TempDir&) {}, {"--revision"}}},
        [&](const std::string&) { return Checkpoint::Open("org/name", revision).status(); });
  }
}

absl::Status ReadAll(const Checkpoint& checkpoint) {
  for (int i = 0; i < checkpoint.description().tensors_size(); ++i) {
    if (const auto matrix = checkpoint.Read(i); !matrix.ok()) return matrix.status();
  }
  return absl::OkStatus();
}

// F23: the file changes between opening and reading. One read fails, the process lives; a mapping
// would end it.
TEST(BadFilesTest, FilesThatChange) {
  const auto after_open = [](const std::function<void(const std::string&)>& change) {
    return [=](const std::string& folder) -> absl::Status {
      const auto checkpoint = Checkpoint::Open(folder);
      if (!checkpoint.ok()) return checkpoint.status();
      change(folder + "/model.safetensors");
      return ReadAll(**checkpoint);
    };
  };
  const auto write = [](const TempDir& dir) { TinyModel::Llama().Write(dir); };
  const auto lost = absl::StatusCode::kDataLoss;
  ExpectRefused("paths", {{"F23", "cut to nothing", write, {"model.safetensors", "shorter"}, lost}},
                after_open([](const std::string& path) { fs::resize_file(path, 0); }));
  ExpectRefused(
      "paths", {{"F23", "cut in the data", write, {"model.safetensors"}, lost}},
      after_open([](const std::string& path) { fs::resize_file(path, fs::file_size(path) - 1); }));
  ExpectRefused(
      "paths", {{"F23", "grown", write, {"model.safetensors", "changed"}, lost}},
      after_open([](const std::string& path) { fs::resize_file(path, fs::file_size(path) + 1); }));
  ExpectRefused("paths",
                {{"F23", "written in place", write, {"model.safetensors", "changed"}, lost}},
                after_open([](const std::string& path) {
                  const int fd = open(path.c_str(), O_WRONLY);
                  ASSERT_EQ(pwrite(fd, "x", 1, 100), 1);
                  close(fd);
                  // The same second may be the same time stamp on a coarse clock.
                  fs::last_write_time(path, fs::last_write_time(path) + std::chrono::seconds(1));
                }));
}

// F23 while threads read: every read is either whole or DATA_LOSS.
TEST(BadFilesTest, FileIsCutWhileThreadsRead) {
  const TempDir dir;
  TinyModel::Llama().Write(dir);
  const auto checkpoint = Checkpoint::Open(dir.path());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  std::vector<std::thread> readers;
  for (int i = 0; i < 4; ++i) {
    readers.emplace_back([&] {
      for (int round = 0; round < 200; ++round) {
        const absl::Status status = ReadAll(**checkpoint);
        if (status.ok()) continue;
        EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << status;
        return;
      }
    });
  }
  fs::resize_file(dir.path() + "/model.safetensors", 100);
  for (std::thread& reader : readers) reader.join();
  EXPECT_EQ(ReadAll(**checkpoint).code(), absl::StatusCode::kDataLoss);
}

}  // namespace
}  // namespace sluice::bad_files
