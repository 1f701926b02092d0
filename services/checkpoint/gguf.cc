#include "services/checkpoint/gguf.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/core/status_macros.h"
#include "services/checkpoint/hash.h"

namespace sluice::checkpoint {
namespace {

constexpr uint64_t kMaxHeaderBytes = 32'000'000;
constexpr uint64_t kMaxValueBytes = 32 << 20;  // Of all keys in memory.
constexpr uint64_t kMaxEntries = 100'000;
constexpr uint64_t kMaxKeyBytes = 256;
constexpr uint64_t kMaxNameBytes = 512;
constexpr uint64_t kMaxStringBytes = 4'000'000;
constexpr uint64_t kMaxElements = 4'000'000;
constexpr uint64_t kMaxDims = 4;
constexpr uint64_t kMaxDim = (uint64_t{1} << 31) - 1;
constexpr uint64_t kMaxAlignment = 65'536;
constexpr uint64_t kMinKeyBytes = 8 + 1 + 4 + 1;  // Name of one byte, type, one byte of value.
constexpr uint64_t kMinTensorBytes = 8 + 1 + 4 + 8 + 4 + 8;  // One dimension.

absl::Status Bad(const File& file, const std::string& rule) {
  return absl::InvalidArgumentError(
      absl::StrCat(file.name(), ": ", rule, "; download the file again"));
}

// Reads the header front to back through a window; every read is checked against the header cap and
// the file's size.
class Cursor {
 public:
  explicit Cursor(const File& file)
      : file_(file), limit_(std::min<uint64_t>(file.size(), kMaxHeaderBytes)) {}

  uint64_t position() const { return position_; }
  uint64_t remaining() const { return limit_ - position_; }

  absl::Status Bytes(void* out, uint64_t size) {
    if (size > remaining()) {
      return Bad(file_,
                 absl::StrCat("header ends within the ", size, " bytes at byte ", position_));
    }
    auto* to = static_cast<char*>(out);
    while (size > 0) {
      if (used_ == window_.size()) {
        window_.resize(std::min<uint64_t>(kWindowBytes, limit_ - position_));
        used_ = 0;
        SLUICE_RETURN_IF_ERROR(file_.ReadAt(position_, window_.size(), window_.data()));
      }
      const uint64_t part = std::min<uint64_t>(size, window_.size() - used_);
      std::memcpy(to, window_.data() + used_, part);
      used_ += part;
      position_ += part;
      to += part;
      size -= part;
    }
    return absl::OkStatus();
  }

  template <typename T>
  absl::StatusOr<T> Number() {
    T value;
    SLUICE_RETURN_IF_ERROR(Bytes(&value, sizeof(value)));
    return value;
  }

  absl::StatusOr<std::string> String(uint64_t cap) {
    SLUICE_ASSIGN_OR_RETURN(const uint64_t length, Number<uint64_t>());
    if (length > cap || length > remaining()) {
      return Bad(file_, absl::StrCat("string of ", length, " bytes at byte ", position_));
    }
    std::string text(length, '\0');
    SLUICE_RETURN_IF_ERROR(Bytes(text.data(), length));
    return text;
  }

 private:
  static constexpr uint64_t kWindowBytes = 1 << 20;
  const File& file_;
  const uint64_t limit_;
  uint64_t position_ = 0;
  std::string window_;
  size_t used_ = 0;  // Bytes of the window already handed out.
};

// Counts what values take in memory against kMaxValueBytes: a byte of the file may become eight.
class Budget {
 public:
  explicit Budget(const File& file) : file_(file) {}
  absl::Status Take(uint64_t bytes) {
    if (bytes > left_) {
      return Bad(file_, absl::StrCat("values of more than ", kMaxValueBytes, " bytes"));
    }
    left_ -= bytes;
    return absl::OkStatus();
  }
  absl::Status TakeText(uint64_t size) { return size > 15 ? Take(size + 16) : absl::OkStatus(); }

