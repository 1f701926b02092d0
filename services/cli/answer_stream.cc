#include "services/cli/answer_stream.h"

#include <chrono>
#include <cstdio>

#include "absl/strings/str_cat.h"
#include "services/rpc/channel.h"
#include "services/rpc/grpc_status.h"

namespace sluice::cli {
namespace {

using Clock = std::chrono::steady_clock;

double Seconds(Clock::time_point from, Clock::time_point to) {
  return std::chrono::duration<double>(to - from).count();
}

}  // namespace

StreamedAnswer StreamAnswer(const std::string& address, const v1::StreamGenerateRequest& request,
                            grpc::ClientContext* context,
                            const std::function<void(const std::string&)>& on_text) {
  auto stub = v1::GenerationService::NewStub(rpc::MakeChannel(address, rpc::ChannelKind::kClient));
  StreamedAnswer answer;
  const Clock::time_point begin = Clock::now();
  Clock::time_point first = begin;
  Clock::time_point last = begin;
  auto reader = stub->StreamGenerate(context, request);
  v1::StreamGenerateResponse message;
  uint64_t first_tokens = 0;  // Tokens of the message that brought the first
  while (reader->Read(&message)) {
    last = Clock::now();
    if (answer.tokens == 0 && !message.token_ids().empty()) {
      first = last;
      first_tokens = message.token_ids_size();
    }
    answer.tokens += message.token_ids_size();
    answer.text += message.text();
    if (!message.text().empty()) {
      on_text(message.text());
    }
    if (message.finish_reason() != v1::FINISH_REASON_UNSPECIFIED) {
      answer.finish_reason = message.finish_reason();
      answer.prompt_tokens = message.usage().prompt_tokens();
    }
  }
  answer.status = rpc::FromGrpcStatus(reader->Finish());
  if (answer.status.ok() && answer.finish_reason == v1::FINISH_REASON_UNSPECIFIED) {
    answer.status = absl::DataLossError("the stream ended without a finish reason");
  }
  answer.first_token_seconds = Seconds(begin, first);
  if (answer.tokens > first_tokens && last > first) {
    answer.tokens_per_second =
        static_cast<double>(answer.tokens - first_tokens) / Seconds(first, last);
  }
  return answer;
}

void PrintPiece(const std::string& text) {
  std::fwrite(text.data(), 1, text.size(), stdout);
  std::fflush(stdout);
}

std::string StatsLine(const StreamedAnswer& answer) {
  char text[160];
  std::snprintf(text, sizeof(text),
                "time to first token %.3f s, %llu prompt tokens, %llu tokens, %.1f tokens/s",
                answer.first_token_seconds, static_cast<unsigned long long>(answer.prompt_tokens),
                static_cast<unsigned long long>(answer.tokens), answer.tokens_per_second);
  return text;
}

std::string ErrorLine(const absl::Status& status, const std::string& address) {
  std::string line = absl::StrCat("sluice: ", status.ToString());
  if (status.code() == absl::StatusCode::kUnavailable) {
    absl::StrAppend(&line, " (server ", address, "; 'sluice map' shows the state of a cluster)");
  }
  return line;
}

}  // namespace sluice::cli
