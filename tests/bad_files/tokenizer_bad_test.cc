// Bad tokenizer.json, vocab.json, merges.txt, gguf_vocab.json and tokenizer_config.json.
#include <gtest/gtest.h>

#include "tests/bad_files/bad_file.h"
#include "tests/fuzz/small_tokenizer.h"

namespace sluice::bad_files {
namespace {

using checkpoint::Json;

constexpr char kFile[] = "tokenizer.json";

void ExpectTokenizerRefused(const char* container, const std::vector<BadFile>& cases) {
  ExpectRefused(container, cases, OpenTokenizer);
}

std::function<void(const TempDir&)> With(const std::function<void(Json&)>& change) {
  Json tokenizer = Json::parse(fuzz::SmallTokenizerJson());
  change(tokenizer);
  return File(kFile, tokenizer.dump());
}
// The value at a JSON pointer replaced.
std::function<void(const TempDir&)> Set(const std::string& pointer, const Json& value) {
  return With([&](Json& t) { t[Json::json_pointer(pointer)] = value; });
}
// {"version":"1.0", `member`, ...the sound rest}.
std::function<void(const TempDir&)> Member(const std::string& member) {
  std::string text = fuzz::SmallTokenizerJson();
  return File(kFile, text.insert(1, member + ","));
}

// NOLINTNEXTLINE(readability-function-size): a table
TEST(BadFilesTest, TokenizerTexts) {
  ExpectTokenizerRefused(
      "tokenizer",
      {
          {"F6", "nothing", [](const TempDir&) {}, {"no tokenizer", "nothing"}, kNotFound},
          {"F6", "empty", File(kFile, ""), {kFile, "not acceptable JSON"}},
          {"F6", "a list", File(kFile, "[]"), {kFile}},
          {"F6", "null", File(kFile, "null"), {kFile}},
          {"F6",
           "cut off",
           File(kFile, fuzz::SmallTokenizerJson().substr(0, 500)),
           {kFile, "not acceptable JSON"}},
          {"F6",
           "bytes after the end",
           File(kFile, fuzz::SmallTokenizerJson() + "x"),
           {kFile, "not acceptable JSON"}},
          {"F6", "a byte that is no UTF-8", File(kFile, "{\"a\":\"\xFF\"}"), {kFile}},
          {"F6",
           "LFS pointer",
           File(kFile, "version https://git-lfs.github.com/spec/v1\n"),
           {kFile}},
          {"F21", "lone surrogate", Member(R"("a":"\ud800")"), {kFile, "not acceptable JSON"}},
          {"F5", "a key twice", Member(R"("model":{})"), {kFile, "\"model\" appears twice"}},
          {"F5",
           "a token twice",
           File(kFile, R"({"model":{"vocab":{"a":0,"a":1},"merges":[]}})"),
           {kFile, "\"a\" appears twice"}},
          {"F3",
           "10,000 nested lists",
           File(kFile, "{\"a\":" + Copies(10'000, "[")),
           {kFile, "nested deeper"}},
          {"F3",
           "4,000,000 zeros",
           File(kFile, "{\"a\":[0" + Copies(4'000'000, ",0") + "]}"),
           {kFile, "values"}},
          {"F3",
           "2,000,000 empty strings",
           File(kFile, "{\"a\":[0" + Copies(2'000'000, ",\"\"") + "]}"),
           {kFile, "values"}},
          {"F3",
           "2,000,000 empty objects",
           File(kFile, "{\"a\":[0" + Copies(2'000'000, ",{}") + "]}"),
           {kFile, "values"}},
          {"F3",
           "a small file of 4 MiB and a byte",
           [](const TempDir& dir) {
             dir.Write(kFile, fuzz::SmallTokenizerJson());
             dir.Write("tokenizer_config.json", std::string((4 << 20) + 1, ' '));
           },
           {"tokenizer_config.json", "limit"}},
          {"F21", "no model", With([](Json& t) { t.erase("model"); }), {kFile, "\"model\""}},
          {"F21", "model a string", Set("/model", "BPE"), {kFile, "\"model\""}},
          {"F21", "version 2.0", Set("/version", "2.0"), {kFile, "version"}, kUnimplemented},
          {"F21", "version a number", Set("/version", 1), {kFile, "version"}, kUnimplemented},
          {"F21", "Unigram", Set("/model/type", "Unigram"), {kFile, "BPE"}, kUnimplemented},
          {"F21", "type a number", Set("/model/type", 1), {kFile, "type"}, kUnimplemented},
          {"F21", "dropout", Set("/model/dropout", 0.1), {kFile, "dropout"}, kUnimplemented},
          {"F21",
           "subword prefix",
           Set("/model/continuing_subword_prefix", "##"),
           {kFile, "continuing_subword_prefix"},
           kUnimplemented},
          {"F21",
           "word suffix",
           Set("/model/end_of_word_suffix", "</w>"),
           {kFile, "end_of_word_suffix"},
           kUnimplemented},
          {"F21",
           "byte_fallback a string",
           Set("/model/byte_fallback", "yes"),
           {kFile, "byte_fallback"}},
          {"F21", "fuse_unk a number", Set("/model/fuse_unk", 1), {kFile, "fuse_unk"}},
          {"F21",
           "ignore_merges a list",
           Set("/model/ignore_merges", Json::array()),
           {kFile, "ignore_merges"}},
          {"F21", "unk_token a number", Set("/model/unk_token", 0), {kFile, "unk_token"}},
          {"F21",
           "unk_token not in the vocabulary",
           Set("/model/unk_token", "<none>"),
           {kFile, "unk_token"}},
      });
}

// NOLINTNEXTLINE(readability-function-size): a table
TEST(BadFilesTest, TokenizerVocabularies) {
  std::vector<BadFile> cases = {
      {"F21", "vocabulary a list", Set("/model/vocab", Json::array({"a"})), {kFile, "vocabulary"}},
      {"F21", "empty vocabulary", Set("/model/vocab", Json::object()), {kFile, "empty"}},
      {"F21",
       "no vocabulary",
       With([](Json& t) { t["model"].erase("vocab"); }),
       {kFile, "vocabulary"}},
      {"F21",
       "two tokens of one id",
       Set("/model/vocab/zzz", 5),
       {kFile, "two tokens have the id 5"}},
      {"F21",
       "token of 3000 bytes",
       Set("/model/vocab/" + std::string(3000, 'x'), 200),
       {kFile, "longer than"}},
      {"F21", "merges a string", Set("/model/merges", "a b"), {kFile, "merges are not a list"}},
      {"F21",
       "no merges",
       With([](Json& t) { t["model"].erase("merges"); }),
       {kFile},
       kUnimplemented},
      {"F21",
       "a merge of tokens that are not there",
       Set("/model/merges/0", "q zz"),
       {kFile, "merge 0", "\"zz\""}},
      {"F21",
       "a merge whose result is not there",
       Set("/model/merges/0", "q z"),
       {kFile, "merge 0", "\"qz\""}},
      {"F21",
       "added_tokens an object",
       Set("/added_tokens", Json::object()),
       {kFile, "added_tokens"}},
      {"F21",
       "an added token without content",
       Set("/added_tokens/0", {{"id", 0}}),
       {kFile, "content"}},
      {"F21", "an added token a string", Set("/added_tokens/0", "<s>"), {kFile, "content"}},
      {"F21", "an added token \"\"", Set("/added_tokens/0/content", ""), {kFile, "empty"}},
      {"F21",
       "an added token of 3000 bytes",
       Set("/added_tokens/0/content", std::string(3000, 'x')),
       {kFile, "longer than"}},
      {"F5", "an added token twice", Set("/added_tokens/1/content", "<s>"), {kFile, "twice"}},
      {"F5", "an added id twice", Set("/added_tokens/1/id", 0), {kFile, "twice"}},
      {"F21",
       "an added token with another id than in the vocabulary",
       Set("/added_tokens/0/id", 77),
       {kFile, "another id"}},
      {"F21",
       "an added token far behind the vocabulary",
       With([](Json& t) {
         Json far = t["added_tokens"][0];
         far["content"] = "<far>";
         far["id"] = 20'000;
         t["added_tokens"].push_back(far);
       }),
       {kFile, "keep its id"}},
      {"F21", "special a string", Set("/added_tokens/0/special", "true"), {kFile, "special"}},
      {"F21", "lstrip a number", Set("/added_tokens/0/lstrip", 1), {kFile, "lstrip"}},
      {"F21", "no vocab.json", File("merges.txt", "a b\n"), {"merges.txt"}, kNotFound},
      {"F21", "no merges.txt", File("vocab.json", R"({"a":0})"), {"vocab.json"}, kNotFound},
  };
  for (const Json& id : {Json(2147483648U), Json(1U << 21), Json(4294967296U), Json(-1), Json(1.5),
                         Json("7"), Json(nullptr), Json(true), Json(1e300)}) {
    cases.push_back(
        {"F21", "token id " + id.dump(), Set("/model/vocab/zzz", id), {kFile, "token id"}});
    cases.push_back(
        {"F21", "added id " + id.dump(), Set("/added_tokens/0/id", id), {kFile, "token id"}});
  }
  for (const Json& merge :
       {Json("a"), Json("a b c"), Json(7), Json::array({"a"}), Json::array({"a", 1}),
        Json::array({"a", "b", "c"}), Json(" "), Json::array({"", ""}), Json(nullptr)}) {
    cases.push_back(
        {"F21", "merge " + merge.dump(), Set("/model/merges/0", merge), {kFile, "merge 0"}});
  }
  ExpectTokenizerRefused("tokenizer", cases);
}

TEST(BadFilesTest, TokenizerPairsOfFiles) {
  const auto pair = [](const std::string& vocab, const std::string& merges) {
    return [=](const TempDir& dir) {
      dir.Write("vocab.json", vocab);
      dir.Write("merges.txt", merges);
    };
  };
  const std::string vocab = R"({"a":0,"b":1,"ab":2})";
  ExpectTokenizerRefused(
      "tokenizer",
      {
          {"F6", "vocab.json empty", pair("", "a b\n"), {"vocab.json", "not acceptable JSON"}},
          {"F21", "vocab.json a list", pair("[]", "a b\n"), {"vocab.json", "vocabulary"}},
          {"F21", "vocab.json with id -1", pair(R"({"a":-1})", ""), {"vocab.json", "token id -1"}},
          {"F5",
           "vocab.json with a token twice",
           pair(R"({"a":0,"a":1})", ""),
           {"vocab.json", "appears twice"}},
          {"F21", "merges.txt with three parts", pair(vocab, "a b ab\n"), {"merges.txt", "1"}},
          {"F21", "merges.txt with one part", pair(vocab, "#version: 0.2\nab\n"), {"merges.txt"}},
          {"F21", "merges.txt not UTF-8", pair(vocab, "a \xFF\n"), {"merges.txt", "UTF-8"}},
          {"F21", "merges.txt with an unknown token", pair(vocab, "a z\n"), {"merge 0", "\"z\""}},
          {"F21",
           "2^21 + 1 merges",
           pair(vocab, Copies((1 << 21) + 1, "a b\n")),
           {"merges, the limit"}},
      });
}

// HF tokenizers PR #2060, fastokens #39: a pattern that never comes back.
// NOLINTNEXTLINE(readability-function-size): a table
TEST(BadFilesTest, TokenizerParts) {
  std::vector<BadFile> cases;
  const Json split = {{"type", "Split"}, {"behavior", "Isolated"}, {"invert", false}};
  for (const std::string pattern :
       {"(a+)+", "", "\\w+", "(?:(?:a*)*)*b", "(x+x+)+y", "([a-zA-Z]+)*$", "(a|aa)+$", ".*"}) {
    Json part = split;
    part["pattern"]["Regex"] = pattern;
    const Json replace = {{"type", "Replace"}, {"pattern", {{"Regex", pattern}}}, {"content", "b"}};
    cases.push_back({"F21",
                     "split by " + pattern,
                     Set("/pre_tokenizer", part),
                     {kFile, "pre_tokenizer", "regex"},
                     kUnimplemented});
    cases.push_back({"F21",
                     "normalizer replaces " + pattern,
                     Set("/normalizer", replace),
                     {kFile, "normalizer", "regex"},
                     kUnimplemented});
  }
  Json inner = split;
  inner["pattern"]["Regex"] = "(a+)+";
  cases.push_back(
      {"F21",
       "a pattern inside of a Sequence",
       Set("/pre_tokenizer", {{"type", "Sequence"}, {"pretokenizers", Json::array({inner})}}),
       {kFile, "regex"},
       kUnimplemented});
  cases.push_back(
      {"F21",
       "a pattern in the decoder",
       Set("/decoder", {{"type", "Replace"}, {"pattern", {{"Regex", "(a+)+"}}}, {"content", "b"}}),
       {kFile, "decoder", "regex"},
       kUnimplemented});
  for (const char* key : {"normalizer", "pre_tokenizer", "post_processor", "decoder"}) {
    const std::string pointer = std::string("/") + key;
    cases.push_back({"F21",
                     std::string(key) + " unknown",
                     Set(pointer, {{"type", "Evil"}}),
                     {kFile, key, "Evil"},
                     kUnimplemented});
    cases.push_back({"F21",
                     std::string(key) + " a string",
                     Set(pointer, "ByteLevel"),
                     {kFile, key},
                     kUnimplemented});
    cases.push_back({"F21",
                     std::string(key) + " a Sequence without a list",
                     Set(pointer, {{"type", "Sequence"}}),
                     {kFile, key}});
  }
  const Json twice = {{"type", "Replace"}, {"pattern", {{"String", "a"}}}, {"content", "aa"}};
  cases.push_back({"F21",
                   "a normalizer that grows the text 16 times",
                   Set("/normalizer", {{"type", "Sequence"},
                                       {"normalizers", Json::array({twice, twice, twice, twice})}}),
                   {kFile, "multiply"}});
  cases.push_back(
      {"F21",
       "Replace of an empty pattern",
       Set("/normalizer", {{"type", "Replace"}, {"pattern", {{"String", ""}}}, {"content", "a"}}),
       {kFile, "empty pattern"}});
  cases.push_back({"F21",
                   "Prepend of 1000 bytes",
                   Set("/normalizer", {{"type", "Prepend"}, {"prepend", std::string(1000, 'a')}}),
                   {kFile, "prepends"}});
  cases.push_back({"F21",
                   "a post-processor that inserts id 2^31",
                   Set("/post_processor/special_tokens/<s>/ids/0", 2147483648U),
                   {kFile, "post_processor"}});
  cases.push_back({"F21",
                   "a post-processor that inserts an id of another vocabulary",
                   Set("/post_processor/special_tokens/<s>/ids/0", 5000),
                   {kFile, "post_processor"}});
  ExpectTokenizerRefused("tokenizer", cases);
}

std::function<void(const TempDir&)> Vocabulary(const char* model, const std::string& key,
                                               const Json& value) {
  Json vocabulary = Json::parse(fuzz::SmallGgufVocabulary(model));
  vocabulary[key] = value;
  return File("gguf_vocab.json", vocabulary.dump());
}

// NOLINTNEXTLINE(readability-function-size): a table
TEST(BadFilesTest, TokenizerGgufVocabularies) {
  constexpr char kVocabulary[] = "gguf_vocab.json";
  ExpectTokenizerRefused(
      "tokenizer",
      {
          {"F21",
           "kind t5",
           Vocabulary("llama", "model", "t5"),
           {kVocabulary, "gpt2, llama"},
           kUnimplemented},
          {"F21", "kind a number", Vocabulary("llama", "model", 5), {kVocabulary}, kUnimplemented},
          {"F21", "tokens a number", Vocabulary("llama", "tokens", 5), {kVocabulary, "tokens"}},
          {"F21",
           "a token a number",
           Vocabulary("llama", "tokens", {1, 2}),
           {kVocabulary, "string"}},
          {"F21",
           "types of another length",
           Vocabulary("llama", "token_type", {1}),
           {kVocabulary, "token_type"}},
          {"F21",
           "types strings",
           Vocabulary("llama", "token_type", {"1", "1", "1", "1", "1", "1", "1", "1"}),
           {kVocabulary, "token_type"}},
          {"F21",
           "type -1",
           Vocabulary("llama", "token_type", {-1, 3, 3, 6, 1, 1, 1, 1}),
           {kVocabulary, "token_type"}},
          {"F21",
           "type 7",
           Vocabulary("llama", "token_type", {7, 3, 3, 6, 1, 1, 1, 1}),
           {kVocabulary, "token_type"}},
          {"F21",
           "scores of another length",
           Vocabulary("llama", "scores", {1}),
           {kVocabulary, "scores"}},
          {"F21", "scores null", Vocabulary("llama", "scores", nullptr), {kVocabulary, "scores"}},
          {"F21",
           "a score a string",
           Vocabulary("llama", "scores", {"0", 0, 0, 0, 0, 0, 0, 0}),
           {kVocabulary, "scores"}},
          {"F21",
           "bos outside",
           Vocabulary("llama", "bos_token_id", 8),
           {kVocabulary, "bos_token_id"}},
          {"F21",
           "eos of 2^32 - 1",
           Vocabulary("llama", "eos_token_id", 4294967295U),
           {kVocabulary, "token id"}},
          {"F21",
           "unknown id -1",
           Vocabulary("llama", "unknown_token_id", -1),
           {kVocabulary, "token id"}},
          {"F21",
           "merges not pairs",
           Vocabulary("gpt2", "merges", {"a"}),
           {kVocabulary, "merge 0"}},
          {"F21",
           "pre-tokenizer unknown",
           Vocabulary("gpt2", "pre", "made-up"),
           {kVocabulary, "made-up"},
           kUnimplemented},
          {"F5",
           "a token twice",
           Vocabulary("gpt2", "tokens", {"<unk>", "<s>", "</s>", "a", "b", "ab", "a"}),
           {kVocabulary, "twice"}},
      });
}

TEST(BadFilesTest, TokenizerSmallFiles) {
  const auto small = [](const std::string& name, const std::string& content) {
    return [=](const TempDir& dir) {
      dir.Write(kFile, fuzz::SmallTokenizerJson());
      dir.Write(name, content);
    };
  };
  ExpectTokenizerRefused(
      "tokenizer", {
                       {"F6",
                        "tokenizer_config.json not JSON",
                        small("tokenizer_config.json", "{"),
                        {"tokenizer_config.json", "not acceptable JSON"}},
                       {"F5",
                        "tokenizer_config.json: a key twice",
                        small("tokenizer_config.json", R"({"bos_token":"<s>","bos_token":"</s>"})"),
                        {"tokenizer_config.json", "\"bos_token\" appears twice"}},
                       {"F22",
                        "chat_template a number",
                        small("tokenizer_config.json", R"({"chat_template":5})"),
                        {"tokenizer_config.json", "chat_template"}},
                       {"F21",
                        "bos_token a number",
                        small("tokenizer_config.json", R"({"bos_token":5})"),
                        {"tokenizer_config.json", "bos_token"}},
                       {"F21",
                        "add_bos_token a string",
                        small("tokenizer_config.json", R"({"add_bos_token":"y"})"),
                        {"tokenizer_config.json", "add_bos_token"}},
                       {"F6",
                        "special_tokens_map.json a list",
                        small("special_tokens_map.json", "[]"),
                        {"special_tokens_map.json"}},
                       {"F21",
                        "eos_token without content",
                        small("special_tokens_map.json", R"({"eos_token":{"lstrip":true}})"),
                        {"special_tokens_map.json", "eos_token"}},
                       {"F17",
                        "generation_config.json: eos id 2^31",
                        small("generation_config.json", R"({"eos_token_id":2147483648})"),
                        {"generation_config.json", "token id"}},
                       {"F17",
                        "generation_config.json: eos ids strings",
                        small("generation_config.json", R"({"eos_token_id":["2"]})"),
                        {"generation_config.json", "token id"}},
                       {"F17",
                        "generation_config.json: bos id -1",
                        small("generation_config.json", R"({"bos_token_id":-1})"),
                        {"generation_config.json", "token id"}},
                   });
}

}  // namespace
}  // namespace sluice::bad_files