 private:
  const File& file_;
  uint64_t left_ = kMaxValueBytes;
};

template <typename T>
absl::Status ReadInteger(Cursor* cursor, uint64_t* bits) {
  SLUICE_ASSIGN_OR_RETURN(const T value, cursor->Number<T>());
  *bits = static_cast<uint64_t>(static_cast<int64_t>(value));
  return absl::OkStatus();
}

template <typename T>
absl::Status ReadFloating(Cursor* cursor, double* number) {
  SLUICE_ASSIGN_OR_RETURN(const T value, cursor->Number<T>());
  *number = static_cast<double>(value);
  return absl::OkStatus();
}

// 0 for a type that has no fixed size.
uint64_t FixedBytes(GgufType type) {
  switch (type) {
    case GgufType::kU8:
    case GgufType::kI8:
    case GgufType::kBool:
      return 1;
    case GgufType::kU16:
    case GgufType::kI16:
      return 2;
    case GgufType::kU32:
    case GgufType::kI32:
    case GgufType::kF32:
      return 4;
    case GgufType::kU64:
    case GgufType::kI64:
    case GgufType::kF64:
      return 8;
    case GgufType::kString:
    case GgufType::kArray:
      break;
  }
  return 0;
}

bool IsFloat(GgufType type) { return type == GgufType::kF32 || type == GgufType::kF64; }

absl::Status ReadScalar(Cursor* cursor, GgufType type, GgufValue* value) {
  switch (type) {
    case GgufType::kU8:
    case GgufType::kBool:
      return ReadInteger<uint8_t>(cursor, &value->bits);
    case GgufType::kI8:
      return ReadInteger<int8_t>(cursor, &value->bits);
    case GgufType::kU16:
      return ReadInteger<uint16_t>(cursor, &value->bits);
    case GgufType::kI16:
      return ReadInteger<int16_t>(cursor, &value->bits);
    case GgufType::kU32:
      return ReadInteger<uint32_t>(cursor, &value->bits);
    case GgufType::kI32:
      return ReadInteger<int32_t>(cursor, &value->bits);
    case GgufType::kU64:
    case GgufType::kI64:
      return ReadInteger<int64_t>(cursor, &value->bits);
    case GgufType::kF32:
      return ReadFloating<float>(cursor, &value->number);
    case GgufType::kF64:
      return ReadFloating<double>(cursor, &value->number);
    case GgufType::kString:
    case GgufType::kArray:
      break;
  }
  return absl::InternalError("not a scalar");
}

absl::StatusOr<GgufType> ReadType(const File& file, Cursor* cursor) {
  SLUICE_ASSIGN_OR_RETURN(const uint32_t number, cursor->Number<uint32_t>());
  if (number > static_cast<uint32_t>(GgufType::kF64)) {
    return Bad(file, absl::StrCat("value type ", number, " is unknown"));
  }
  return static_cast<GgufType>(number);
}

absl::Status ReadArray(const File& file, Cursor* cursor, Budget* budget, GgufValue* value) {
  SLUICE_ASSIGN_OR_RETURN(value->element, ReadType(file, cursor));
  SLUICE_ASSIGN_OR_RETURN(const uint64_t count, cursor->Number<uint64_t>());
  if (value->element == GgufType::kArray) return Bad(file, "an array of arrays");
  const bool strings = value->element == GgufType::kString;
  const uint64_t least = strings ? sizeof(uint64_t) : FixedBytes(value->element);
  if (count > kMaxElements || count > cursor->remaining() / least) {
    return Bad(file, absl::StrCat("an array of ", count, " elements at byte ", cursor->position()));
  }
  if (strings) {
    SLUICE_RETURN_IF_ERROR(budget->Take(count * sizeof(std::string)));
    value->texts.reserve(count);
  } else if (IsFloat(value->element)) {
    SLUICE_RETURN_IF_ERROR(budget->Take(count * sizeof(float)));
    value->floats.reserve(count);
  } else {
    SLUICE_RETURN_IF_ERROR(budget->Take(count * sizeof(int64_t)));
    value->integers.reserve(count);
  }
  for (uint64_t i = 0; i < count; ++i) {
    if (strings) {
      SLUICE_ASSIGN_OR_RETURN(std::string text, cursor->String(kMaxStringBytes));
      SLUICE_RETURN_IF_ERROR(budget->TakeText(text.size()));
      value->texts.push_back(std::move(text));
      continue;
    }
    SLUICE_RETURN_IF_ERROR(ReadScalar(cursor, value->element, value));
    if (IsFloat(value->element)) {
      value->floats.push_back(static_cast<float>(value->number));
    } else {
      value->integers.push_back(static_cast<int64_t>(value->bits));
    }
  }
  return absl::OkStatus();
}

}  // namespace

// Fills a GgufFile from its header.
class GgufParser {
 public:
  explicit GgufParser(GgufFile* gguf) : gguf_(gguf), file_(gguf->file()), cursor_(file_) {}

