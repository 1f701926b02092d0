// JSON of a model's folder: parsed under caps, with duplicate keys refused, and read by typed,
// range-checked accessors.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"

namespace sluice::checkpoint {

using Json = nlohmann::json;

// Parses one JSON object. INVALID_ARGUMENT, naming `file`: broken JSON, a value other than an
// object, deeper than 32 levels, a key twice in one object, a number out of range, a string of more
// than 1 MiB, values that would take more than 24 MiB.
absl::StatusOr<Json> ParseJsonObject(const std::string& text, const std::string& file);

// Whether `value` is a whole number from 0 to 2^64 - 1; then `number` takes it.
bool AsUint(const Json& value, uint64_t* number);

// Reads members of one object. The first broken rule is kept in status(); after it every accessor
// returns its fallback, so that a caller checks once at the end. A member that is null counts as
// absent. `object` must outlive it.
class JsonFields {
 public:
  JsonFields(const Json& object, std::string file) : object_(object), file_(std::move(file)) {}

  bool Has(const char* key) const;

  // A whole number lo..hi; the first form requires it.
  uint64_t Uint(const char* key, uint64_t lo, uint64_t hi);
  uint64_t UintOr(const char* key, uint64_t lo, uint64_t hi, uint64_t fallback);
  int64_t IntOr(const char* key, int64_t lo, int64_t hi, int64_t fallback);
  double DoubleOr(const char* key, double lo, double hi, double fallback);
  bool BoolOr(const char* key, bool fallback);
  std::string TextOr(const char* key, const std::string& fallback);
  // An object; null JSON when absent.
  Json ObjectOr(const char* key);

  // Sets status() if it is still OK.
  void Fail(const char* key, const std::string& rule);
  const absl::Status& status() const { return status_; }
  const std::string& file() const { return file_; }

 private:
  const Json* Find(const char* key) const;

  const Json& object_;
  const std::string file_;
  absl::Status status_;
};

}  // namespace sluice::checkpoint
