// TensorSet: the tensors of one model over all of its weight files, whatever their container.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "services/checkpoint/file.h"
#include "services/checkpoint/source_dtype.h"

namespace sluice::checkpoint {

inline constexpr size_t kMaxTensors = 100'000;
inline constexpr size_t kMaxTensorNameBytes = 512;
inline constexpr size_t kMaxDims = 8;

// Where one tensor lies: always in one piece, last dimension fastest.
struct StoredTensor {
  std::string name;
  SourceDType dtype;
  Shape shape;
  uint64_t bytes = 0;
  const File* file = nullptr;
  uint64_t offset = 0;  // From the start of the file.
};

// What the header of one file says; each container has a function that reads and checks it.
struct TensorFile {
  std::vector<StoredTensor> tensors;  // By offset.
  std::map<std::string, std::string> metadata;
  std::string header;  // The bytes that the above was read from.
};

// INVALID_ARGUMENT: "`what`: `rule`; download or save the file again".
absl::Status BrokenFile(const std::string& what, const std::string& rule);

// Owns the files. Thread-safe after opening.
class TensorSet {
 public:
  // Takes the first of these that is there: model.safetensors, model.safetensors.index.json, the
  // only *.safetensors of the folder, pytorch_model.bin, pytorch_model.bin.index.json, the only
  // *.bin. NOT_FOUND lists what was looked for and what is there; INVALID_ARGUMENT for several
  // files without an index, a broken file, or an index that disagrees with its shards.
  static absl::StatusOr<TensorSet> Open(const ModelDir& dir);

  // Null when there is none.
  const StoredTensor* Find(const std::string& name) const;

  // In the order of the files, within a file by offset.
  const std::vector<StoredTensor>& tensors() const { return tensors_; }

  // A value of __metadata__ in any safetensors file; empty when absent.
  std::string Metadata(const std::string& key) const;

  // Names, sizes and headers of all files: what the model's digest is made of.
  const std::string& fingerprint() const { return fingerprint_; }

 private:
  struct Container;  // How the files of a container are called, and who reads one.

  // False when the folder holds no such files.
  absl::StatusOr<bool> OpenContainer(const ModelDir& dir, const Container& container);
  absl::Status OpenIndex(const ModelDir& dir, const File& index, const Container& container);
  absl::Status AddFile(std::unique_ptr<File> file, const Container& container);

  std::vector<std::unique_ptr<File>> files_;
  std::vector<StoredTensor> tensors_;
  absl::flat_hash_map<std::string, size_t> by_name_;
  absl::flat_hash_map<std::string, std::string> metadata_;
  std::string fingerprint_;
};

}  // namespace sluice::checkpoint
