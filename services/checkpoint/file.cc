#include "services/checkpoint/file.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/core/status_macros.h"

namespace sluice::checkpoint {
namespace {

int64_t ModifiedNs(const struct stat& info) {
  return int64_t{info.st_mtim.tv_sec} * 1'000'000'000 + info.st_mtim.tv_nsec;
}

// For messages: names come from files and may hold anything.
std::string Printable(const std::string& name) {
  std::string out = name.substr(0, 200);
  for (char& c : out) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7F) c = '?';
  }
  return out;
}

absl::Status CheckBaseName(const std::string& name) {
  const bool plain = !name.empty() && name.size() <= NAME_MAX && name != "." && name != ".." &&
                     name.find('/') == std::string::npos && name.find('\0') == std::string::npos;
  if (plain) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("file name \"", Printable(name),
                   "\": must be one plain name inside the model's folder, without a path; put the "
                   "file there"));
}

absl::Status NotRegular(const std::string& name) {
  return absl::InvalidArgumentError(
      absl::StrCat(Printable(name), ": not a regular file; put the file itself into the folder"));
}

}  // namespace

File::File(int fd, std::string name, uint64_t size, int64_t mtime_ns)
    : fd_(fd), name_(std::move(name)), size_(size), mtime_ns_(mtime_ns) {}

File::~File() { close(fd_); }

absl::Status File::ReadAt(uint64_t offset, uint64_t size, void* out) const {
  if (offset > size_ || size > size_ - offset) {
    return absl::InvalidArgumentError(absl::StrCat(name_, ": bytes ", offset, " to ", offset, " + ",
                                                   size, " lie outside its ", size_,
                                                   " bytes; download it again"));
  }
  auto* to = static_cast<uint8_t*>(out);
  for (uint64_t done = 0; done < size;) {
    const ssize_t got = pread(fd_, to + done, size - done, static_cast<off_t>(offset + done));
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) {
      return absl::DataLossError(absl::StrCat(
          name_, ": cannot read at byte ", offset + done, ": ",
          got == 0 ? "the file became shorter while it was read" : std::strerror(errno),
          "; restart the loader when the file is complete"));
    }
    done += static_cast<uint64_t>(got);
  }
  struct stat now;
  if (fstat(fd_, &now) != 0 || static_cast<uint64_t>(now.st_size) != size_ ||
      ModifiedNs(now) != mtime_ns_) {
    return absl::DataLossError(absl::StrCat(
        name_, ": changed while it was read; restart the loader when the file is complete"));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::string> File::ReadAll(uint64_t cap) const {
  if (size_ > cap) {
    return absl::InvalidArgumentError(absl::StrCat(name_, ": ", size_, " bytes, more than the ",
                                                   cap,
                                                   " allowed for this file; download it again"));
  }
  std::string text(size_, '\0');
  SLUICE_RETURN_IF_ERROR(ReadAt(0, size_, text.data()));
  SLUICE_RETURN_IF_ERROR(CheckNotLfsPointer(text, name_));
  return text;
}

absl::Status CheckNotLfsPointer(const std::string& begin, const std::string& name) {
  static constexpr char kPointer[] = "version https://git-lfs";
  if (begin.compare(0, sizeof(kPointer) - 1, kPointer) != 0) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(
      name, ": a Git LFS pointer, not the file itself; run `git lfs pull` in the model's folder"));
}

std::string ListText(const std::vector<std::string>& names) {
  constexpr size_t kMaxNames = 20;
  if (names.empty()) return "nothing";
  std::string text;
  for (size_t i = 0; i < std::min(names.size(), kMaxNames); ++i) {
    absl::StrAppend(&text, i == 0 ? "" : ", ", Printable(names[i]));
  }
  if (names.size() > kMaxNames) {
    absl::StrAppend(&text, " and ", names.size() - kMaxNames, " more");
  }
  return text;
}

