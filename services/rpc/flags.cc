#include "services/rpc/flags.h"

#include <unistd.h>

#include <cctype>
#include <cmath>
#include <cstdlib>
#include <utility>

#include "services/rpc/process.h"

namespace sluice::rpc {

std::string EnvNameOf(const std::string& flag) {
  std::string name = "SLUICE_";
  for (const char c : flag) {
    name.push_back(c == '-' ? '_' : static_cast<char>(std::toupper(static_cast<unsigned char>(c))));
  }
  return name;
}

void AddProcessFlags(CLI::App& app, ProcessFlags* flags) {
  AddFlag(app, "log-level", &flags->log_level, "debug, info, warning or error");
  AddSwitch(app, "die-with-parent", &flags->die_with_parent,
            "End when the process that started this one ends");
  AddFlag(app, "parent-pid", &flags->parent_pid,
          "With --die-with-parent: its process id, if it may have ended already");
}

absl::Status FollowParent(const ProcessFlags& flags) {
  if (!flags.die_with_parent) {
    return absl::OkStatus();
  }
  return DieWithParent(flags.parent_pid > 0 ? flags.parent_pid : getppid());
}

int ParseFlags(CLI::App& app, int argc, char** argv) {
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error);
  }
  return -1;
}

absl::StatusOr<uint64_t> ParseBytes(const std::string& text) {
  static constexpr std::pair<const char*, double> kUnits[] = {
      {"", 1},     {"b", 1},    {"kib", 1024.0}, {"mib", 1048576.0}, {"gib", 1073741824.0},
      {"kb", 1e3}, {"mb", 1e6}, {"gb", 1e9},     {"tb", 1e12},       {"tib", 1099511627776.0}};
  char* end = nullptr;
  const double number = std::strtod(text.c_str(), &end);
  std::string unit;
  for (; end != nullptr && *end != '\0'; ++end) {
    if (*end != ' ') {
      unit.push_back(static_cast<char>(std::tolower(static_cast<unsigned char>(*end))));
    }
  }
  const bool starts_well =
      !text.empty() && (std::isdigit(static_cast<unsigned char>(text[0])) != 0);
  for (const auto& [name, factor] : kUnits) {
    const double bytes = number * factor;
    if (starts_well && unit == name && std::isfinite(bytes) && bytes < 9.2e18) {
      return static_cast<uint64_t>(bytes);
    }
  }
  return absl::InvalidArgumentError(
      "\"" + text + "\" is no number of bytes; write e.g. 8GiB, 500MB or 1073741824");
}

}  // namespace sluice::rpc
