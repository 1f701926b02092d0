#include "services/text/tokenizer.h"

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "services/text/abi_buffers.h"
#include "services/text/tokenizer_impl.h"

namespace sluice::text {

Tokenizer::Impl::Impl(SluiceTextModel* loaded) : model(loaded) {
  SluiceTextInfo info{};
  sluice_text_info(model, &info);
  vocab_size = info.vocab_size;
  if (info.bos_token_id >= 0) bos_token_id = static_cast<uint32_t>(info.bos_token_id);
  if (info.num_eos_token_ids > 0) {
    eos_token_ids.assign(info.eos_token_ids, info.eos_token_ids + info.num_eos_token_ids);
  }
  has_chat_template = info.has_chat_template != 0;
}

Tokenizer::Tokenizer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Tokenizer::~Tokenizer() = default;

absl::StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::Load(const TokenizerFiles& files) {
  std::vector<SluiceTextPair> borrowed;
  borrowed.reserve(files.size());
  for (const auto& [name, content] : files) borrowed.push_back({Borrow(name), Borrow(content)});
  SluiceTextModel* model = nullptr;
  SluiceTextBytes error{};
  const int32_t code = sluice_text_load(borrowed.data(), borrowed.size(), &model, &error);
  if (absl::Status status = TakeStatus(code, error); !status.ok()) return status;
  return std::unique_ptr<Tokenizer>(new Tokenizer(std::make_unique<Impl>(model)));
}

absl::StatusOr<std::vector<uint32_t>> Tokenizer::Encode(const std::string& text,
                                                        bool add_special_tokens,
                                                        bool parse_special) const {
  SluiceTextIds ids{};
  SluiceTextBytes error{};
  const int32_t code = sluice_text_encode(impl_->model, Borrow(text), add_special_tokens,
                                          parse_special, &ids, &error);
  if (absl::Status status = TakeStatus(code, error); !status.ok()) return status;
  return Take(ids);
}

absl::StatusOr<std::string> Tokenizer::Decode(absl::Span<const uint32_t> ids,
                                              bool skip_special_tokens) const {
  SluiceTextBytes text{};
  SluiceTextBytes error{};
  const int32_t code =
      sluice_text_decode(impl_->model, ids.data(), ids.size(), skip_special_tokens, &text, &error);
  if (absl::Status status = TakeStatus(code, error); !status.ok()) return status;
  return Take(text);
}

std::string Tokenizer::TokenText(uint32_t id) const {
  return Take(sluice_text_token(impl_->model, id));
}

absl::StatusOr<std::string> Tokenizer::ToJson() const {
  SluiceTextBytes json{};
  SluiceTextBytes error{};
  const int32_t code = sluice_text_to_json(impl_->model, &json, &error);
  if (absl::Status status = TakeStatus(code, error); !status.ok()) return status;
  return Take(json);
}

uint32_t Tokenizer::vocab_size() const { return impl_->vocab_size; }

std::optional<uint32_t> Tokenizer::bos_token_id() const { return impl_->bos_token_id; }

const std::vector<uint32_t>& Tokenizer::eos_token_ids() const { return impl_->eos_token_ids; }

}  // namespace sluice::text
