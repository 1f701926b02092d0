#include "services/checkpoint/safetensors.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/core/status_macros.h"
#include "services/checkpoint/json.h"

namespace sluice::checkpoint {
namespace {

constexpr uint64_t kMaxHeaderBytes = 25'000'000;
constexpr uint64_t kLengthBytes = 8;

absl::StatusOr<std::string> ReadHeader(const File& file) {
  if (file.size() < kLengthBytes)
    return BrokenFile(file.name(), "shorter than a safetensors header");
  uint64_t length;
  SLUICE_RETURN_IF_ERROR(file.ReadAt(0, kLengthBytes, &length));
  if (length > kMaxHeaderBytes) {
    return BrokenFile(file.name(), absl::StrCat("header of ", length, " bytes, more than the ",
                                                kMaxHeaderBytes, " allowed"));
  }
  if (length > file.size() - kLengthBytes) {
    return BrokenFile(file.name(),
                      absl::StrCat("header of ", length, " bytes in a file of ", file.size()));
  }
  std::string header(length, '\0');
  SLUICE_RETURN_IF_ERROR(file.ReadAt(kLengthBytes, length, header.data()));
  if (header.empty() || header[0] != '{')
    return BrokenFile(file.name(), "header must start with '{'");
  return header;
}

// A list of whole numbers.
absl::StatusOr<Shape> UintList(const Json& entry, const char* key, const std::string& what) {
  const auto it = entry.find(key);
  if (it == entry.end() || !it->is_array() || it->size() > kMaxDims) {
    return BrokenFile(what, absl::StrCat(key, " must be a list of at most ", kMaxDims, " numbers"));
  }
  Shape list;
  for (const Json& value : *it) {
    uint64_t number = 0;
    if (!AsUint(value, &number)) {
      return BrokenFile(what, absl::StrCat(key, " must hold whole numbers from 0"));
    }
    list.push_back(number);
  }
  return list;
}

// Checks one entry of the header; `data` is where the data starts in the file.
absl::StatusOr<StoredTensor> ParseEntry(const std::string& name, const Json& entry,
                                        const File& file, uint64_t data) {
  if (name.empty() || name.size() > kMaxTensorNameBytes) {
    return BrokenFile(file.name(),
                      absl::StrCat("a tensor name must have 1 to ", kMaxTensorNameBytes, " bytes"));
  }
  const std::string what = absl::StrCat(file.name(), ": tensor ", name);
  if (!entry.is_object()) return BrokenFile(what, "must be described by an object");
  const auto dtype_name = entry.find("dtype");
  if (dtype_name == entry.end() || !dtype_name->is_string())
    return BrokenFile(what, "dtype is missing");
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
    return BrokenFile(what, "data_offsets must be two numbers, begin <= end");
  }
  if (offsets[1] > file.size() - data) {
    return BrokenFile(what, absl::StrCat("ends at byte ", offsets[1], " of ", file.size() - data,
                                         " bytes of data"));
  }
  if (offsets[1] - offsets[0] != tensor.bytes) {
    return BrokenFile(
        what, absl::StrCat("shape ", ShapeText(tensor.shape), " of ", tensor.dtype.name, " needs ",
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
      return BrokenFile(what,
                        absl::StrCat("data_offsets leave a gap or overlap at byte ", end - data));
    }
    if (empty) return BrokenFile(what, "shares its offset with a tensor of no elements");
    end = tensor.offset + tensor.bytes;
    empty = tensor.bytes == 0;
  }
  if (end != file.size()) {
    return BrokenFile(file.name(), absl::StrCat(file.size() - end,
                                                " bytes after the last tensor belong to none"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<TensorFile> ReadSafetensors(const File& file) {
  TensorFile result;
  SLUICE_ASSIGN_OR_RETURN(result.header, ReadHeader(file));
  SLUICE_ASSIGN_OR_RETURN(const Json json, ParseJsonObject(result.header, file.name()));
  if (json.size() > kMaxTensors) {
    return BrokenFile(file.name(), absl::StrCat("more than ", kMaxTensors, " tensors"));
  }
  const uint64_t data = kLengthBytes + result.header.size();
  for (const auto& [name, entry] : json.items()) {
    if (name == "__metadata__") {
      if (!entry.is_object()) return BrokenFile(file.name(), "__metadata__ must be an object");
      for (const auto& [key, value] : entry.items()) {
        if (!value.is_string()) {
          return BrokenFile(file.name(), "__metadata__ must map strings to strings");
        }
        result.metadata.emplace(key, value.get<std::string>());
      }
      continue;
    }
    SLUICE_ASSIGN_OR_RETURN(StoredTensor tensor, ParseEntry(name, entry, file, data));
    result.tensors.push_back(std::move(tensor));
  }
  std::sort(result.tensors.begin(), result.tensors.end(),
            [](const StoredTensor& a, const StoredTensor& b) {
              return std::pair(a.offset, a.bytes) < std::pair(b.offset, b.bytes);
            });
  SLUICE_RETURN_IF_ERROR(CheckCoverage(result.tensors, file, data));
  return result;
}

}  // namespace sluice::checkpoint
