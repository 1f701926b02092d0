#include "tests/services/checkpoint/torch_builder.h"

#include <map>

#include "kernels/core/check.h"
#include "tests/services/checkpoint/checkpoint_builder.h"

namespace sluice::checkpoint {
namespace {

template <typename T>
std::string Number(T value) {
  return Bytes(std::vector<T>{value});
}

struct Parts {
  std::string members, directory;
};

Parts BuildParts(const std::vector<ZipEntry>& entries) {
  Parts parts;
  for (const ZipEntry& entry : entries) {
    const auto size = static_cast<uint32_t>(entry.data.size());
    const uint32_t packed = entry.size.value_or(size), at = parts.members.size();
    const std::string name = entry.local_name.value_or(entry.name);
    const uint32_t local_size = entry.local_size.value_or(size);
    const uint32_t crc = entry.crc.value_or(0);
    parts.members +=
        "PK\x03\x04" + Number<uint16_t>(20) + Number(entry.local_flags.value_or(entry.flags)) +
        Number(entry.method) + Repeat<uint16_t>(0, 2) + Number(crc) + Repeat(local_size, 2) +
        Number<uint16_t>(name.size()) + Number<uint16_t>(0) + name + entry.data + entry.gap;
    parts.directory += "PK\x01\x02" + Repeat<uint16_t>(20, 2) + Number(entry.flags) +
                       Number(entry.method) + Repeat<uint16_t>(0, 2) + Number(crc) +
                       Number(packed) + Number(entry.unpacked_size.value_or(packed)) +
                       Number<uint16_t>(entry.name.size()) + Number<uint16_t>(entry.extra.size()) +
                       Repeat<uint16_t>(0, 3) + Number<uint32_t>(0) +
                       Number(entry.offset.value_or(at)) + entry.name + entry.extra;
  }
  return parts;
}

std::string End(uint16_t count, uint32_t size, uint32_t offset) {
  return "PK\x05\x06" + Number<uint32_t>(0) + Repeat(count, 2) + Number(size) + Number(offset) +
         Number<uint16_t>(0);
}

}  // namespace

std::string ZipFile(const std::vector<ZipEntry>& entries) {
  const Parts parts = BuildParts(entries);
  return parts.members + parts.directory +
         End(entries.size(), parts.directory.size(), parts.members.size());
}

std::string Zip64File(const std::vector<ZipEntry>& entries, uint64_t count) {
  const Parts parts = BuildParts(entries);
  const std::string whole = parts.members + parts.directory;
  return whole + "PK\x06\x06" + Number<uint64_t>(44) + Repeat<uint16_t>(45, 2) +
         Repeat<uint32_t>(0, 2) + Repeat(count, 2) + Number<uint64_t>(parts.directory.size()) +
         Number<uint64_t>(parts.members.size()) + "PK\x06\x07" + Number<uint32_t>(0) +
         Number<uint64_t>(whole.size()) + Number<uint32_t>(1) + End(0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF);
}

std::string TorchFile(const std::string& pickle, const std::vector<std::string>& storages) {
  std::vector<ZipEntry> entries = {{"m/data.pkl", pickle}, {"m/byteorder", "little"}};
  for (size_t i = 0; i < storages.size(); ++i) {
    entries.push_back({"m/data/" + std::to_string(i), storages[i]});
  }
  entries.push_back({"m/version", "3\n"});
  return ZipFile(entries);
}

std::string Text(const std::string& text) { return "X" + Number<uint32_t>(text.size()) + text; }
std::string Int(int64_t value) { return "\x8A\x08" + Number(value); }
std::string Global(const std::string& module, const std::string& name) {
  return "c" + module + "\n" + name + "\n";
}

std::string Tuple(const std::vector<std::string>& items) {
  std::string code = "(";
  for (const std::string& item : items) code += item;
  return code + "t";
}

std::string Ints(const std::vector<int64_t>& values) {
  std::vector<std::string> items;
  for (const int64_t value : values) items.push_back(Int(value));
  return Tuple(items);
}

std::string Pickle(const std::string& body) { return "\x80\x02" + body + "."; }

std::string Dict(const std::vector<std::string>& items) {
  std::string code = "}(";
  for (const std::string& item : items) code += item;
  return code + "u";
}

std::string PickledTensor::Code() const {
  const std::string id =
      Tuple({Text("storage"), Global("torch", storage), Text(key), Text("cpu"), Int(elements)});
  return Global("torch._utils", "_rebuild_tensor_v2") +
         Tuple({id + "Q", Int(offset), Ints(shape), Ints(strides), "\x89",
                Global("collections", "OrderedDict") + ")R"}) +
         "R";
}

std::string TorchFile(const TensorSet& set) {
  static const std::map<std::string, std::string> kStorages = {
      {"F32", "FloatStorage"}, {"F16", "HalfStorage"},  {"BF16", "BFloat16Storage"},
      {"I32", "IntStorage"},   {"I64", "LongStorage"},  {"I16", "ShortStorage"},
      {"U8", "ByteStorage"},   {"BOOL", "BoolStorage"}, {"I8", "CharStorage"}};
  std::vector<std::string> items, storages;
  for (const StoredTensor& stored : set.tensors()) {
    PickledTensor tensor;
    tensor.storage = kStorages.at(stored.dtype.name);
    tensor.key = std::to_string(storages.size());
    tensor.elements = static_cast<int64_t>(stored.bytes / stored.dtype.block_bytes);
    tensor.shape.assign(stored.shape.begin(), stored.shape.end());
    tensor.strides.assign(stored.shape.size(), 1);
    for (size_t i = stored.shape.size(); i-- > 1;) {
      tensor.strides[i - 1] = tensor.strides[i] * tensor.shape[i];
    }
    std::string data(stored.bytes, '\0');
    SLUICE_CHECK(stored.file->ReadAt(stored.offset, stored.bytes, data.data()).ok());
    items.push_back(Text(stored.name));
    items.push_back(tensor.Code());
    storages.push_back(std::move(data));
  }
  return TorchFile(Pickle(Dict(items)), storages);
}

}  // namespace sluice::checkpoint
