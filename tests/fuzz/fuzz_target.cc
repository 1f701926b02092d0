#include "tests/fuzz/fuzz_target.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "kernels/core/check.h"
#include "services/checkpoint/checkpoint.h"

namespace sluice::fuzz {
namespace {

namespace fs = std::filesystem;

void WriteAll(int fd, const uint8_t* data, size_t size) {
  for (size_t done = 0; done < size;) {
    const ssize_t put = pwrite(fd, data + done, size - done, static_cast<off_t>(done));
    SLUICE_CHECK(put > 0) << "cannot write the input";
    done += static_cast<size_t>(put);
  }
}

// A folder with a random name.
class MemoryFolder {
 public:
  MemoryFolder() {
    const fs::path base =
        access("/dev/shm", W_OK) == 0 ? fs::path("/dev/shm") : fs::temp_directory_path();
    path_ = (base / "sluice-fuzz-XXXXXX").string();
    SLUICE_CHECK(mkdtemp(path_.data()) != nullptr) << path_;
  }
  ~MemoryFolder() {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
  }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

}  // namespace

std::unique_ptr<checkpoint::File> FileOf(const uint8_t* data, size_t size,
                                         const std::string& name) {
  const int fd = memfd_create("input", MFD_CLOEXEC);
  SLUICE_CHECK(fd >= 0) << "memfd_create";
  WriteAll(fd, data, size);
  struct stat info;
  SLUICE_CHECK(fstat(fd, &info) == 0);
  const int64_t mtime = int64_t{info.st_mtim.tv_sec} * 1'000'000'000 + info.st_mtim.tv_nsec;
  return std::make_unique<checkpoint::File>(fd, name, size, mtime);
}

const std::string& Folder() {
  static const MemoryFolder folder;
  return folder.path();
}

void WriteFile(const std::string& name, const uint8_t* data, size_t size) {
  const std::string path = Folder() + "/" + name;
  const int fd = open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  SLUICE_CHECK(fd >= 0) << path;
  WriteAll(fd, data, size);
  close(fd);
}

void WriteFile(const std::string& name, const std::string& content) {
  WriteFile(name, reinterpret_cast<const uint8_t*>(content.data()), content.size());
}

std::string Testdata(const std::string& name) {
  std::ifstream file(std::string(SLUICE_TESTDATA "/") + name, std::ios::binary);
  std::ostringstream content;
  content << file.rdbuf();
  SLUICE_CHECK(!content.str().empty()) << name;
  return content.str();
}

void OpenAndRead(const std::string& path) {
  const auto checkpoint = checkpoint::Checkpoint::Open(path);
  if (!checkpoint.ok()) {
    SLUICE_CHECK(!checkpoint.status().message().empty());
    return;
  }
  const auto& description = (*checkpoint)->description();
  for (int i = 0; i < description.tensors_size(); ++i) {
    const absl::StatusOr<QuantizedMatrix> matrix = (*checkpoint)->Read(i);
    if (matrix.ok()) SLUICE_CHECK(matrix->planes.size() == description.tensors(i).bytes());
  }
  for (const auto& file : description.files()) {
    SLUICE_CHECK((*checkpoint)->ReadFile(file.name()).ok()) << file.name();
  }
}

}  // namespace sluice::fuzz
