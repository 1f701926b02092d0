// WeightsWriter: safetensors files whose tensors are known before their data: one file, or several
// with an index. The headers are written first, the data wherever it belongs, in any order.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "services/convert/output_tensor.h"

namespace sluice::convert {

class WeightsWriter {
 public:
  // Files of `folder`: model.safetensors when all tensors fit in `max_shard_bytes`, else
  // model-00001-of-0000N.safetensors ... and model.safetensors.index.json. The tensors of one plan
  // entry stay together; one that is larger than the limit has a file of its own. Reserves all of the
  // disk space. RESOURCE_EXHAUSTED when the disk is full.
  static absl::StatusOr<WeightsWriter> Create(const std::string& folder,
                                              const std::vector<PlannedTensor>& plan,
                                              uint64_t max_shard_bytes);
  WeightsWriter(WeightsWriter&& other) noexcept = default;
  ~WeightsWriter();

  // Bytes of tensor `name` from `offset` on.
  absl::Status Write(const std::string& name, uint64_t offset, const void* data,
                     uint64_t size) const;

  // Syncs and closes the files. REQUIRES: every tensor was written.
  absl::Status Close();

  size_t num_files() const { return files_.size(); }
  uint64_t tensor_bytes() const { return tensor_bytes_; }

 private:
  struct File {
    std::string path;
    int fd = -1;
  };
  struct Place {
    size_t file = 0;
    uint64_t offset = 0;  // From the start of the file
    uint64_t bytes = 0;
  };

  WeightsWriter() = default;
  absl::Status AddFile(const std::string& path, std::vector<const OutputTensor*> tensors);
  absl::Status WriteIndex(const std::string& folder) const;

  std::vector<File> files_;
  std::map<std::string, Place> places_;
  uint64_t tensor_bytes_ = 0;
};

}  // namespace sluice::convert
