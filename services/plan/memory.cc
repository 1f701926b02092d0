#include "services/plan/memory.h"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "kernels/core/status_macros.h"

namespace sluice::plan {
namespace {

struct Unit {
  const char* name;
  double bytes;
  bool decimal;  // A decimal unit that ends with a lower-case b counts bits
};
constexpr Unit kUnits[] = {
    {"GIB", 1073741824.0, false},
    {"MIB", 1048576.0, false},
    {"KIB", 1024.0, false},
    {"GB", 1e9, true},
    {"MB", 1e6, true},
    {"KB", 1e3, true},
};

std::string Stripped(const std::string& text) {
  return std::string(absl::StripAsciiWhitespace(text));
}

absl::Status BadBytes(const std::string& text) {
  return absl::InvalidArgumentError(
      absl::StrCat("memory size \"", text,
                   "\": expected a number of bytes or a number with a unit, such as 10GiB, 8GB or "
                   "512MiB (GiB/MiB/KiB are powers of 2, GB/MB/KB powers of 10)"));
}

}  // namespace

bool IsNumbered(const Device& device) { return NumberOf(device) >= 0; }

int NumberOf(const Device& device) {
  const bool digits = !device.empty() && device.size() <= 4 &&
                      std::all_of(device.begin(), device.end(),
                                  [](unsigned char c) { return std::isdigit(c) != 0; });
  return digits && (device.size() == 1 || device[0] != '0') ? std::atoi(device.c_str()) : -1;
}

Device NormalDevice(const std::string& text) {
  const Device device = absl::StartsWith(text, "cuda:") ? text.substr(5) : text;
  return device == "cpu" || device == "disk" || IsNumbered(device) ? device : "";
}

absl::StatusOr<uint64_t> ParseBytes(const std::string& text) {
  const std::string stripped = Stripped(text);
  std::string upper = stripped;
  for (char& c : upper) {
    c = static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
  }
  std::string number = stripped;
  double factor = 1.0;
  bool bits = false;
  for (const Unit& unit : kUnits) {
    const std::string name = unit.name;
    if (upper.size() > name.size() &&
        upper.compare(upper.size() - name.size(), name.size(), name) == 0) {
      number = Stripped(stripped.substr(0, stripped.size() - name.size()));
      factor = unit.bytes;
      bits = unit.decimal && stripped.back() == 'b';
      break;
    }
  }
  double value = 0.0;
  const bool decimal = number.find_first_not_of("0123456789.eE+") == std::string::npos &&
                       !number.empty() && number[0] != '+';
  if (!decimal || !absl::SimpleAtod(number, &value) || !std::isfinite(value)) {
    return BadBytes(text);
  }
  const double bytes = std::floor(value * factor);
  if (bytes < 0 || bytes >= 9.0e18) {
    return BadBytes(text);
  }
  const uint64_t whole = static_cast<uint64_t>(bytes);
  return bits ? whole / 8 : whole;
}

absl::StatusOr<MaxMemory> ParseMaxMemory(const std::string& text) {
  MaxMemory result;
  for (const std::string& part : std::vector<std::string>(absl::StrSplit(text, ','))) {
    const std::string entry = Stripped(part);
    const size_t equals = entry.find('=');
    if (equals == std::string::npos) {
      return absl::InvalidArgumentError(absl::StrCat(
          "max memory entry \"", entry, "\": expected DEVICE=SIZE, such as 0=10GiB or cpu=30GiB"));
    }
    const Device device = Stripped(entry.substr(0, equals));
    if (NormalDevice(device) != device) {
      return absl::InvalidArgumentError(
          absl::StrCat("max memory entry \"", entry, "\": Device ", device,
                       " is not recognized, available devices are integers (workers by number), "
                       "'cpu' and 'disk'"));
    }
    auto bytes = ParseBytes(entry.substr(equals + 1));
    if (!bytes.ok()) {
      return absl::InvalidArgumentError(absl::StrCat(
          "max memory entry \"", entry, "\": ", std::string(bytes.status().message())));
    }
    if (!result.emplace(device, *bytes).second) {
      return absl::InvalidArgumentError(absl::StrCat("max memory entry \"", entry, "\": device ",
                                                     device, " is given twice; keep one"));
    }
  }
  return result;
}

absl::StatusOr<MapMode> ParseMapMode(const std::string& text) {
  const std::string mode = Stripped(text);
  if (mode == "sequential") return MapMode::kSequential;
  if (mode == "auto" || mode == "balanced") return MapMode::kAuto;
  if (mode == "balanced_low_0") return MapMode::kBalancedLow0;
  if (!mode.empty() && mode[0] == '{') return MapMode::kCustom;
  if (!NormalDevice(mode).empty()) return MapMode::kCustom;
  return absl::InvalidArgumentError(absl::StrCat(
      "When passing device_map as a string, the value needs to be a device name (e.g. cpu, cuda:0) "
      "or 'auto', 'balanced', 'balanced_low_0', 'sequential' but found ",
      text, ". A JSON object such as {\"model.layers.0\": 0, \"\": \"cpu\"} is a custom map."));
}

Budgets InOrder(const MaxMemory& max_memory) {
  Budgets budgets;
  for (const auto& [device, bytes] : max_memory) {
    budgets.emplace_back(device, static_cast<double>(bytes));
  }
  auto rank = [](const Device& device) {
    return IsNumbered(device) ? NumberOf(device) : device == "cpu" ? 100000 : 100001;
  };
  std::sort(budgets.begin(), budgets.end(),
            [&](const auto& a, const auto& b) { return rank(a.first) < rank(b.first); });
  return budgets;
}

std::string FormatBytes(double bytes) {
  char text[48];
  const double magnitude = std::fabs(bytes);
  if (magnitude >= 1073741824.0) {
    std::snprintf(text, sizeof(text), "%.2f GiB", bytes / 1073741824.0);
  } else if (magnitude >= 1048576.0) {
    std::snprintf(text, sizeof(text), "%.1f MiB", bytes / 1048576.0);
  } else if (magnitude >= 1024.0) {
    std::snprintf(text, sizeof(text), "%.1f KiB", bytes / 1024.0);
  } else {
    std::snprintf(text, sizeof(text), "%.0f B", bytes);
  }
  return text;
}

}  // namespace sluice::plan
