// Flags of every program: each is also an environment variable SLUICE_<NAME>. Only main.cc uses
// this.
//
//   CLI::App app("...");
//   rpc::AddFlag(app, "worker-id", &options.worker_id, "Stable name of this worker")->required();
//   if (const int code = rpc::ParseFlags(app, argc, argv); code >= 0) return code;
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <string>

#include "absl/status/statusor.h"

namespace sluice::rpc {

// "worker-id" -> "SLUICE_WORKER_ID".
std::string EnvNameOf(const std::string& flag);

// --name VALUE; the value that `target` has is the default, and help shows it.
template <typename T>
CLI::Option* AddFlag(CLI::App& app, const std::string& name, T* target, const std::string& help) {
  return app.add_option("--" + name, *target, help)
      ->capture_default_str()
      ->envname(EnvNameOf(name));
}

// --name without a value (and SLUICE_NAME=true).
inline CLI::Option* AddSwitch(CLI::App& app, const std::string& name, bool* target,
                              const std::string& help) {
  return app.add_flag("--" + name, *target, help)->envname(EnvNameOf(name));
}

// What every process of Sluice lets itself be told.
struct ProcessFlags {
  std::string log_level = "info";
  bool die_with_parent = false;
  int parent_pid = 0;
};
void AddProcessFlags(CLI::App& app, ProcessFlags* flags);
// DieWithParent (process.h) when the flags ask for it.
absl::Status FollowParent(const ProcessFlags& flags);

// -1: go on. Otherwise the message has been printed (help, or what is wrong) and the program ends
// with this code.
int ParseFlags(CLI::App& app, int argc, char** argv);

// Bytes: "1073741824", "1GiB", "1.5 GB", case ignored; KiB, MiB, GiB, TiB are powers of 1024, KB,
// MB, GB, TB of 1000. INVALID_ARGUMENT says what is accepted.
absl::StatusOr<uint64_t> ParseBytes(const std::string& text);

}  // namespace sluice::rpc
