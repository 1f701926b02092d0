// Logs: one JSON object a line on stderr, {"ts":..., "level":..., "program":..., "event":...,
// fields...}. Every line that concerns a request carries "request_id". Never log a prompt, an
// answer or a header's value.
//
//   LogInfo("worker_attached", {{"worker_id", id}, {"epoch", epoch}});
//
// All functions are thread-safe. Before InitLog the level is info and the program is "sluice".
#pragma once

#include <initializer_list>
#include <string>
#include <type_traits>

#include "absl/status/status.h"

namespace sluice::rpc {

// One field: a key and a JSON value.
class LogField {
 public:
  LogField(const char* key, const std::string& value) : key_(key), json_(Quote(value)) {}
  LogField(const char* key, const char* value) : key_(key), json_(Quote(value)) {}
  // "<CODE>: message", "OK".
  LogField(const char* key, const absl::Status& value)
      : key_(key), json_(Quote(value.ToString())) {}
  LogField(const char* key, bool value) : key_(key), json_(value ? "true" : "false") {}
  LogField(const char* key, double value);  // null when not finite
  template <typename T,
            std::enable_if_t<std::is_integral_v<T> && !std::is_same_v<T, bool>, int> = 0>
  LogField(const char* key, T value) : key_(key), json_(std::to_string(value)) {}

  const char* key() const { return key_; }
  const std::string& json() const { return json_; }

  // A JSON string with its quotes. Control characters are escaped; bytes that are not UTF-8 become
  // U+FFFD.
  static std::string Quote(const std::string& text);

 private:
  const char* key_;
  std::string json_;
};

// `level` is "debug", "info", "warning" or "error"; else INVALID_ARGUMENT.
absl::Status InitLog(const std::string& program, const std::string& level);

// `event` is a snake_case name that people search for.
void LogDebug(const char* event, std::initializer_list<LogField> fields = {});
void LogInfo(const char* event, std::initializer_list<LogField> fields = {});
void LogWarning(const char* event, std::initializer_list<LogField> fields = {});
void LogError(const char* event, std::initializer_list<LogField> fields = {});

// The line that the functions above would write, without its end; `ts` as it shall appear. For
// tests.
std::string FormatLogLine(const std::string& ts, const char* level, const char* event,
                          std::initializer_list<LogField> fields);

}  // namespace sluice::rpc
