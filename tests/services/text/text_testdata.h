// Reads tests/testdata/text: vocabularies, and the generated strings and ids whose hashes
// make_goldens.py keeps.
#pragma once

#include <cstdint>
#include <fstream>
#include <memory>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "services/text/tokenizer.h"

namespace sluice::text {

// Empty when the file is not there.
inline std::string ReadFile(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  std::ostringstream out;
  out << in.rdbuf();
  return out.str();
}

inline std::string TestdataPath(const std::string& name) {
  return std::string(SLUICE_TESTDATA "/text/") + name;
}

// Files of a folder of the test data, by base name.
inline TokenizerFiles ReadFiles(const std::string& folder, const std::vector<std::string>& names) {
  TokenizerFiles files;
  for (const std::string& name : names) {
    files[name] = ReadFile(TestdataPath(folder + "/" + name));
    EXPECT_FALSE(files[name].empty()) << folder << "/" << name;
  }
  return files;
}

inline TokenizerFiles ByteLevelFiles() {
  return ReadFiles("byte_level",
                   {"tokenizer.json", "tokenizer_config.json", "generation_config.json"});
}

inline TokenizerFiles SentencePieceFiles() {
  return ReadFiles("sentencepiece", {"tokenizer.json", "special_tokens_map.json"});
}

inline TokenizerFiles OptFiles() { return ReadFiles("opt", {"vocab.json", "merges.txt"}); }

// gguf_gpt2 with another pre-tokenizer name.
inline TokenizerFiles GgufGpt2Files(const std::string& pre) {
  TokenizerFiles files = ReadFiles("gguf_gpt2", {"gguf_vocab.json"});
  nlohmann::json vocab = nlohmann::json::parse(files["gguf_vocab.json"]);
  vocab["pre"] = pre;
  files["gguf_vocab.json"] = vocab.dump();
  return files;
}

inline TokenizerFiles GgufLlamaFiles() { return ReadFiles("gguf_llama", {"gguf_vocab.json"}); }

inline std::unique_ptr<Tokenizer> LoadOrDie(const TokenizerFiles& files) {
  auto loaded = Tokenizer::Load(files);
  EXPECT_TRUE(loaded.ok()) << loaded.status();
  return loaded.ok() ? *std::move(loaded) : nullptr;
}

// The generator of tests/testdata/text/string_generator.py.
class Draws {
 public:
  explicit Draws(uint64_t i) : state_(i * 0x9E3779B97F4A7C15u + 1) {}
  uint64_t Next() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return state_ >> 33;
  }

 private:
  uint64_t state_;
};

inline void AppendUtf8(uint32_t code, std::string* out) {
  if (code < 0x80) {
    out->push_back(static_cast<char>(code));
    return;
  }
  const int tail = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
  const uint32_t lead[] = {0, 0xC0, 0xE0, 0xF0};
  out->push_back(static_cast<char>(lead[tail] | (code >> (6 * tail))));
  for (int i = tail - 1; i >= 0; --i) {
    out->push_back(static_cast<char>(0x80 | ((code >> (6 * i)) & 0x3F)));
  }
}

class StringGenerator {
 public:
  StringGenerator() {
    const auto json = nlohmann::json::parse(ReadFile(TestdataPath("generator.json")));
    pieces_ = json.at("pieces").get<std::vector<std::string>>();
    ranges_ = json.at("ranges").get<std::vector<std::pair<uint32_t, uint32_t>>>();
  }

  std::string Make(uint64_t i) const {
    Draws draws(i);
    std::string out;
    const uint64_t num_parts = 1 + draws.Next() % 20;
    for (uint64_t part = 0; part < num_parts; ++part) {
      if (draws.Next() % 12 == 0) {
        const auto [low, high] = ranges_[draws.Next() % ranges_.size()];
        AppendUtf8(low + static_cast<uint32_t>(draws.Next() % (high - low + 1)), &out);
      } else {
        out += pieces_[draws.Next() % pieces_.size()];
      }
    }
    return out;
  }

 private:
  std::vector<std::string> pieces_;
  std::vector<std::pair<uint32_t, uint32_t>> ranges_;  // inclusive
};

// Row `row` of random ids below `vocab_size`, as in make_goldens.py.
inline std::vector<uint32_t> RandomIds(uint64_t row, uint32_t vocab_size) {
  Draws draws(row);
  std::vector<uint32_t> ids(1 + draws.Next() % 24);
  for (uint32_t& id : ids) id = static_cast<uint32_t>(draws.Next() % vocab_size);
  return ids;
}

inline bool IsValidUtf8(const std::string& s) {
  // dump() throws on invalid UTF-8 unless told to replace it; a replaced byte makes the text
  // longer.
  using nlohmann::json;
  const auto strict = json(s).dump(-1, ' ', false, json::error_handler_t::ignore);
  return json::parse(strict).get<std::string>() == s;
}

}  // namespace sluice::text
