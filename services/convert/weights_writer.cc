#include "services/convert/weights_writer.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/core/check.h"
#include "kernels/core/status_macros.h"
#include "services/checkpoint/source_dtype.h"
#include "services/convert/output_folder.h"

namespace sluice::convert {
namespace {

constexpr size_t kHeaderAlignment = 8;

uint64_t WidthOf(const OutputTensor& tensor) {
  return checkpoint::SafetensorsDType(tensor.dtype)->block_bytes;
}

absl::Status WriteAt(int fd, const std::string& path, uint64_t offset, const void* data,
                     uint64_t size) {
  const auto* bytes = static_cast<const uint8_t*>(data);
  while (size > 0) {
    const ssize_t count = pwrite(fd, bytes, size, static_cast<off_t>(offset));
    if (count < 0 && errno != EINTR) return SystemError(path, errno);
    if (count <= 0) continue;
    bytes += count;
    offset += static_cast<uint64_t>(count);
    size -= static_cast<uint64_t>(count);
  }
  return absl::OkStatus();
}

// Which plan entries lie in which file.
std::vector<std::vector<const OutputTensor*>> Shards(const std::vector<PlannedTensor>& plan,
                                                     uint64_t max_bytes) {
  std::vector<std::vector<const OutputTensor*>> shards(1);
  uint64_t held = 0;
  for (const PlannedTensor& planned : plan) {
    uint64_t bytes = 0;
    for (const OutputTensor& part : planned.parts) bytes += part.bytes;
    if (held > 0 && held + bytes > max_bytes) {
      shards.emplace_back();
      held = 0;
    }
    held += bytes;
    for (const OutputTensor& part : planned.parts) shards.back().push_back(&part);
  }
  return shards;
}

}  // namespace

WeightsWriter::~WeightsWriter() {
  for (const File& file : files_) {
    if (file.fd >= 0) close(file.fd);
  }
}

absl::StatusOr<WeightsWriter> WeightsWriter::Create(const std::string& folder,
                                                    const std::vector<PlannedTensor>& plan,
                                                    uint64_t max_shard_bytes) {
  WeightsWriter writer;
  const auto shards = Shards(plan, max_shard_bytes);
  for (size_t i = 0; i < shards.size(); ++i) {
    const std::string name = shards.size() == 1 ? "model.safetensors"
                                                : absl::StrFormat("model-%05d-of-%05d.safetensors",
                                                                  i + 1, shards.size());
    SLUICE_RETURN_IF_ERROR(writer.AddFile(absl::StrCat(folder, "/", name), shards[i]));
  }
  if (shards.size() > 1) SLUICE_RETURN_IF_ERROR(writer.WriteIndex(folder));
  return writer;
}

absl::Status WeightsWriter::AddFile(const std::string& path,
                                    std::vector<const OutputTensor*> tensors) {
  // Wide types first: then each tensor lies at a multiple of its element's size.
  std::stable_sort(
      tensors.begin(), tensors.end(),
      [](const OutputTensor* a, const OutputTensor* b) { return WidthOf(*a) > WidthOf(*b); });
  nlohmann::json header = {{"__metadata__", {{"format", "pt"}}}};
  uint64_t end = 0;
  for (const OutputTensor* tensor : tensors) {
    header[tensor->name] = {{"dtype", tensor->dtype},
                            {"shape", tensor->shape},
                            {"data_offsets", {end, end + tensor->bytes}}};
    places_[tensor->name] = {files_.size(), end, tensor->bytes};
    end += tensor->bytes;
  }
  tensor_bytes_ += end;
  std::string text = header.dump();
  text.append((kHeaderAlignment - text.size() % kHeaderAlignment) % kHeaderAlignment, ' ');
  const uint64_t data_begin = 8 + text.size();
  for (const OutputTensor* tensor : tensors) places_[tensor->name].offset += data_begin;

  files_.push_back({path, open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644)});
  const int fd = files_.back().fd;
  if (fd < 0) return SystemError(path, errno);
  if (const int error = posix_fallocate(fd, 0, static_cast<off_t>(data_begin + end)); error != 0) {
    return SystemError(path, error);
  }
  const uint64_t length = text.size();
  uint8_t little_endian[8];
  for (int i = 0; i < 8; ++i) little_endian[i] = static_cast<uint8_t>(length >> (8 * i));
  SLUICE_RETURN_IF_ERROR(WriteAt(fd, path, 0, little_endian, 8));
  return WriteAt(fd, path, 8, text.data(), text.size());
}

absl::Status WeightsWriter::WriteIndex(const std::string& folder) const {
  nlohmann::json map = nlohmann::json::object();
  for (const auto& [name, place] : places_) {
    map[name] = std::filesystem::path(files_[place.file].path).filename().string();
  }
  const nlohmann::json index = {{"metadata", {{"total_size", tensor_bytes_}}}, {"weight_map", map}};
  const std::string path = absl::StrCat(folder, "/model.safetensors.index.json");
  const int fd = open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
  if (fd < 0) return SystemError(path, errno);
  const std::string text = index.dump(2) + "\n";
  absl::Status status = WriteAt(fd, path, 0, text.data(), text.size());
  if (status.ok() && fsync(fd) != 0) status = SystemError(path, errno);
  close(fd);
  return status;
}

absl::Status WeightsWriter::Write(const std::string& name, uint64_t offset, const void* data,
                                  uint64_t size) const {
  const auto place = places_.find(name);
  SLUICE_CHECK(place != places_.end()) << name;
  SLUICE_CHECK(offset + size <= place->second.bytes) << name;
  const File& file = files_[place->second.file];
  return WriteAt(file.fd, file.path, place->second.offset + offset, data, size);
}

absl::Status WeightsWriter::Close() {
  for (File& file : files_) {
    const int failed = fsync(file.fd) != 0 ? errno : 0;
    close(std::exchange(file.fd, -1));
    if (failed != 0) return SystemError(file.path, failed);
  }
  return absl::OkStatus();
}

}  // namespace sluice::convert
