// ModelDir and File: the only way bytes of a model come into the process. A name is one plain base
// name inside the model's folder; what it names must be a regular file. Links are followed only in
// a Hugging Face hub cache
// (.../snapshots/<commit>/x -> ../../blobs/y), and only to a target inside that model's cache
// folder. Thread-safe after opening: reads use pread.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace sluice::checkpoint {

// Owns one open file. Size and modification time are those seen when it was opened.
class File {
 public:
  File(int fd, std::string name, uint64_t size, int64_t mtime_ns);
  ~File();
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  const std::string& name() const { return name_; }
  uint64_t size() const { return size_; }

  // Bytes [offset, offset + size). INVALID_ARGUMENT when the range leaves the file, DATA_LOSS when
  // the file has changed since it was opened or cannot be read.
  absl::Status ReadAt(uint64_t offset, uint64_t size, void* out) const;

  // The whole file. INVALID_ARGUMENT when it is larger than `cap` bytes or is a Git LFS pointer.
  absl::StatusOr<std::string> ReadAll(uint64_t cap) const;

 private:
  const int fd_;
  const std::string name_;
  const uint64_t size_;
  const int64_t mtime_ns_;
};

// INVALID_ARGUMENT when `begin` (the first bytes of the file `name`) is a Git LFS pointer: says how
// to get the file.
absl::Status CheckNotLfsPointer(const std::string& begin, const std::string& name);

// For messages: "a, b, c and 7 more", unprintable bytes as '?'; "nothing" for an empty list.
std::string ListText(const std::vector<std::string>& names);

// Owns the descriptor of a model's folder.
class ModelDir {
 public:
  // NOT_FOUND when there is no such folder.
  static absl::StatusOr<ModelDir> Open(const std::string& path);
  ModelDir(ModelDir&& other) noexcept;
  ModelDir& operator=(ModelDir&&) = delete;
  ~ModelDir();

  // The folder's real path, without a slash at the end.
  const std::string& path() const { return path_; }

  // NOT_FOUND, or INVALID_ARGUMENT when the name is no plain base name, or names a link out of the
  // model, a folder, a pipe or a device (which is not opened).
  absl::StatusOr<std::unique_ptr<File>> OpenFile(const std::string& name) const;

  // Names in the folder, sorted, without "." and "..". INVALID_ARGUMENT above 10,000 entries.
  absl::StatusOr<std::vector<std::string>> List() const;

 private:
  ModelDir(int fd, std::string path);
  absl::StatusOr<int> OpenLink(const std::string& name) const;

  int fd_;
  std::string path_;
  std::string root_;  // A link's target must lie in here.
};

}  // namespace sluice::checkpoint
