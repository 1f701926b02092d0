#include "services/checkpoint/tensor_set.h"

#include <set>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "kernels/core/status_macros.h"
#include "services/checkpoint/hash.h"
#include "services/checkpoint/json.h"
#include "services/checkpoint/safetensors.h"
#include "services/checkpoint/torch_bin.h"

namespace sluice::checkpoint {
namespace {

constexpr uint64_t kMaxIndexBytes = 25'000'000;
constexpr size_t kMaxShards = 1'000;

}  // namespace

struct TensorSet::Container {
  const char* single;
  const char* index;
  const char* suffix;
  absl::StatusOr<TensorFile> (*read)(const File& file);
};

absl::Status BrokenFile(const std::string& what, const std::string& rule) {
  return absl::InvalidArgumentError(
      absl::StrCat(what, ": ", rule, "; download or save the file again"));
}

absl::Status TensorSet::AddFile(std::unique_ptr<File> file, const Container& container) {
  char begin[64] = {};
  const uint64_t available = std::min<uint64_t>(file->size(), sizeof(begin) - 1);
  SLUICE_RETURN_IF_ERROR(file->ReadAt(0, available, begin));
  SLUICE_RETURN_IF_ERROR(CheckNotLfsPointer(begin, file->name()));
  SLUICE_ASSIGN_OR_RETURN(TensorFile found, container.read(*file));
  if (found.tensors.size() + tensors_.size() > kMaxTensors) {
    return BrokenFile(file->name(), absl::StrCat("more than ", kMaxTensors, " tensors"));
  }
  absl::StrAppend(&fingerprint_, file->name(), "\n", file->size(), "\n", HexHash(found.header),
                  "\n");
  for (StoredTensor& tensor : found.tensors) {
    if (!by_name_.emplace(tensor.name, tensors_.size()).second) {
      return BrokenFile(file->name(),
                        absl::StrCat("tensor ", tensor.name, " is in another file, too"));
    }
    tensors_.push_back(std::move(tensor));
  }
  metadata_.insert(found.metadata.begin(), found.metadata.end());
  files_.push_back(std::move(file));
  return absl::OkStatus();
}

absl::Status TensorSet::OpenIndex(const ModelDir& dir, const File& index,
                                  const Container& container) {
  SLUICE_ASSIGN_OR_RETURN(const std::string text, index.ReadAll(kMaxIndexBytes));
  SLUICE_ASSIGN_OR_RETURN(const Json json, ParseJsonObject(text, index.name()));
  const auto map = json.find("weight_map");
  if (map == json.end() || !map->is_object() || map->empty()) {
    return BrokenFile(index.name(), "weight_map is missing or empty");
  }
  std::set<std::string> shards;
  for (const auto& [name, shard] : map->items()) {
    if (!shard.is_string()) {
      return BrokenFile(index.name(), "weight_map must map names to file names");
    }
    shards.insert(shard.get<std::string>());
  }
  if (shards.size() > kMaxShards) {
    return BrokenFile(index.name(), absl::StrCat("more than ", kMaxShards, " files"));
  }
  for (const std::string& shard : shards) {
    absl::StatusOr<std::unique_ptr<File>> file = dir.OpenFile(shard);
    if (!file.ok()) {
      return absl::Status(file.status().code(),
                          absl::StrCat(index.name(), ": ", std::string(file.status().message()),
                                       "; download what the index names"));
    }
    SLUICE_RETURN_IF_ERROR(AddFile(*std::move(file), container));
  }
  for (const auto& [name, shard] : map->items()) {
    const StoredTensor* tensor = Find(name);
    if (tensor == nullptr || tensor->file->name() != shard.get<std::string>()) {
      return BrokenFile(index.name(), absl::StrCat("tensor ", name.substr(0, kMaxTensorNameBytes),
                                                   " is not in the file the index names"));
    }
  }
  for (const StoredTensor& tensor : tensors_) {
    if (!map->contains(tensor.name)) {
      return BrokenFile(tensor.file->name(),
                        absl::StrCat("tensor ", tensor.name, " is not in the index"));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<bool> TensorSet::OpenContainer(const ModelDir& dir, const Container& container) {
  absl::StatusOr<std::unique_ptr<File>> single = dir.OpenFile(container.single);
  if (absl::IsNotFound(single.status())) {
    const absl::StatusOr<std::unique_ptr<File>> index = dir.OpenFile(container.index);
    if (index.ok()) {
      SLUICE_RETURN_IF_ERROR(OpenIndex(dir, **index, container));
      return true;
    }
    if (!absl::IsNotFound(index.status())) return index.status();
    SLUICE_ASSIGN_OR_RETURN(const std::vector<std::string> names, dir.List());
    std::vector<std::string> candidates;
    for (const std::string& name : names) {
      if (absl::EndsWith(name, container.suffix)) candidates.push_back(name);
    }
    if (candidates.empty()) return false;
    if (candidates.size() > 1) {
      return absl::InvalidArgumentError(
          absl::StrCat(dir.path(), ": several weight files and no index: ", ListText(candidates),
                       "; add ", container.index, ", or keep the one file that is the model"));
    }
    single = dir.OpenFile(candidates[0]);
  }
  if (!single.ok()) return single.status();
  SLUICE_RETURN_IF_ERROR(AddFile(*std::move(single), container));
  return true;
}

absl::StatusOr<TensorSet> TensorSet::Open(const ModelDir& dir) {
  static constexpr Container kContainers[] = {
      {"model.safetensors", "model.safetensors.index.json", ".safetensors", ReadSafetensors},
      {"pytorch_model.bin", "pytorch_model.bin.index.json", ".bin", ReadTorchBin}};
  std::string wanted;
  for (const Container& container : kContainers) {
    TensorSet set;
    SLUICE_ASSIGN_OR_RETURN(const bool found, set.OpenContainer(dir, container));
    if (found) return set;
    absl::StrAppend(&wanted, wanted.empty() ? "" : ", ", container.single, ", ", container.index,
                    ", one other *", container.suffix);
  }
  SLUICE_ASSIGN_OR_RETURN(const std::vector<std::string> names, dir.List());
  return absl::NotFoundError(absl::StrCat(dir.path(), ": no weights; looked for ", wanted,
                                          "; the folder holds ", ListText(names)));
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
