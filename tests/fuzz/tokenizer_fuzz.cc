// Tokenizer files through the C ABI into the Rust crate: the first byte picks the file. What loads
// must encode, decode and stream.
#include "services/text/tokenizer.h"

#include "kernels/core/check.h"
#include "tests/fuzz/fuzz_target.h"
#include "tests/fuzz/small_tokenizer.h"

namespace sluice::fuzz {

std::vector<std::string> Seeds() {
  for (const auto& [name, content] : {std::pair("tokenizer.json", SmallTokenizerJson()),
                                      std::pair("tokenizer.json", SmallSentencePieceJson()),
                                      std::pair("gguf_vocab.json", SmallGgufVocabulary("gpt2")),
                                      std::pair("gguf_vocab.json", SmallGgufVocabulary("llama"))}) {
    const auto sound = text::Tokenizer::Load({{name, content}});
    SLUICE_CHECK(sound.ok()) << sound.status();
  }
  const std::string opt = R"({"<s>":0,"<pad>":1,"</s>":2,"a":3,"b":4,"ab":5})";
  return {std::string(1, '\0') + SmallTokenizerJson(),
          std::string(1, '\0') + SmallSentencePieceJson(),
          std::string(1, '\1') + SmallGgufVocabulary("gpt2"),
          std::string(1, '\1') + SmallGgufVocabulary("llama"),
          std::string(1, '\2') + opt,
          std::string(1, '\3') + "#version: 0.2\na b\n",
          std::string(1, '\4') + R"({"bos_token":"<s>","eos_token":{"content":"</s>"},)" +
              R"("chat_template":"{{ bos_token }}"})"};
}

}  // namespace sluice::fuzz

namespace {

sluice::text::TokenizerFiles FilesOf(uint8_t kind, const std::string& content) {
  switch (kind % 5) {
    case 1:
      return {{"gguf_vocab.json", content}};
    case 2:
      return {{"vocab.json", content}, {"merges.txt", "a b\n"}};
    case 3:
      return {{"vocab.json", R"({"</s>":0,"a":1,"b":2,"ab":3})"}, {"merges.txt", content}};
    case 4:
      return {{"tokenizer.json", sluice::fuzz::SmallTokenizerJson()},
              {"tokenizer_config.json", content}};
    default:
      return {{"tokenizer.json", content}};
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace sluice;  // NOLINT(google-build-using-namespace)
  if (size == 0) return 0;
  const std::string content(reinterpret_cast<const char*>(data + 1), size - 1);
  const auto tokenizer = text::Tokenizer::Load(FilesOf(data[0], content));
  if (!tokenizer.ok()) {
    SLUICE_CHECK(tokenizer.status().code() != absl::StatusCode::kInternal) << tokenizer.status();
    return 0;
  }
  for (const char* words : {"", "ab <s>a\xC3\xA9\n 12",
                            "  \xE2\x96\x81"
                            "b</s>"}) {
    for (const bool special : {false, true}) {
      const auto ids = (*tokenizer)->Encode(words, special, special);
      if (!ids.ok()) {
        SLUICE_CHECK(ids.status().code() != absl::StatusCode::kInternal) << ids.status();
        continue;
      }
      (void)(*tokenizer)->Decode(*ids, special);
      text::StreamDecoder decoder(tokenizer->get(), special);
      for (const uint32_t id : *ids) (void)decoder.Add(id);
      (void)decoder.Finish();
    }
  }
  return 0;
}
