// Subcommands of `sluice`. Each function adds one to `app`; when the user chose it, CLI11 runs its
// callback, which sets `exit_code`. One file each: up.cc, plan_command.cc, inspect_command.cc,
// convert_command.cc, generate.cc, chat.cc, eval_command.cc.
#pragma once

#include <CLI/CLI.hpp>
#include <string>

namespace sluice::cli {

inline constexpr char kDefaultAddress[] = "127.0.0.1:50051";
inline constexpr char kDefaultAdminAddress[] = "127.0.0.1:50052";

void AddUpCommand(CLI::App& app, int* exit_code);
void AddPlanCommand(CLI::App& app, int* exit_code);
void AddInspectCommand(CLI::App& app, int* exit_code);
void AddConvertCommand(CLI::App& app, int* exit_code);
void AddMapCommand(CLI::App& app, int* exit_code);
void AddEvalCommand(CLI::App& app, int* exit_code);
void AddGenerateCommand(CLI::App& app, int* exit_code);
void AddChatCommand(CLI::App& app, int* exit_code);

}  // namespace sluice::cli
