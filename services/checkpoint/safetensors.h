// Reading of safetensors files: one file, or shards with an index.
//
//   8 bytes  header length h, little-endian
//   h bytes  JSON {"name": {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 12]},
//                  "__metadata__": {...}}
//   rest     the data; offsets count from here, are contiguous and cover it exactly
//
// Caps: header 25 MB, 100,000 tensors, name 512 bytes, JSON depth 32, 1,000 shards. Headers alone
// are read here; data comes through Read(). Thread-safe after opening.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "services/checkpoint/file.h"
#include "services/checkpoint/source_dtype.h"

namespace sluice::checkpoint {

// Where one tensor lies.
struct StoredTensor {
  std::string name;
  SourceDType dtype;
  Shape shape;
  uint64_t bytes = 0;
  const File* file = nullptr;
  uint64_t offset = 0;  // From the start of the file.
};

// The tensors of one model over all of its files. Owns the files.
class TensorSet {
 public:
  // Looks for model.safetensors, then model.safetensors.index.json, then the only *.safetensors of
  // the folder. NOT_FOUND lists what was looked for, UNIMPLEMENTED when only PyTorch files are
  // there, INVALID_ARGUMENT for a broken file or an index that disagrees with its shards.
  static absl::StatusOr<TensorSet> Open(const ModelDir& dir);

  // Null when there is none.
  const StoredTensor* Find(const std::string& name) const;

  // In the order of the files, within a file by offset.
  const std::vector<StoredTensor>& tensors() const { return tensors_; }

  // A value of __metadata__ in any file; empty when absent.
  std::string Metadata(const std::string& key) const;

  // Names, sizes and headers of all files: what the model's digest is made of.
  const std::string& fingerprint() const { return fingerprint_; }

 private:
  absl::Status AddFile(std::unique_ptr<File> file);
  absl::Status AddTensors(const std::string& header, const File& file);
  absl::Status OpenIndex(const ModelDir& dir, const File& index);

  std::vector<std::unique_ptr<File>> files_;
  std::vector<StoredTensor> tensors_;
  absl::flat_hash_map<std::string, size_t> by_name_;
  absl::flat_hash_map<std::string, std::string> metadata_;
  std::string fingerprint_;
};

}  // namespace sluice::checkpoint
