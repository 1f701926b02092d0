#include "services/checkpoint/torch_bin.h"

#include <algorithm>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "kernels/core/status_macros.h"
#include "services/checkpoint/pickle.h"
#include "services/checkpoint/zip.h"

namespace sluice::checkpoint {
namespace {

using Kind = PickleValue::Kind;

absl::StatusOr<SourceDType> StorageDType(const std::string& storage, const std::string& what) {
  static constexpr std::pair<const char*, const char*> kTypes[] = {
      {"torch FloatStorage", "F32"},     {"torch HalfStorage", "F16"},
      {"torch BFloat16Storage", "BF16"}, {"torch DoubleStorage", "F64"},
      {"torch IntStorage", "I32"},       {"torch LongStorage", "I64"},
      {"torch ShortStorage", "I16"},     {"torch CharStorage", "I8"},
      {"torch ByteStorage", "U8"},       {"torch BoolStorage", "BOOL"}};
  for (const auto& [name, dtype] : kTypes) {
    if (storage == name) return SafetensorsDType(dtype);
  }
  return BrokenFile(what, "its storage has no known type");
}

// A storage as the pickle names it, found in the archive.
struct Storage {
  SourceDType dtype;
  uint64_t elements = 0;
  uint64_t offset = 0;  // From the start of the file.
};

class TorchFile {
 public:
  explicit TorchFile(const File& file) : file_(file) {}

  absl::StatusOr<TensorFile> Read() {
    SLUICE_RETURN_IF_ERROR(CheckKind());
    SLUICE_RETURN_IF_ERROR(FindMembers());
    TensorFile result;
    SLUICE_ASSIGN_OR_RETURN(result.header, ReadMember("data.pkl", kMaxPickleBytes));
    SLUICE_ASSIGN_OR_RETURN(
        graph_, ReadPickle(result.header, absl::StrCat(file_.name(), ": ", root_, "data.pkl")));
    const PickleValue& root = graph_[graph_.root];
    if (root.kind != Kind::kDict) {
      return BrokenFile(file_.name(), "data.pkl must hold a dict of tensors (a state dict)");
    }
    if (root.items.size() / 2 > kMaxTensors) {
      return BrokenFile(file_.name(), absl::StrCat("more than ", kMaxTensors, " tensors"));
    }
    absl::flat_hash_set<std::string> names;
    for (size_t i = 0; i < root.items.size(); i += 2) {
      SLUICE_ASSIGN_OR_RETURN(StoredTensor tensor,
                              ReadTensor(graph_[root.items[i]], graph_[root.items[i + 1]]));
      if (!names.insert(tensor.name).second) {
        return BrokenFile(file_.name(), absl::StrCat("tensor ", tensor.name, " is there twice"));
      }
      result.tensors.push_back(std::move(tensor));
    }
    std::stable_sort(result.tensors.begin(), result.tensors.end(),
                     [](const auto& a, const auto& b) { return a.offset < b.offset; });
    return result;
  }

 private:
  // Other things that are called .bin.
  absl::Status CheckKind() const {
    char begin[4] = {};
    if (file_.size() < sizeof(begin)) return BrokenFile(file_.name(), "shorter than a zip archive");
    SLUICE_RETURN_IF_ERROR(file_.ReadAt(0, sizeof(begin), begin));
    if (begin[0] == '\x80') {
      return absl::UnimplementedError(
          absl::StrCat(file_.name(),
                       ": a bare pickle, as PyTorch wrote it before 1.6, is not supported; load "
                       "and save it once with a newer PyTorch, or save the model as safetensors"));
    }
    if (std::string(begin, sizeof(begin)) == "PK\x03\x04") return absl::OkStatus();
    return BrokenFile(file_.name(), "not a zip archive, as torch.save writes it");
  }