  absl::Status Parse() {
    SLUICE_RETURN_IF_ERROR(ParseStart());
    for (uint64_t i = 0; i < keys_; ++i) SLUICE_RETURN_IF_ERROR(ParseKey());
    uint64_t alignment = 32;
    if (gguf_->Has("general.alignment")) {
      SLUICE_ASSIGN_OR_RETURN(alignment, gguf_->Uint("general.alignment", 1, kMaxAlignment));
    }
    if ((alignment & (alignment - 1)) != 0) {
      return Bad(file_, absl::StrCat("general.alignment ", alignment, " is no power of two"));
    }
    for (uint64_t i = 0; i < count_; ++i) SLUICE_RETURN_IF_ERROR(ParseTensor());
    SLUICE_RETURN_IF_ERROR(PlaceTensors(alignment));
    return HashHeader();
  }

 private:
  absl::Status HashHeader() {
    constexpr uint64_t kPieceBytes = 1 << 20;
    Hasher hasher;
    std::string piece;
    for (uint64_t at = 0; at < cursor_.position(); at += piece.size()) {
      piece.resize(std::min(kPieceBytes, cursor_.position() - at));
      SLUICE_RETURN_IF_ERROR(file_.ReadAt(at, piece.size(), piece.data()));
      hasher.Add(piece);
    }
    gguf_->header_hash_ = hasher.Hex();
    return absl::OkStatus();
  }

  absl::Status ParseStart() {
    std::string begin(std::min<uint64_t>(file_.size(), 64), '\0');
    SLUICE_RETURN_IF_ERROR(file_.ReadAt(0, begin.size(), begin.data()));
    SLUICE_RETURN_IF_ERROR(CheckNotLfsPointer(begin, file_.name()));
    SLUICE_ASSIGN_OR_RETURN(const uint32_t magic, cursor_.Number<uint32_t>());
    SLUICE_ASSIGN_OR_RETURN(const uint32_t version, cursor_.Number<uint32_t>());
    if (magic != 0x46554747) return Bad(file_, "does not begin with GGUF");
    if (version != 2 && version != 3) {
      const bool big_endian = (version & 0xFFFF) == 0 && version != 0;
      return absl::UnimplementedError(
          absl::StrCat(file_.name(), ": GGUF ",
                       big_endian ? "in big-endian order" : absl::StrCat("version ", version),
                       " is not supported; convert the model again (version 3, little-endian)"));
    }
    SLUICE_ASSIGN_OR_RETURN(count_, cursor_.Number<uint64_t>());
    SLUICE_ASSIGN_OR_RETURN(keys_, cursor_.Number<uint64_t>());
    if (count_ > kMaxEntries || count_ > cursor_.remaining() / kMinTensorBytes) {
      return Bad(file_, absl::StrCat("a count of ", count_, " tensors"));
    }
    if (keys_ > kMaxEntries || keys_ > cursor_.remaining() / kMinKeyBytes) {
      return Bad(file_, absl::StrCat("a count of ", keys_, " keys"));
    }
    return absl::OkStatus();
  }

  absl::Status ParseKey() {
    SLUICE_ASSIGN_OR_RETURN(std::string key, cursor_.String(kMaxKeyBytes));
    SLUICE_RETURN_IF_ERROR(budget_.Take(2 * sizeof(GgufValue) + key.size()));
    GgufValue value;
    SLUICE_ASSIGN_OR_RETURN(value.type, ReadType(file_, &cursor_));
    if (value.type == GgufType::kArray) {
      SLUICE_RETURN_IF_ERROR(ReadArray(file_, &cursor_, &budget_, &value));
    } else if (value.type == GgufType::kString) {
      SLUICE_ASSIGN_OR_RETURN(value.text, cursor_.String(kMaxStringBytes));
      SLUICE_RETURN_IF_ERROR(budget_.TakeText(value.text.size()));
    } else {
      SLUICE_RETURN_IF_ERROR(ReadScalar(&cursor_, value.type, &value));
    }
    if (gguf_->values_.contains(key))
      return Bad(file_, absl::StrCat("key ", key, " appears twice"));
    gguf_->values_.emplace(std::move(key), std::move(value));
    return absl::OkStatus();
  }

