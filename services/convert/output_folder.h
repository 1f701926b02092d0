// OutputFolder: a folder that appears whole or not at all. Files go into a folder with another name
// beside it; Commit() renames it in one step, and without Commit() it is removed.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"

namespace sluice::convert {

class OutputFolder {
 public:
  // ALREADY_EXISTS when `path` is there, NOT_FOUND when the folder that is to hold it is not,
  // RESOURCE_EXHAUSTED when the disk has less than `bytes` left.
  static absl::StatusOr<OutputFolder> Create(const std::string& path, uint64_t bytes);
  OutputFolder(OutputFolder&& other) noexcept;
  OutputFolder& operator=(OutputFolder&&) = delete;
  ~OutputFolder();

  // Where files are written until Commit().
  const std::string& path() const { return work_; }

  absl::Status WriteFile(const std::string& name, const std::string& content) const;

  // Syncs the folder and gives it its name. ALREADY_EXISTS when someone else took it meanwhile.
  absl::Status Commit();

 private:
  OutputFolder(std::string target, std::string work);

  std::string target_;
  std::string work_;  // Empty once there is nothing to remove
};

// INTERNAL or RESOURCE_EXHAUSTED (disk full): "`what`: `errno` in words".
absl::Status SystemError(const std::string& what, int error);

}  // namespace sluice::convert
