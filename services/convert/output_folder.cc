#include "services/convert/output_folder.h"

#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/core/status_macros.h"

namespace sluice::convert {
namespace {

namespace fs = std::filesystem;

absl::Status Exists(const std::string& path) {
  return absl::AlreadyExistsError(absl::StrCat(
      "--output ", path, " is there already and is not overwritten; name a new folder"));
}

absl::Status SyncFolder(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return SystemError(path, errno);
  const int failed = fsync(fd) != 0 ? errno : 0;
  close(fd);
  return failed == 0 ? absl::OkStatus() : SystemError(path, failed);
}

}  // namespace

absl::Status SystemError(const std::string& what, int error) {
  const bool full = error == ENOSPC || error == EDQUOT;
  return absl::Status(full ? absl::StatusCode::kResourceExhausted : absl::StatusCode::kInternal,
                      absl::StrCat(what, ": ", std::strerror(error)));
}

OutputFolder::OutputFolder(std::string target, std::string work)
    : target_(std::move(target)), work_(std::move(work)) {}

OutputFolder::OutputFolder(OutputFolder&& other) noexcept
    : target_(std::move(other.target_)), work_(std::exchange(other.work_, "")) {}

OutputFolder::~OutputFolder() {
  std::error_code ignored;
  if (!work_.empty()) fs::remove_all(work_, ignored);
}

absl::StatusOr<OutputFolder> OutputFolder::Create(const std::string& path, uint64_t bytes) {
  std::string target = path;
  while (target.size() > 1 && target.back() == '/') target.pop_back();
  std::error_code error;
  if (fs::exists(fs::symlink_status(target, error))) return Exists(target);
  const fs::path parent = fs::absolute(target, error).parent_path();
  if (!fs::is_directory(parent, error)) {
    return absl::NotFoundError(absl::StrCat("--output ", path, ": there is no folder ",
                                            parent.string(), "; make it first"));
  }
  const fs::space_info space = fs::space(parent, error);
  if (!error && space.available < bytes) {
    return absl::ResourceExhaustedError(absl::StrCat("--output ", path, ": needs ", bytes >> 20,
                                                     " MiB, the disk has ", space.available >> 20,
                                                     " MiB left; name a folder on another disk"));
  }
  std::string work = absl::StrCat(target, ".partial-XXXXXX");
  if (mkdtemp(work.data()) == nullptr) return SystemError(absl::StrCat("--output ", path), errno);
  return OutputFolder(target, work);
}

absl::Status OutputFolder::WriteFile(const std::string& name, const std::string& content) const {
  const std::string path = absl::StrCat(work_, "/", name);
  const int fd = open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
  if (fd < 0) return SystemError(path, errno);
  size_t done = 0;
  int failed = 0;
  while (done < content.size() && failed == 0) {
    const ssize_t count = write(fd, content.data() + done, content.size() - done);
    if (count > 0) done += static_cast<size_t>(count);
    if (count < 0 && errno != EINTR) failed = errno;
  }
  if (failed == 0 && fsync(fd) != 0) failed = errno;
  close(fd);
  return failed == 0 ? absl::OkStatus() : SystemError(path, failed);
}

absl::Status OutputFolder::Commit() {
  if (chmod(work_.c_str(), 0755) != 0) return SystemError(work_, errno);
  SLUICE_RETURN_IF_ERROR(SyncFolder(work_));
  if (renameat2(AT_FDCWD, work_.c_str(), AT_FDCWD, target_.c_str(), RENAME_NOREPLACE) != 0) {
    if (errno == EEXIST || errno == ENOTEMPTY) return Exists(target_);
    // Not every file system knows the flag; rename() replaces an empty folder at most.
    if (errno != EINVAL || rename(work_.c_str(), target_.c_str()) != 0) {
      return SystemError(target_, errno);
    }
  }
  work_.clear();
  std::error_code error;
  return SyncFolder(fs::absolute(target_, error).parent_path().string());
}

}  // namespace sluice::convert