  absl::Status ParseTensor() {
    GgufTensor tensor;
    SLUICE_RETURN_IF_ERROR(budget_.Take(2 * sizeof(GgufTensor)));
    SLUICE_ASSIGN_OR_RETURN(tensor.name, cursor_.String(kMaxNameBytes));
    SLUICE_RETURN_IF_ERROR(budget_.TakeText(2 * tensor.name.size()));
    const std::string what = absl::StrCat(file_.name(), ": tensor ", tensor.name);
    SLUICE_ASSIGN_OR_RETURN(const uint32_t dims, cursor_.Number<uint32_t>());
    if (tensor.name.empty() || dims < 1 || dims > kMaxDims) {
      return Bad(file_, absl::StrCat("tensor \"", tensor.name, "\" has ", dims, " dimensions"));
    }
    tensor.shape.resize(dims);
    for (uint32_t i = 0; i < dims; ++i) {
      SLUICE_ASSIGN_OR_RETURN(const uint64_t dim, cursor_.Number<uint64_t>());
      if (dim < 1 || dim > kMaxDim) {
        return absl::InvalidArgumentError(absl::StrCat(
            what, ": dimension ", dim, " is out of range 1..2^31-1; download the file again"));
      }
      tensor.shape[dims - 1 - i] = dim;
    }
    SLUICE_ASSIGN_OR_RETURN(const uint32_t type, cursor_.Number<uint32_t>());
    SLUICE_ASSIGN_OR_RETURN(tensor.offset, cursor_.Number<uint64_t>());
    absl::StatusOr<SourceDType> dtype = GgufDType(type);
    if (!dtype.ok()) {
      return absl::UnimplementedError(
          absl::StrCat(what, ": ", std::string(dtype.status().message())));
    }
    tensor.dtype = *std::move(dtype);
    SLUICE_ASSIGN_OR_RETURN(tensor.bytes, TensorBytes(tensor.dtype, tensor.shape, what));
    if (!gguf_->by_name_.emplace(tensor.name, gguf_->tensors_.size()).second) {
      return Bad(file_, absl::StrCat("tensor ", tensor.name, " appears twice"));
    }
    gguf_->tensors_.push_back(std::move(tensor));
    return absl::OkStatus();
  }

  // Offsets must follow each other, each rounded up to the alignment, and end with the file.
  absl::Status PlaceTensors(uint64_t alignment) {
    const auto align = [alignment](uint64_t at) { return (at + alignment - 1) & ~(alignment - 1); };
    const uint64_t data = align(cursor_.position());
    uint64_t next = 0;
    for (GgufTensor& tensor : gguf_->tensors_) {
      if (tensor.offset != next) {
        return Bad(file_, absl::StrCat("tensor ", tensor.name, " lies at offset ", tensor.offset,
                                       ", but the one before ends at ", next));
      }
      tensor.offset += data;
      const bool inside =
          tensor.offset <= file_.size() && tensor.bytes <= file_.size() - tensor.offset;
      if (!inside) {
        return Bad(file_, absl::StrCat("tensor ", tensor.name, " needs ", tensor.bytes,
                                       " bytes at byte ", tensor.offset, " of ", file_.size()));
      }
      next = align(next + tensor.bytes);
    }
    if (file_.size() > data && file_.size() - data > next) {
      return Bad(file_, absl::StrCat(file_.size() - data - next, " bytes after the last tensor"));
    }
    return absl::OkStatus();
  }

  GgufFile* const gguf_;
  const File& file_;
  Cursor cursor_;
  Budget budget_{file_};
  uint64_t count_ = 0;
  uint64_t keys_ = 0;
};

absl::StatusOr<GgufFile> GgufFile::Open(std::unique_ptr<File> file) {
  GgufFile gguf;
  gguf.file_ = std::move(file);
  SLUICE_RETURN_IF_ERROR(GgufParser(&gguf).Parse());
  return gguf;
}

}  // namespace sluice::checkpoint
