// What a Tokenizer holds: the Rust model and a copy of its fixed facts. Used by this folder's .cc
// files only.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "services/text/text_abi.h"
#include "services/text/tokenizer.h"

namespace sluice::text {

struct Tokenizer::Impl {
  explicit Impl(SluiceTextModel* loaded);  // Takes ownership
  ~Impl() { sluice_text_free_model(model); }
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;

  SluiceTextModel* model;
  uint32_t vocab_size = 0;
  std::optional<uint32_t> bos_token_id;
  std::vector<uint32_t> eos_token_ids;
  bool has_chat_template = false;
};

}  // namespace sluice::text
