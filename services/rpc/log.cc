#include "services/rpc/log.h"

#include <google/protobuf/stubs/common.h>
#include <google/protobuf/stubs/logging.h>
#include <grpc/support/log.h>
#include <grpcpp/version_info.h>
#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <ctime>
#include <memory>

namespace sluice::rpc {
namespace {

constexpr int kComplaintsPerSecond = 10;

std::string& Program() {
  static auto* program = new std::string("sluice");
  return *program;
}

// Lives until the process ends: threads may log while static objects are destroyed.
spdlog::logger& Logger() {
  static auto* logger = [] {
    auto* made = new spdlog::logger("sluice", std::make_shared<spdlog::sinks::stderr_sink_mt>());
    made->set_pattern("%v");
    made->flush_on(spdlog::level::trace);
    return made;
  }();
  return *logger;
}

// RFC 3339, UTC, microseconds.
std::string Now() {
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  const auto micros = std::chrono::duration_cast<std::chrono::microseconds>(now).count();
  const std::time_t seconds = micros / 1000000;
  std::tm utc{};
  gmtime_r(&seconds, &utc);
  char text[96];
  std::snprintf(text, sizeof(text), "%04d-%02d-%02dT%02d:%02d:%02d.%06dZ", utc.tm_year + 1900,
                utc.tm_mon + 1, utc.tm_mday, utc.tm_hour, utc.tm_min, utc.tm_sec,
                static_cast<int>(micros % 1000000));
  return text;
}

// Length of the UTF-8 sequence at text[i], 0 when there is none (overlong and surrogates included).
size_t Utf8Length(const std::string& text, size_t i) {
  const auto byte = [&](size_t j) -> unsigned {
    return i + j < text.size() ? static_cast<unsigned char>(text[i + j]) : 0u;
  };
  const auto tail = [&](size_t j) { return (byte(j) & 0xC0) == 0x80; };
  const unsigned first = byte(0);
  if (first < 0x80) {
    return 1;
  }
  if (first >= 0xC2 && first <= 0xDF) {
    return tail(1) ? 2 : 0;
  }
  if (first >= 0xE0 && first <= 0xEF) {
    const bool bad = (first == 0xE0 && byte(1) < 0xA0) || (first == 0xED && byte(1) > 0x9F);
    return !bad && tail(1) && tail(2) ? 3 : 0;
  }
  if (first >= 0xF0 && first <= 0xF4) {
    const bool bad = (first == 0xF0 && byte(1) < 0x90) || (first == 0xF4 && byte(1) > 0x8F);
    return !bad && tail(1) && tail(2) && tail(3) ? 4 : 0;
  }
  return 0;
}

void AppendEscaped(unsigned char c, std::string* out) {
  switch (c) {
    case '"':
      *out += "\\\"";
      return;
    case '\\':
      *out += "\\\\";
      return;
    case '\n':
      *out += "\\n";
      return;
    case '\r':
      *out += "\\r";
      return;
    case '\t':
      *out += "\\t";
      return;
    default:
      break;
  }
  if (c < 0x20 || c == 0x7F) {
    char text[8];
    std::snprintf(text, sizeof(text), "\\u%04x", c);
    *out += text;
  } else {
    out->push_back(static_cast<char>(c));
  }
}

void Write(spdlog::level::level_enum level, const char* name, const char* event,
           std::initializer_list<LogField> fields) {
  spdlog::logger& logger = Logger();
  if (logger.should_log(level)) {
    logger.log(level, spdlog::string_view_t(FormatLogLine(Now(), name, event, fields)));
  }
}

// A client can make gRPC and protobuf complain as often as it likes: a few lines a second are kept.
bool MayComplain() {
  static std::atomic<int64_t> second{0};
  static std::atomic<int> lines{0};
  const int64_t now = std::chrono::duration_cast<std::chrono::seconds>(
                          std::chrono::steady_clock::now().time_since_epoch())
                          .count();
  if (second.exchange(now) != now) {
    lines = 0;
  }
  return ++lines <= kComplaintsPerSecond;
}

// Messages of gRPC and protobuf become lines of ours, so that stderr holds nothing but JSON.
void TakeOthersLogs() {
#if GRPC_CPP_VERSION_MAJOR == 1 && GRPC_CPP_VERSION_MINOR < 65  // Newer ones log through Abseil
  gpr_set_log_function([](gpr_log_func_args* args) {
    if (args->severity == GPR_LOG_SEVERITY_ERROR && MayComplain()) {
      LogWarning("grpc", {{"message", args->message}});
    } else {
      LogDebug("grpc", {{"message", args->message}});
    }
  });
#endif
#if GOOGLE_PROTOBUF_VERSION < 4000000  // The same
  google::protobuf::SetLogHandler([](google::protobuf::LogLevel level, const char* file, int line,
                                     const std::string& text) {
    LogDebug("protobuf", {{"message", text}});  // That a message was bad: its sender hears of it
  });
#endif
}

}  // namespace

LogField::LogField(const char* key, double value) : key_(key), json_("null") {
  if (std::isfinite(value)) {
    char text[32];
    std::snprintf(text, sizeof(text), "%.9g", value);
    json_ = text;
  }
}

std::string LogField::Quote(const std::string& text) {
  std::string out = "\"";
  for (size_t i = 0; i < text.size();) {
    const size_t length = Utf8Length(text, i);
    if (length == 1) {
      AppendEscaped(static_cast<unsigned char>(text[i]), &out);
    } else if (length == 0) {
      out += "\xEF\xBF\xBD";
    } else {
      out.append(text, i, length);
    }
    i += length == 0 ? 1 : length;
  }
  out.push_back('"');
  return out;
}

absl::Status InitLog(const std::string& program, const std::string& level) {
  const auto parsed = spdlog::level::from_str(level);
  if (level != "debug" && level != "info" && level != "warning" && level != "error") {
    return absl::InvalidArgumentError("log level \"" + level +
                                      "\" is none of debug, info, warning, error");
  }
  Program() = program;
  TakeOthersLogs();
  Logger().set_level(parsed);
  return absl::OkStatus();
}

std::string FormatLogLine(const std::string& ts, const char* level, const char* event,
                          std::initializer_list<LogField> fields) {
  std::string line = "{\"ts\":" + LogField::Quote(ts) + ",\"level\":" + LogField::Quote(level) +
                     ",\"program\":" + LogField::Quote(Program()) +
                     ",\"event\":" + LogField::Quote(event);
  for (const LogField& field : fields) {
    line += ',' + LogField::Quote(field.key()) + ':' + field.json();
  }
  line += '}';
  return line;
}

void LogDebug(const char* event, std::initializer_list<LogField> fields) {
  Write(spdlog::level::debug, "debug", event, fields);
}
void LogInfo(const char* event, std::initializer_list<LogField> fields) {
  Write(spdlog::level::info, "info", event, fields);
}
void LogWarning(const char* event, std::initializer_list<LogField> fields) {
  Write(spdlog::level::warn, "warning", event, fields);
}
void LogError(const char* event, std::initializer_list<LogField> fields) {
  Write(spdlog::level::err, "error", event, fields);
}

}  // namespace sluice::rpc
