#include "services/checkpoint/json.h"

#include <cmath>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"

namespace sluice::checkpoint {
namespace {

constexpr size_t kMaxDepth = 32;
constexpr size_t kMaxMemory = 24 << 20;      // Of all values together, as estimated below.
constexpr size_t kMaxStringBytes = 1 << 20;  // The parser holds a string twice while it grows.

// What a value takes: an element of a list while the list grows, a member with its node, a string
// or container with its own block.
constexpr size_t kElementBytes = 48, kMemberBytes = 112, kBlockBytes = 64;
size_t StringBytes(size_t size) { return size > 15 ? size + 32 : 0; }

// Whether a string of `text`, broken JSON or not, is longer than the cap.
bool HasLongString(const std::string& text) {
  size_t begin = 0;
  bool inside = false;
  for (size_t i = 0; i < text.size(); ++i) {
    if (inside && text[i] == '\\') {
      ++i;
    } else if (text[i] == '"') {
      inside = !inside;
      begin = i;
    }
    if (inside && i - begin > kMaxStringBytes) return true;
  }
  return false;
}

// Builds a Json from parse events and stops at the first broken cap; no exception is thrown.
class CappedBuilder : public nlohmann::json_sax<Json> {
 public:
  explicit CappedBuilder(Json* root) : root_(root) {}
  const std::string& error() const { return error_; }

  bool null() override { return Add(nullptr) != nullptr; }
  bool boolean(bool value) override { return Add(value) != nullptr; }
  bool number_integer(number_integer_t value) override { return Add(value) != nullptr; }
  bool number_unsigned(number_unsigned_t value) override { return Add(value) != nullptr; }
  bool number_float(number_float_t value, const string_t& text) override {
    if (!std::isfinite(value)) return Fail("a number out of range");
    return Add(value) != nullptr;
  }
  bool string(string_t& value) override {
    return Charge(kBlockBytes + StringBytes(value.size())) && Add(std::move(value)) != nullptr;
  }
  bool binary(binary_t&) override { return Fail("binary data"); }
  bool start_object(std::size_t) override { return Push(Json::object()); }
  bool start_array(std::size_t) override { return Push(Json::array()); }
  bool end_object() override { return Pop(); }
  bool end_array() override { return Pop(); }
  bool key(string_t& name) override {
    if (stack_.back()->contains(name)) {
      return Fail(absl::StrCat("key \"", name.substr(0, 200), "\" appears twice in one object"));
    }
    key_ = std::move(name);
    return Charge(kMemberBytes + StringBytes(key_.size()));
  }
  bool parse_error(std::size_t position, const std::string&,
                   const nlohmann::detail::exception& error) override {
    // The exception's text quotes the input; the position is enough to find it.
    return Fail(absl::StrCat("broken JSON or a number out of range at byte ", position));
  }

 private:
  bool Fail(std::string error) {
    if (error_.empty()) error_ = std::move(error);
    return false;
  }

  bool Charge(size_t bytes) {
    memory_ += bytes;
    return memory_ <= kMaxMemory ||
           Fail(absl::StrCat("values of more than ", kMaxMemory, " bytes"));
  }

  template <typename T>
  Json* Add(T&& value) {
    if (stack_.empty()) {
      *root_ = std::forward<T>(value);
      return root_;
    }
    Json& parent = *stack_.back();
    if (parent.is_array()) {
      if (!Charge(kElementBytes)) return nullptr;
      parent.push_back(std::forward<T>(value));
      return &parent.back();
    }
    Json& member = parent[key_];
    member = std::forward<T>(value);
    return &member;
  }

  bool Push(Json container) {
    if (stack_.size() >= kMaxDepth) return Fail(absl::StrCat("deeper than ", kMaxDepth, " levels"));
    Json* added = Charge(kBlockBytes) ? Add(std::move(container)) : nullptr;
    if (added == nullptr) return false;
    stack_.push_back(added);
    return true;
  }

  bool Pop() {
    stack_.pop_back();
    return true;
  }

