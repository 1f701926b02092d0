#include "tests/fuzz/small_tokenizer.h"

#include <nlohmann/json.hpp>

namespace sluice::fuzz {
namespace {

using nlohmann::json;

json Added(int id, const char* content) {
  return {{"id", id},        {"content", content},  {"single_word", false}, {"lstrip", false},
          {"rstrip", false}, {"normalized", false}, {"special", true}};
}

}  // namespace

std::string SmallTokenizerJson() {
  json vocab = {{"<s>", 0}, {"</s>", 1}, {"ab", 2}, {"\u0120a", 3}};
  int id = 4;
  for (char c = '!'; c <= '~'; ++c) vocab[std::string(1, c)] = id++;
  vocab["\u0120"] = id++;
  const json tokenizer = {
      {"version", "1.0"},
      {"added_tokens", {Added(0, "<s>"), Added(1, "</s>")}},
      {"normalizer", nullptr},
      {"pre_tokenizer",
       {{"type", "ByteLevel"},
        {"add_prefix_space", false},
        {"trim_offsets", true},
        {"use_regex", true}}},
      {"post_processor",
       {{"type", "TemplateProcessing"},
        {"single",
         {{{"SpecialToken", {{"id", "<s>"}, {"type_id", 0}}}},
          {{"Sequence", {{"id", "A"}, {"type_id", 0}}}}}},
        {"pair", {{{"Sequence", {{"id", "A"}, {"type_id", 0}}}}}},
        {"special_tokens", {{"<s>", {{"id", "<s>"}, {"ids", {0}}, {"tokens", {"<s>"}}}}}}}},
      {"decoder",
       {{"type", "ByteLevel"},
        {"add_prefix_space", false},
        {"trim_offsets", true},
        {"use_regex", true}}},
      {"model",
       {{"type", "BPE"},
        {"dropout", nullptr},
        {"unk_token", nullptr},
        {"fuse_unk", false},
        {"byte_fallback", false},
        {"ignore_merges", false},
        {"vocab", vocab},
        {"merges", {"a b", {"\u0120", "a"}}}}}};
  return tokenizer.dump();
}

std::string SmallSentencePieceJson() {
  const json replace = {{"type", "Replace"}, {"pattern", {{"String", " "}}}, {"content", "\u2581"}};
  const json tokenizer = {
      {"version", "1.0"},
      {"added_tokens", {Added(0, "<unk>"), Added(1, "<s>"), Added(2, "</s>")}},
      {"normalizer",
       {{"type", "Sequence"},
        {"normalizers", {{{"type", "Prepend"}, {"prepend", "\u2581"}}, replace}}}},
      {"decoder",
       {{"type", "Sequence"},
        {"decoders",
         {{{"type", "Replace"}, {"pattern", {{"String", "\u2581"}}}, {"content", " "}},
          {{"type", "ByteFallback"}},
          {{"type", "Fuse"}},
          {{"type", "Strip"}, {"content", " "}, {"start", 1}, {"stop", 0}}}}}},
      {"model",
       {{"type", "BPE"},
        {"unk_token", "<unk>"},
        {"fuse_unk", true},
        {"byte_fallback", true},
        {"vocab",
         {{"<unk>", 0},
          {"<s>", 1},
          {"</s>", 2},
          {"<0x0A>", 3},
          {"<0xC3>", 4},
          {"<0xA9>", 5},
          {"\u2581", 6},
          {"a", 7},
          {"b", 8},
          {"ab", 9},
          {"\u2581ab", 10}}},
        {"merges", {"a b", "\u2581 ab"}}}}};
  return tokenizer.dump();
}

std::string SmallGgufVocabulary(const std::string& model) {
  json vocabulary = {{"model", model}, {"bos_token_id", 1}, {"eos_token_id", 2}};
  if (model == "gpt2") {
    vocabulary["tokens"] = {"<unk>", "<s>", "</s>", "a", "b", "ab", "\u0120"};
    vocabulary["token_type"] = {2, 3, 3, 1, 1, 1, 1};
    vocabulary["merges"] = {"a b"};
    vocabulary["pre"] = "smollm";
  } else {
    vocabulary["tokens"] = {"<unk>", "<s>", "</s>", "<0x0A>", "a", "b", "ab", "\u2581"};
    vocabulary["token_type"] = {2, 3, 3, 6, 1, 1, 1, 1};
    vocabulary["scores"] = {0.0, 0.0, 0.0, 0.0, -1.0, -2.0, -3.0, -4.0};
    vocabulary["add_bos_token"] = true;
    vocabulary["chat_template"] = "{{ messages[0].content }}";
  }
  return vocabulary.dump();
}

}  // namespace sluice::fuzz
