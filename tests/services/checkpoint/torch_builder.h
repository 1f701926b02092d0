// PyTorch files for tests, byte by byte: zip archives whose every field can be made wrong, and
// pickles as text of opcodes.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "services/checkpoint/tensor_set.h"

namespace sluice::checkpoint {

// One member; what is set below `data` is written instead of the truth.
struct ZipEntry {
  std::string name;
  std::string data;
  uint16_t flags = 0;
  uint16_t method = 0;
  std::optional<std::string> local_name = std::nullopt;
  std::optional<uint16_t> local_flags = std::nullopt;
  std::optional<uint32_t> local_size = std::nullopt;
  std::optional<uint32_t> size = std::nullopt;           // In the directory, both sizes.
  std::optional<uint32_t> unpacked_size = std::nullopt;  // In the directory.
  std::optional<uint32_t> offset = std::nullopt;         // In the directory, of the local header.
  std::optional<uint32_t> crc = std::nullopt;            // In both headers; else 0, for none.
  std::string extra = std::string();                     // In the directory.
  std::string gap = std::string();                       // Bytes after the data.
};
std::string ZipFile(const std::vector<ZipEntry>& entries);
// With a zip64 record and locator before the end; `count` goes into the record.
std::string Zip64File(const std::vector<ZipEntry>& entries, uint64_t count);
// The archive of a pickle and storages "0", "1", ...
std::string TorchFile(const std::string& pickle, const std::vector<std::string>& storages);

// Opcodes.
std::string Text(const std::string& text);
std::string Int(int64_t value);
std::string Global(const std::string& module, const std::string& name);
std::string Tuple(const std::vector<std::string>& items);
std::string Ints(const std::vector<int64_t>& values);  // A tuple.
// A pickle of protocol 2 that leaves `body`.
std::string Pickle(const std::string& body);
// A dict: keys and values in turn.
std::string Dict(const std::vector<std::string>& items);

// A tensor as torch pickles it.
struct PickledTensor {
  std::string storage = "HalfStorage";
  std::string key = "0";
  int64_t elements = 6;
  int64_t offset = 0;
  std::vector<int64_t> shape = {2, 3};
  std::vector<int64_t> strides = {3, 1};
  std::string Code() const;
};

// The tensors of `set` as torch would save them.
std::string TorchFile(const TensorSet& set);

}  // namespace sluice::checkpoint
