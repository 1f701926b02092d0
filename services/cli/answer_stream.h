// One streamed answer of GenerationService, as generate, chat and `up --once` show it.
#pragma once

#include <grpcpp/client_context.h>

#include <functional>
#include <string>

#include "absl/status/status.h"
#include "proto/sluice/v1/generation.grpc.pb.h"

namespace sluice::cli {

struct StreamedAnswer {
  absl::Status status;
  std::string text;
  v1::FinishReason finish_reason = v1::FINISH_REASON_UNSPECIFIED;
  uint64_t prompt_tokens = 0;
  uint64_t tokens = 0;
  double first_token_seconds = 0;  // From the call to the first token, by this program's clock
  double tokens_per_second = 0;    // Of the tokens after the first
};

// Sends the request and hands each piece of text to `on_text` as it comes. Blocks until the answer
// has ended; `context` may be cancelled from another thread. An answer that ends without a finish
// reason is an error, never a whole answer.
StreamedAnswer StreamAnswer(const std::string& address, const v1::StreamGenerateRequest& request,
                            grpc::ClientContext* context,
                            const std::function<void(const std::string&)>& on_text);

// Writes a piece of an answer to standard output at once; an `on_text` for people who watch.
void PrintPiece(const std::string& text);

// "time to first token 0.12 s, 24 tokens, 31.4 tokens/s".
std::string StatsLine(const StreamedAnswer& answer);

// "UNAVAILABLE: ..." and, for an address nobody listens at, what to do.
std::string ErrorLine(const absl::Status& status, const std::string& address);

}  // namespace sluice::cli