  // The archive's one folder, and what lies in it.
  absl::Status FindMembers() {
    SLUICE_ASSIGN_OR_RETURN(const std::vector<ZipMember> members, ReadZipDirectory(file_));
    root_ = members[0].name.substr(0, members[0].name.find('/') + 1);
    for (const ZipMember& member : members) {
      if (root_.empty() || !absl::StartsWith(member.name, root_)) {
        return BrokenFile(file_.name(), absl::StrCat("zip member ", member.name,
                                                     " is not in the archive's one folder"));
      }
      members_.emplace(member.name.substr(root_.size()), member);
    }
    if (!members_.contains("byteorder")) return absl::OkStatus();
    SLUICE_ASSIGN_OR_RETURN(const std::string order, ReadMember("byteorder", 16));
    if (order == "little") return absl::OkStatus();
    return absl::UnimplementedError(
        absl::StrCat(file_.name(), ": byteorder must be little; save the model as safetensors"));
  }

  absl::StatusOr<std::string> ReadMember(const std::string& name, uint64_t cap) const {
    const auto it = members_.find(name);
    if (it == members_.end()) {
      return BrokenFile(file_.name(), absl::StrCat("zip member ", root_, name, " is missing"));
    }
    if (it->second.size > cap) {
      return BrokenFile(file_.name(), absl::StrCat("zip member ", root_, name, " of ",
                                                   it->second.size, " bytes, allowed are ", cap));
    }
    std::string content(it->second.size, '\0');
    SLUICE_RETURN_IF_ERROR(file_.ReadAt(it->second.offset, it->second.size, content.data()));
    if (!ChecksumFits(it->second, content)) {
      return BrokenFile(file_.name(), absl::StrCat("zip member ", root_, name,
                                                   " does not have the checksum that is stored"));
    }
    return content;
  }

  // ("storage", type, key, device, elements)
  absl::StatusOr<Storage> FindStorage(const PickleValue& value, const std::string& what) const {
    static constexpr Kind kKinds[] = {Kind::kString, Kind::kGlobal, Kind::kString, Kind::kString,
                                      Kind::kInt};
    bool as_expected = value.kind == Kind::kStorage && value.items.size() == std::size(kKinds);
    for (size_t i = 0; as_expected && i < std::size(kKinds); ++i) {
      as_expected = graph_[value.items[i]].kind == kKinds[i];
    }
    if (!as_expected || graph_[value.items[0]].text != "storage") {
      return BrokenFile(what, "its storage must be (\"storage\", type, key, device, elements)");
    }
    Storage storage;
    SLUICE_ASSIGN_OR_RETURN(storage.dtype, StorageDType(graph_[value.items[1]].text, what));
    const std::string name = absl::StrCat("data/", graph_[value.items[2]].text);
    const auto member = members_.find(name);
    if (member == members_.end()) {
      return BrokenFile(what, "its storage is not in the archive");
    }
    const int64_t elements = graph_[value.items[4]].number;
    const uint64_t size = member->second.size;
    if (elements < 0 || static_cast<uint64_t>(elements) != size / storage.dtype.block_bytes ||
        size % storage.dtype.block_bytes != 0) {
      return BrokenFile(
          what, absl::StrCat("its storage ", root_, name, " has ", size, " bytes, not ", elements,
                             " elements of ", storage.dtype.name));
    }
    storage.elements = static_cast<uint64_t>(elements);
    storage.offset = member->second.offset;
    return storage;
  }

  // A tuple, or torch.Size of a tuple, of whole numbers from 0.
  absl::StatusOr<Shape> UintTuple(const PickleValue& value, const std::string& what) const {
    if (value.kind == Kind::kCall && value.text == "torch Size" && value.items.size() == 1 &&
        graph_[value.items[0]].kind == Kind::kTuple) {
      return UintTuple(graph_[value.items[0]], what);
    }
    if (value.kind != Kind::kTuple || value.items.size() > kMaxDims) {
      return BrokenFile(what, absl::StrCat("must be a tuple of at most ", kMaxDims, " numbers"));
    }
    Shape numbers;
    for (const uint32_t item : value.items) {
      if (graph_[item].kind != Kind::kInt || graph_[item].number < 0) {
        return BrokenFile(what, "must hold whole numbers from 0");
      }
      numbers.push_back(static_cast<uint64_t>(graph_[item].number));
    }
    return numbers;
  }

