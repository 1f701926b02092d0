// Typed access to the values of a GGUF file.
#include "absl/strings/str_cat.h"
#include "kernels/core/status_macros.h"
#include "services/checkpoint/gguf.h"

namespace sluice::checkpoint {
namespace {

bool IsSigned(GgufType type) {
  return type == GgufType::kI8 || type == GgufType::kI16 || type == GgufType::kI32 ||
         type == GgufType::kI64;
}

bool IsInteger(GgufType type) {
  return IsSigned(type) || type == GgufType::kU8 || type == GgufType::kU16 ||
         type == GgufType::kU32 || type == GgufType::kU64;
}

absl::Status Bad(const File& file, const std::string& key, const std::string& rule) {
  return absl::InvalidArgumentError(
      absl::StrCat(file.name(), ": key ", key, " ", rule, "; convert the model again"));
}

}  // namespace

const GgufTensor* GgufFile::Find(const std::string& name) const {
  const auto it = by_name_.find(name);
  return it == by_name_.end() ? nullptr : &tensors_[it->second];
}

absl::StatusOr<const GgufValue*> GgufFile::Value(const std::string& key) const {
  const auto it = values_.find(key);
  if (it == values_.end()) return Bad(*file_, key, "is missing");
  return &it->second;
}

absl::StatusOr<uint64_t> GgufFile::Uint(const std::string& key, uint64_t lo, uint64_t hi) const {
  SLUICE_ASSIGN_OR_RETURN(const GgufValue* value, Value(key));
  const bool negative = IsSigned(value->type) && static_cast<int64_t>(value->bits) < 0;
  if (!IsInteger(value->type) || negative || value->bits < lo || value->bits > hi) {
    return Bad(*file_, key, absl::StrCat("must be a whole number from ", lo, " to ", hi));
  }
  return value->bits;
}

absl::StatusOr<double> GgufFile::Double(const std::string& key, double lo, double hi) const {
  SLUICE_ASSIGN_OR_RETURN(const GgufValue* value, Value(key));
  const bool floating = value->type == GgufType::kF32 || value->type == GgufType::kF64;
  if (!floating || !(value->number >= lo && value->number <= hi)) {
    return Bad(*file_, key, absl::StrCat("must be a float from ", lo, " to ", hi));
  }
  return value->number;
}

absl::StatusOr<bool> GgufFile::Bool(const std::string& key) const {
  SLUICE_ASSIGN_OR_RETURN(const GgufValue* value, Value(key));
  if (value->type != GgufType::kBool || value->bits > 1) return Bad(*file_, key, "must be a bool");
  return value->bits == 1;
}

absl::StatusOr<std::string> GgufFile::Text(const std::string& key) const {
  SLUICE_ASSIGN_OR_RETURN(const GgufValue* value, Value(key));
  if (value->type != GgufType::kString) return Bad(*file_, key, "must be a string");
  return value->text;
}

absl::StatusOr<const std::vector<std::string>*> GgufFile::Texts(const std::string& key) const {
  SLUICE_ASSIGN_OR_RETURN(const GgufValue* value, Value(key));
  if (value->type != GgufType::kArray || value->element != GgufType::kString) {
    return Bad(*file_, key, "must be an array of strings");
  }
  return &value->texts;
}

absl::StatusOr<const std::vector<int64_t>*> GgufFile::Integers(const std::string& key) const {
  SLUICE_ASSIGN_OR_RETURN(const GgufValue* value, Value(key));
  if (value->type != GgufType::kArray || !IsInteger(value->element)) {
    return Bad(*file_, key, "must be an array of integers");
  }
  return &value->integers;
}

absl::StatusOr<const std::vector<float>*> GgufFile::Floats(const std::string& key) const {
  SLUICE_ASSIGN_OR_RETURN(const GgufValue* value, Value(key));
  if (value->type != GgufType::kArray || value->element != GgufType::kF32) {
    return Bad(*file_, key, "must be an array of float32");
  }
  return &value->floats;
}

void GgufFile::Drop(const std::string& prefix) {
  absl::erase_if(values_,
                 [&prefix](const auto& entry) { return entry.first.rfind(prefix, 0) == 0; });
}

}  // namespace sluice::checkpoint
