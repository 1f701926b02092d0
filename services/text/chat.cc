// The chat half of Tokenizer.
#include <string>
#include <vector>

#include "services/text/abi_buffers.h"
#include "services/text/tokenizer.h"
#include "services/text/tokenizer_impl.h"

namespace sluice::text {
namespace {

std::vector<SluiceTextPair> BorrowMessages(absl::Span<const Tokenizer::ChatMessage> messages) {
  std::vector<SluiceTextPair> borrowed;
  borrowed.reserve(messages.size());
  for (const Tokenizer::ChatMessage& message : messages) {
    borrowed.push_back({Borrow(message.role), Borrow(message.content)});
  }
  return borrowed;
}

}  // namespace

bool Tokenizer::has_chat_template() const { return impl_->has_chat_template; }

absl::StatusOr<std::string> Tokenizer::ApplyChatTemplate(absl::Span<const ChatMessage> messages,
                                                         bool add_generation_prompt) const {
  const std::vector<SluiceTextPair> borrowed = BorrowMessages(messages);
  SluiceTextBytes prompt{};
  SluiceTextBytes error{};
  const int32_t code = sluice_text_apply_chat_template(
      impl_->model, borrowed.data(), borrowed.size(), add_generation_prompt, &prompt, &error);
  if (absl::Status status = TakeStatus(code, error); !status.ok()) return status;
  return Take(prompt);
}

absl::StatusOr<std::vector<uint32_t>> Tokenizer::EncodeChat(absl::Span<const ChatMessage> messages,
                                                            bool add_generation_prompt) const {
  const std::vector<SluiceTextPair> borrowed = BorrowMessages(messages);
  SluiceTextIds ids{};
  SluiceTextBytes error{};
  const int32_t code = sluice_text_encode_chat(impl_->model, borrowed.data(), borrowed.size(),
                                               add_generation_prompt, &ids, &error);
  if (absl::Status status = TakeStatus(code, error); !status.ok()) return status;
  return Take(ids);
}

}  // namespace sluice::text
