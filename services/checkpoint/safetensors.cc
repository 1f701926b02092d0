#include "services/checkpoint/safetensors.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <set>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "kernels/core/status_macros.h"
#include "services/checkpoint/hash.h"
#include "services/checkpoint/json.h"

namespace sluice::checkpoint {
namespace {

constexpr uint64_t kMaxHeaderBytes = 25'000'000;
constexpr size_t kMaxTensors = 100'000;
constexpr size_t kMaxNameBytes = 512;
constexpr size_t kMaxShards = 1'000;
constexpr size_t kMaxDims = 8;
constexpr uint64_t kLengthBytes = 8;
constexpr char kIndexName[] = "model.safetensors.index.json";

absl::Status Bad(const std::string& what, const std::string& rule) {
  return absl::InvalidArgumentError(
      absl::StrCat(what, ": ", rule, "; download or save the file again"));
}

absl::StatusOr<std::string> ReadHeader(const File& file) {
  char begin[64] = {};
  const uint64_t available = std::min<uint64_t>(file.size(), sizeof(begin) - 1);
  SLUICE_RETURN_IF_ERROR(file.ReadAt(0, available, begin));
  SLUICE_RETURN_IF_ERROR(CheckNotLfsPointer(begin, file.name()));
  if (file.size() < kLengthBytes) return Bad(file.name(), "shorter than a safetensors header");
  uint64_t length;
  std::memcpy(&length, begin, sizeof(length));
  if (length > kMaxHeaderBytes) {
    return Bad(file.name(), absl::StrCat("header of ", length, " bytes, more than the ",
                                         kMaxHeaderBytes, " allowed"));
  }
  if (length > file.size() - kLengthBytes) {
    return Bad(file.name(),
               absl::StrCat("header of ", length, " bytes in a file of ", file.size()));
  }
  std::string header(length, '\0');
  SLUICE_RETURN_IF_ERROR(file.ReadAt(kLengthBytes, length, header.data()));
  if (header.empty() || header[0] != '{') return Bad(file.name(), "header must start with '{'");
  return header;
}

// A list of whole numbers.
absl::StatusOr<Shape> UintList(const Json& entry, const char* key, const std::string& what) {
  const auto it = entry.find(key);
  if (it == entry.end() || !it->is_array() || it->size() > kMaxDims) {
    return Bad(what, absl::StrCat(key, " must be a list of at most ", kMaxDims, " numbers"));
  }
  Shape list;
  for (const Json& value : *it) {
    uint64_t number = 0;
    if (!AsUint(value, &number)) {
      return Bad(what, absl::StrCat(key, " must hold whole numbers from 0"));
    }
    list.push_back(number);
  }
  return list;
}

// Checks one entry of the header; `data` is where the data starts in the file.
absl::StatusOr<StoredTensor> ParseEntry(const std::string& name, const Json& entry,
                                        const File& file, uint64_t data) {
  if (name.empty() || name.size() > kMaxNameBytes) {
    return Bad(file.name(), absl::StrCat("a tensor name must have 1 to ", kMaxNameBytes, " bytes"));
  }
  const std::string what = absl::StrCat(file.name(), ": tensor ", name);
  if (!entry.is_object()) return Bad(what, "must be described by an object");
  const auto dtype_name = entry.find("dtype");
  if (dtype_name == entry.end() || !dtype_name->is_string()) return Bad(what, "dtype is missing");
  StoredTensor tensor;
  tensor.name = name;
  tensor.file = &file;
  absl::StatusOr<SourceDType> dtype = SafetensorsDType(dtype_name->get<std::string>());
  if (!dtype.ok()) {
    return absl::UnimplementedError(
        absl::StrCat(what, ": ", std::string(dtype.status().message())));
  }
  tensor.dtype = *std::move(dtype);
  SLUICE_ASSIGN_OR_RETURN(tensor.shape, UintList(entry, "shape", what));
  SLUICE_ASSIGN_OR_RETURN(const Shape offsets, UintList(entry, "data_offsets", what));
  SLUICE_ASSIGN_OR_RETURN(tensor.bytes, TensorBytes(tensor.dtype, tensor.shape, what));
  if (offsets.size() != 2 || offsets[0] > offsets[1]) {
    return Bad(what, "data_offsets must be two numbers, begin <= end");
  }
  if (offsets[1] > file.size() - data) {
    return Bad(what, absl::StrCat("ends at byte ", offsets[1], " of ", file.size() - data,
                                  " bytes of data"));
  }
  if (offsets[1] - offsets[0] != tensor.bytes) {
    return Bad(what,
               absl::StrCat("shape ", ShapeText(tensor.shape), " of ", tensor.dtype.name, " needs ",
                            tensor.bytes, " bytes, data_offsets give ", offsets[1] - offsets[0]));
  }
  tensor.offset = data + offsets[0];
  return tensor;
}

// Sorted by offset: without gap, overlap or a second name for the same bytes, up to the end of the
// file.
absl::Status CheckCoverage(const std::vector<StoredTensor>& tensors, const File& file,
                           uint64_t data) {
  uint64_t end = data;
  bool empty = false;  // Whether the tensor before has no bytes.
  for (const StoredTensor& tensor : tensors) {
    const std::string what = absl::StrCat(file.name(), ": tensor ", tensor.name);
    if (tensor.offset != end) {
      return Bad(what, absl::StrCat("data_offsets leave a gap or overlap at byte ", end - data));
    }
    if (empty) return Bad(what, "shares its offset with a tensor of no elements");
    end = tensor.offset + tensor.bytes;
    empty = tensor.bytes == 0;
  }
  if (end != file.size()) {
    return Bad(file.name(),
               absl::StrCat(file.size() - end, " bytes after the last tensor belong to none"));
  }
  return absl::OkStatus();
}

bool IsPyTorchName(const std::string& name) {
  return absl::EndsWith(name, ".bin") || absl::EndsWith(name, ".pt") ||
         absl::EndsWith(name, ".pth");
}

absl::Status NothingFound(const ModelDir& dir, const std::vector<std::string>& names) {
  for (const std::string& name : names) {
    if (!IsPyTorchName(name)) continue;
    return absl::UnimplementedError(
        absl::StrCat(dir.path(), ": holds PyTorch weights (", name,
                     ") only, which are not supported; save the model as safetensors "
                     "(model.save_pretrained(folder, safe_serialization=True))"));
  }
  return absl::NotFoundError(absl::StrCat(dir.path(),
                                          ": no weights; looked for model.safetensors, ",
                                          kIndexName, " and one other *.safetensors"));
}

}  // namespace

absl::Status TensorSet::AddTensors(const std::string& header, const File& file) {
  SLUICE_ASSIGN_OR_RETURN(const Json json, ParseJsonObject(header, file.name()));
  if (json.size() + tensors_.size() > kMaxTensors) {
    return Bad(file.name(), absl::StrCat("more than ", kMaxTensors, " tensors"));
  }
  const uint64_t data = kLengthBytes + header.size();
  std::vector<StoredTensor> found;
  for (const auto& [name, entry] : json.items()) {
    if (name == "__metadata__") {
      if (!entry.is_object()) return Bad(file.name(), "__metadata__ must be an object");
      for (const auto& [key, value] : entry.items()) {
        if (!value.is_string()) return Bad(file.name(), "__metadata__ must map strings to strings");
        metadata_.emplace(key, value.get<std::string>());
      }
      continue;
    }
    SLUICE_ASSIGN_OR_RETURN(StoredTensor tensor, ParseEntry(name, entry, file, data));
    found.push_back(std::move(tensor));
  }
  std::sort(found.begin(), found.end(), [](const StoredTensor& a, const StoredTensor& b) {
    return std::pair(a.offset, a.bytes) < std::pair(b.offset, b.bytes);
  });
  SLUICE_RETURN_IF_ERROR(CheckCoverage(found, file, data));
  for (StoredTensor& tensor : found) {
    if (!by_name_.emplace(tensor.name, tensors_.size()).second) {
      return Bad(file.name(), absl::StrCat("tensor ", tensor.name, " is in another file, too"));
    }
    tensors_.push_back(std::move(tensor));
  }
  return absl::OkStatus();
}

absl::Status TensorSet::AddFile(std::unique_ptr<File> file) {
  SLUICE_ASSIGN_OR_RETURN(const std::string header, ReadHeader(*file));
  absl::StrAppend(&fingerprint_, file->name(), "\n", file->size(), "\n", HexHash(header), "\n");
  SLUICE_RETURN_IF_ERROR(AddTensors(header, *file));
  files_.push_back(std::move(file));
  return absl::OkStatus();
}

absl::Status TensorSet::OpenIndex(const ModelDir& dir, const File& index) {
  SLUICE_ASSIGN_OR_RETURN(const std::string text, index.ReadAll(kMaxHeaderBytes));
  SLUICE_ASSIGN_OR_RETURN(const Json json, ParseJsonObject(text, index.name()));
  const auto map = json.find("weight_map");
  if (map == json.end() || !map->is_object() || map->empty()) {
    return Bad(index.name(), "weight_map is missing or empty");
  }
  std::set<std::string> shards;
  for (const auto& [name, shard] : map->items()) {
    if (!shard.is_string()) return Bad(index.name(), "weight_map must map names to file names");
    shards.insert(shard.get<std::string>());
  }
  if (shards.size() > kMaxShards) {
    return Bad(index.name(), absl::StrCat("more than ", kMaxShards, " files"));
  }
  for (const std::string& shard : shards) {
    absl::StatusOr<std::unique_ptr<File>> file = dir.OpenFile(shard);
    if (!file.ok()) {
      return absl::Status(file.status().code(),
                          absl::StrCat(index.name(), ": ", std::string(file.status().message())));
    }
    SLUICE_RETURN_IF_ERROR(AddFile(*std::move(file)));
  }
  for (const auto& [name, shard] : map->items()) {
    const StoredTensor* tensor = Find(name);
    if (tensor == nullptr || tensor->file->name() != shard.get<std::string>()) {
      return Bad(index.name(), absl::StrCat("tensor ", name.substr(0, kMaxNameBytes),
                                            " is not in the file the index names"));
    }
  }
  for (const StoredTensor& tensor : tensors_) {
    if (!map->contains(tensor.name)) {
      return Bad(tensor.file->name(), absl::StrCat("tensor ", tensor.name, " is not in the index"));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<TensorSet> TensorSet::Open(const ModelDir& dir) {
  TensorSet set;
  absl::StatusOr<std::unique_ptr<File>> single = dir.OpenFile("model.safetensors");
  if (absl::IsNotFound(single.status())) {
    absl::StatusOr<std::unique_ptr<File>> index = dir.OpenFile(kIndexName);
    if (index.ok()) {
      SLUICE_RETURN_IF_ERROR(set.OpenIndex(dir, **index));
      return set;
    }
    if (!absl::IsNotFound(index.status())) return index.status();
    SLUICE_ASSIGN_OR_RETURN(const std::vector<std::string> names, dir.List());
    std::vector<std::string> candidates;
    for (const std::string& name : names) {
      if (absl::EndsWith(name, ".safetensors")) candidates.push_back(name);
    }
    if (candidates.size() != 1) return NothingFound(dir, names);
    single = dir.OpenFile(candidates[0]);
  }
  if (!single.ok()) return single.status();
  SLUICE_RETURN_IF_ERROR(set.AddFile(*std::move(single)));
  return set;
}

const StoredTensor* TensorSet::Find(const std::string& name) const {
  const auto it = by_name_.find(name);
  return it == by_name_.end() ? nullptr : &tensors_[it->second];
}

std::string TensorSet::Metadata(const std::string& key) const {
  const auto it = metadata_.find(key);
  return it == metadata_.end() ? "" : it->second;
}

}  // namespace sluice::checkpoint