  Json* const root_;
  std::vector<Json*> stack_;  // Open containers; a parent is not touched while a child is open.
  std::string key_;
  std::string error_;
  size_t memory_ = 0;
};

}  // namespace

absl::StatusOr<Json> ParseJsonObject(const std::string& text, const std::string& file) {
  if (HasLongString(text)) {
    return absl::InvalidArgumentError(absl::StrCat(
        file, ": a string of more than ", kMaxStringBytes, " bytes; download the file again"));
  }
  Json root;
  CappedBuilder builder(&root);
  if (!Json::sax_parse(text, &builder)) {
    return absl::InvalidArgumentError(
        absl::StrCat(file, ": ", builder.error(), "; download the file again"));
  }
  if (!root.is_object()) {
    return absl::InvalidArgumentError(
        absl::StrCat(file, ": must hold one JSON object; download the file again"));
  }
  return root;
}

bool AsUint(const Json& value, uint64_t* number) {
  if (!value.is_number_integer()) return false;
  if (!value.is_number_unsigned() && value.get<int64_t>() < 0) return false;
  *number = value.get<uint64_t>();
  return true;
}

const Json* JsonFields::Find(const char* key) const {
  const auto it = object_.find(key);
  return it == object_.end() || it->is_null() ? nullptr : &*it;
}

bool JsonFields::Has(const char* key) const { return Find(key) != nullptr; }

void JsonFields::Fail(const char* key, const std::string& rule) {
  if (!status_.ok()) return;
  status_ = absl::InvalidArgumentError(
      absl::StrCat(file_, ": ", key, " ", rule, "; correct it, or download the file again"));
}

uint64_t JsonFields::Uint(const char* key, uint64_t lo, uint64_t hi) {
  if (!Has(key)) {
    Fail(key, "is missing");
    return lo;
  }
  return UintOr(key, lo, hi, lo);
}

uint64_t JsonFields::UintOr(const char* key, uint64_t lo, uint64_t hi, uint64_t fallback) {
  const Json* value = Find(key);
  if (value == nullptr) return fallback;
  uint64_t number = 0;
  if (AsUint(*value, &number) && number >= lo && number <= hi) return number;
  Fail(key, absl::StrCat("must be a whole number from ", lo, " to ", hi));
  return fallback;
}

int64_t JsonFields::IntOr(const char* key, int64_t lo, int64_t hi, int64_t fallback) {
  const Json* value = Find(key);
  if (value == nullptr) return fallback;
  const bool small = value->is_number_integer() &&
                     (!value->is_number_unsigned() || value->get<uint64_t>() <= INT64_MAX);
  if (small && value->get<int64_t>() >= lo && value->get<int64_t>() <= hi) {
    return value->get<int64_t>();
  }
  Fail(key, absl::StrCat("must be a whole number from ", lo, " to ", hi));
  return fallback;
}

double JsonFields::DoubleOr(const char* key, double lo, double hi, double fallback) {
  const Json* value = Find(key);
  if (value == nullptr) return fallback;
  if (value->is_number()) {
    const auto number = value->get<double>();
    if (number >= lo && number <= hi) return number;
  }
  Fail(key, absl::StrCat("must be a number from ", lo, " to ", hi));
  return fallback;
}

bool JsonFields::BoolOr(const char* key, bool fallback) {
  const Json* value = Find(key);
  if (value == nullptr) return fallback;
  if (value->is_boolean()) return value->get<bool>();
  Fail(key, "must be true or false");
  return fallback;
}

std::string JsonFields::TextOr(const char* key, const std::string& fallback) {
  const Json* value = Find(key);
  if (value == nullptr) return fallback;
  if (value->is_string()) return value->get<std::string>();
  Fail(key, "must be a string");
  return fallback;
}

Json JsonFields::ObjectOr(const char* key) {
  const Json* value = Find(key);
  if (value == nullptr) return nullptr;
  if (value->is_object()) return *value;
  Fail(key, "must be an object");
  return nullptr;
}

}  // namespace sluice::checkpoint
