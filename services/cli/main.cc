// sluice: the command-line tool. Exit code 0 when what was asked for was done, 1 when not, CLI11's
// for a wrong flag.
#include <cstdio>

#include "services/cli/commands.h"
#include "services/rpc/flags.h"

#ifndef SLUICE_VERSION
#define SLUICE_VERSION "unknown"
#endif

int main(int argc, char** argv) {
  CLI::App app("sluice: serves quantized language models from several workers");
  app.require_subcommand(1);
  int exit_code = 0;
  sluice::cli::AddUpCommand(app, &exit_code);
  sluice::cli::AddPlanCommand(app, &exit_code);
  sluice::cli::AddInspectCommand(app, &exit_code);
  sluice::cli::AddConvertCommand(app, &exit_code);
  sluice::cli::AddMapCommand(app, &exit_code);
  sluice::cli::AddEvalCommand(app, &exit_code);
  sluice::cli::AddGenerateCommand(app, &exit_code);
  sluice::cli::AddChatCommand(app, &exit_code);
  app.add_subcommand("version", "Print the version")->callback([] {
    std::printf("sluice %s\n", SLUICE_VERSION);
  });
  if (const int code = sluice::rpc::ParseFlags(app, argc, argv); code >= 0) {
    return code;
  }
  return exit_code;
}
