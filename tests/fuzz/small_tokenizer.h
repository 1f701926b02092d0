// Vocabularies of a few tokens, so that loading one takes microseconds.
#pragma once

#include <string>

namespace sluice::fuzz {

std::string SmallTokenizerJson();      // tokenizer.json, byte level
std::string SmallSentencePieceJson();  // tokenizer.json with byte fallback, as Llama 2's
std::string SmallGgufVocabulary(const std::string& model);  // gguf_vocab.json: "gpt2" or "llama"

}  // namespace sluice::fuzz