ModelDir::ModelDir(int fd, std::string path) : fd_(fd), path_(std::move(path)), root_(path_) {
  const std::filesystem::path snapshots = std::filesystem::path(path_).parent_path();
  if (snapshots.filename() == "snapshots") root_ = snapshots.parent_path().string();
}

ModelDir::ModelDir(ModelDir&& other) noexcept
    : fd_(std::exchange(other.fd_, -1)),
      path_(std::move(other.path_)),
      root_(std::move(other.root_)) {}

ModelDir::~ModelDir() {
  if (fd_ >= 0) close(fd_);
}

absl::StatusOr<ModelDir> ModelDir::Open(const std::string& path) {
  std::error_code error;
  const std::filesystem::path real = std::filesystem::canonical(path.empty() ? "." : path, error);
  if (error) {
    return absl::NotFoundError(absl::StrCat(path, ": ", error.message()));
  }
  const int fd = open(real.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return absl::NotFoundError(absl::StrCat(path, ": ", std::strerror(errno)));
  return ModelDir(fd, real.string());
}

absl::StatusOr<int> ModelDir::OpenLink(const std::string& name) const {
  std::error_code error;
  const std::string target = std::filesystem::canonical(path_ + "/" + name, error).string();
  if (error) {
    // Not NOT_FOUND: a file that may be absent is broken when only its link is there.
    return absl::InvalidArgumentError(absl::StrCat(
        name, ": a link that leads to nothing, as after a broken download; download it again"));
  }
  if (target.compare(0, root_.size() + 1, root_ + "/") != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, ": a link out of the model's folder; put the file itself there"));
  }
  struct stat info;
  if (lstat(target.c_str(), &info) != 0 || !S_ISREG(info.st_mode)) return NotRegular(name);
  const int fd = open(target.c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
  if (fd < 0) return absl::NotFoundError(absl::StrCat(name, ": ", std::strerror(errno)));
  return fd;
}

absl::StatusOr<std::unique_ptr<File>> ModelDir::OpenFile(const std::string& name) const {
  SLUICE_RETURN_IF_ERROR(CheckBaseName(name));
  struct stat info;
  if (fstatat(fd_, name.c_str(), &info, AT_SYMLINK_NOFOLLOW) != 0) {
    return absl::NotFoundError(absl::StrCat(path_, "/", name, ": ", std::strerror(errno)));
  }
  int fd = -1;
  if (S_ISLNK(info.st_mode)) {
    SLUICE_ASSIGN_OR_RETURN(fd, OpenLink(name));
  } else {
    if (!S_ISREG(info.st_mode)) return NotRegular(name);
    fd = openat(fd_, name.c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0) {
      return absl::NotFoundError(absl::StrCat(path_, "/", name, ": ", std::strerror(errno)));
    }
  }
  if (fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) {
    close(fd);
    return NotRegular(name);
  }
  return std::make_unique<File>(fd, name, static_cast<uint64_t>(info.st_size), ModifiedNs(info));
}

absl::StatusOr<std::vector<std::string>> ModelDir::List() const {
  constexpr size_t kMaxEntries = 10'000;
  const int copy = openat(fd_, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  DIR* dir = copy < 0 ? nullptr : fdopendir(copy);
  if (dir == nullptr) {
    if (copy >= 0) close(copy);
    return absl::NotFoundError(absl::StrCat(path_, ": ", std::strerror(errno)));
  }
  std::vector<std::string> names;
  while (const dirent* entry = readdir(dir)) {
    const std::string name = entry->d_name;
    if (name != "." && name != "..") names.push_back(name);
    if (names.size() > kMaxEntries) break;
  }
  closedir(dir);
  if (names.size() > kMaxEntries) {
    return absl::InvalidArgumentError(
        absl::StrCat(path_, ": more than ", kMaxEntries, " entries; not a model's folder"));
  }
  std::sort(names.begin(), names.end());
  return names;
}

}  // namespace sluice::checkpoint
