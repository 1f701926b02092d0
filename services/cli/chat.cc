// sluice chat: a conversation at the terminal. An empty line or the end of input ends it.
#include <unistd.h>

#include <cstdio>
#include <iostream>
#include <memory>

#include "services/cli/answer_stream.h"
#include "services/cli/commands.h"
#include "services/cli/sampling_flags.h"

namespace sluice::cli {
namespace {

struct ChatFlags {
  std::string address = kDefaultAddress;
  std::string system;
  SamplingFlags sampling;
};

void AddMessage(v1::ChatMessages* messages, const std::string& role, const std::string& content) {
  v1::ChatMessage* message = messages->add_messages();
  message->set_role(role);
  message->set_content(content);
}

int Chat(const ChatFlags& flags) {
  const bool terminal = isatty(STDIN_FILENO) == 1;
  v1::StreamGenerateRequest request;
  SetSampling(flags.sampling, &request);
  if (!flags.system.empty()) {
    AddMessage(request.mutable_chat_messages(), "system", flags.system);
  }
  std::string line;
  while (true) {
    if (terminal) {
      std::printf("> ");
      std::fflush(stdout);
    }
    if (!std::getline(std::cin, line) || line.empty()) {
      return 0;
    }
    AddMessage(request.mutable_chat_messages(), "user", line);
    grpc::ClientContext context;
    const StreamedAnswer answer = StreamAnswer(flags.address, request, &context, PrintPiece);
    std::printf("\n");
    if (!answer.status.ok()) {
      std::fprintf(stderr, "%s\n", ErrorLine(answer.status, flags.address).c_str());
      return 1;
    }
    AddMessage(request.mutable_chat_messages(), "assistant", answer.text);
  }
}

}  // namespace

void AddChatCommand(CLI::App& app, int* exit_code) {
  CLI::App* command = app.add_subcommand("chat", "Talk to a running server's model");
  auto flags = std::make_shared<ChatFlags>();
  flags->sampling.max_tokens = 256;
  rpc::AddFlag(*command, "address", &flags->address, "host:port of the server");
  command->add_option("--model", flags->sampling.model, "Model's name; default: the one served");
  rpc::AddFlag(*command, "system", &flags->system, "A system message to begin with");
  AddSamplingFlags(*command, &flags->sampling);
  command->callback([flags, exit_code] { *exit_code = Chat(*flags); });
}

}  // namespace sluice::cli
