// Tokenizer and chat template of one model, through the Rust crates `tokenizers` and `minijinja`
// behind the C ABI of text_abi.h. Immutable and thread-safe after Load().
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace sluice::text {

// Base name -> content, as the loader hands them over: tokenizer.json, tokenizer_config.json,
// special_tokens_map.json, vocab.json, merges.txt, chat_template.jinja, generation_config.json, or
// gguf_vocab.json (the vocabulary of a GGUF file).
using TokenizerFiles = std::map<std::string, std::string>;

class Tokenizer {
 public:
  // Picks tokenizer.json, else gguf_vocab.json, else vocab.json + merges.txt (OPT: </s> is
  // prepended). Sizes, ids and regex patterns are checked before the crate sees a file
  // (reliability.md F21). NOT_FOUND lists what is there.
  static absl::StatusOr<std::unique_ptr<Tokenizer>> Load(const TokenizerFiles& files);
  ~Tokenizer();

  // Ids of `text`. add_special_tokens adds what the model's post-processor adds (BOS).
  // parse_special: spelled control tokens become control tokens (chat templates); otherwise user
  // text never does (reliability.md A6).
  absl::StatusOr<std::vector<uint32_t>> Encode(const std::string& text, bool add_special_tokens,
                                               bool parse_special = false) const;
  // Text of ids; invalid UTF-8 becomes U+FFFD. INVALID_ARGUMENT for an id outside the vocabulary.
  absl::StatusOr<std::string> Decode(absl::Span<const uint32_t> ids,
                                     bool skip_special_tokens) const;
  // The token's own spelling, e.g. "ĠParis"; empty for an unknown id.
  std::string TokenText(uint32_t id) const;

  // The text of a tokenizer.json that encodes and decodes as this one does.
  absl::StatusOr<std::string> ToJson() const;

  uint32_t vocab_size() const;
  std::optional<uint32_t> bos_token_id() const;
  const std::vector<uint32_t>& eos_token_ids()
      const;  // tokenizer's own; the model config may have more

  struct ChatMessage {
    std::string role;
    std::string content;
  };
  bool has_chat_template() const;
  // The prompt text. FAILED_PRECONDITION without a template; INVALID_ARGUMENT with the template's
  // own message when it refuses.
  absl::StatusOr<std::string> ApplyChatTemplate(absl::Span<const ChatMessage> messages,
                                                bool add_generation_prompt) const;
  // Ids of that prompt, without what add_special_tokens would add. The template's control tokens
  // count, those spelled in a message do not (reliability.md A6), so this is the way to encode a
  // chat: Encode(ApplyChatTemplate(...)) cannot tell them apart. Without such a spelling both give
  // the same ids. Same errors.
  absl::StatusOr<std::vector<uint32_t>> EncodeChat(absl::Span<const ChatMessage> messages,
                                                   bool add_generation_prompt) const;

 private:
  friend class StreamDecoder;
  struct Impl;
  explicit Tokenizer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// Turns a growing sequence of ids into text pieces that are always whole UTF-8 characters; their
// concatenation equals Decode() of all ids. One stream, one thread. The Tokenizer must outlive it.
// The cost of an id does not grow with the stream. Ids outside the vocabulary (a model may have
// more rows than its tokenizer has tokens) have no text.
class StreamDecoder {
 public:
  StreamDecoder(const Tokenizer* tokenizer, bool skip_special_tokens);
  ~StreamDecoder();
  StreamDecoder(StreamDecoder&&) noexcept;
  StreamDecoder& operator=(StreamDecoder&&) noexcept;

  std::string Add(uint32_t id);  // What can be shown now; may be empty
  std::string
  Finish();  // What was held back, U+FFFD for what stayed incomplete; call once, at the end

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace sluice::text