  // The call that makes the tensor, with a parameter's wrapping taken off; null for anything else.
  const PickleValue* TensorCall(const PickleValue& value) const {
    const PickleValue* call = &value;
    if (call->kind == Kind::kCall && call->text == "torch._utils _rebuild_parameter" &&
        call->items.size() == 3) {
      call = &graph_[call->items[0]];
    }
    const bool tensor = call->kind == Kind::kCall &&
                        call->text == "torch._utils _rebuild_tensor_v2" &&
                        (call->items.size() == 6 || call->items.size() == 7);
    return tensor ? call : nullptr;
  }

  absl::StatusOr<StoredTensor> ReadTensor(const PickleValue& key, const PickleValue& value) const {
    if (key.kind != Kind::kString || key.text.empty() || key.text.size() > kMaxTensorNameBytes) {
      return BrokenFile(file_.name(), absl::StrCat("a tensor name must be a text of 1 to ",
                                                   kMaxTensorNameBytes, " bytes"));
    }
    const std::string what = absl::StrCat(file_.name(), ": tensor ", ListText({key.text}));
    const PickleValue* call = TensorCall(value);
    if (call == nullptr) {
      return BrokenFile(what, "the state dict must hold tensors only, directly under their names");
    }
    SLUICE_ASSIGN_OR_RETURN(const Storage storage, FindStorage(graph_[call->items[0]], what));
    StoredTensor tensor;
    tensor.name = key.text;
    tensor.dtype = storage.dtype;
    tensor.file = &file_;
    SLUICE_ASSIGN_OR_RETURN(tensor.shape,
                            UintTuple(graph_[call->items[2]], absl::StrCat(what, ": shape")));
    SLUICE_ASSIGN_OR_RETURN(const Shape strides,
                            UintTuple(graph_[call->items[3]], absl::StrCat(what, ": strides")));
    SLUICE_ASSIGN_OR_RETURN(tensor.bytes, TensorBytes(tensor.dtype, tensor.shape, what));
    SLUICE_RETURN_IF_ERROR(CheckOnePiece(tensor, strides, what));
    const PickleValue& first = graph_[call->items[1]];
    const uint64_t elements = tensor.bytes / tensor.dtype.block_bytes;
    if (first.kind != Kind::kInt || first.number < 0 ||
        static_cast<uint64_t>(first.number) > storage.elements ||
        elements > storage.elements - static_cast<uint64_t>(first.number)) {
      return BrokenFile(what, absl::StrCat("offset ", first.number, " and ", elements,
                                           " elements leave its storage of ", storage.elements));
    }
    tensor.offset = storage.offset + static_cast<uint64_t>(first.number) * tensor.dtype.block_bytes;
    return tensor;
  }

  static absl::Status CheckOnePiece(const StoredTensor& tensor, const Shape& strides,
                                    const std::string& what) {
    if (strides.size() != tensor.shape.size()) {
      return BrokenFile(what, "needs one stride for each dimension");
    }
    uint64_t expected = 1;  // Fits: the product of the shape does.
    for (size_t i = strides.size(); tensor.bytes > 0 && i-- > 0;) {
      if (tensor.shape[i] != 1 && strides[i] != expected) {
        return absl::UnimplementedError(
            absl::StrCat(what, ": does not lie in one piece (shape ", ShapeText(tensor.shape),
                         ", strides ", ShapeText(strides),
                         "), which is not supported; save it with .contiguous(), or the "
                         "model as safetensors"));
      }
      expected *= tensor.shape[i];
    }
    return absl::OkStatus();
  }

  const File& file_;
  std::string root_;                                     // The archive's folder, with its slash.
  absl::flat_hash_map<std::string, ZipMember> members_;  // By name below it.
  PickleGraph graph_;
};

}  // namespace

absl::StatusOr<TensorFile> ReadTorchBin(const File& file) { return TorchFile(file).Read(); }

}  // namespace sluice::checkpoint
