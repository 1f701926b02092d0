// sluice generate: one prompt, one streamed answer.
#include <cstdio>
#include <iostream>
#include <iterator>
#include <memory>

#include "services/cli/answer_stream.h"
#include "services/cli/commands.h"
#include "services/cli/sampling_flags.h"

namespace sluice::cli {
namespace {

struct GenerateFlags {
  std::string address = kDefaultAddress;
  std::string prompt;
  SamplingFlags sampling;
  bool chat = false;
  bool stats = false;
};

int Generate(GenerateFlags& flags) {
  if (flags.prompt == "-") {
    flags.prompt.assign(std::istreambuf_iterator<char>(std::cin), {});
  }
  v1::StreamGenerateRequest request;
  SetSampling(flags.sampling, &request);
  if (flags.chat) {
    v1::ChatMessage* message = request.mutable_chat_messages()->add_messages();
    message->set_role("user");
    message->set_content(flags.prompt);
  } else {
    request.set_text(flags.prompt);
  }
  grpc::ClientContext context;
  const StreamedAnswer answer = StreamAnswer(flags.address, request, &context, PrintPiece);
  std::printf("\n");
  if (!answer.status.ok()) {
    std::fprintf(stderr, "%s\n", ErrorLine(answer.status, flags.address).c_str());
    return 1;
  }
  if (flags.stats) {
    std::fprintf(stderr, "%s\n", StatsLine(answer).c_str());
  }
  return 0;
}

}  // namespace

void AddGenerateCommand(CLI::App& app, int* exit_code) {
  CLI::App* command = app.add_subcommand("generate", "Send one prompt to a running server");
  auto flags = std::make_shared<GenerateFlags>();
  rpc::AddFlag(*command, "address", &flags->address, "host:port of the server");
  command->add_option("--model", flags->sampling.model, "Model's name; default: the one served");
  AddSamplingFlags(*command, &flags->sampling);
  command->add_flag("--chat", flags->chat, "Send the prompt as a user's message of a conversation");
  command->add_flag("--stats", flags->stats, "Print times to standard error");
  command->add_option("prompt", flags->prompt, "The prompt; - reads standard input")->required();
  command->callback([flags, exit_code] { *exit_code = Generate(*flags); });
}

}  // namespace sluice::cli
