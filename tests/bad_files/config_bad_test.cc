// Bad config.json, generation_config.json, quantization_config, quantize_config.json and
// quant_config.json beside sound weights.
#include <gtest/gtest.h>

#include <filesystem>

#include "tests/bad_files/bad_file.h"

namespace sluice::bad_files {
namespace {

using checkpoint::TinyModel;

constexpr char kFile[] = "config.json";

std::function<void(const TempDir&)> Text(const std::string& text) {
  return [text](const TempDir& dir) {
    TinyModel::Llama().Write(dir);
    dir.Write(kFile, text);
  };
}
// The sound configuration of a Llama or an OPT with `key` set to a JSON text; "" removes it.
std::function<void(const TempDir&)> Set(const std::string& key, const std::string& value,
                                        bool opt = false) {
  return [=](const TempDir& dir) {
    TinyModel model = opt ? TinyModel::Opt() : TinyModel::Llama();
    model.Write(dir);
    model.config.erase(key);
    std::string text = model.config.dump();
    if (!value.empty()) text.insert(1, "\"" + key + "\":" + value + ",");
    dir.Write(kFile, text);
  };
}
std::function<void(const TempDir&)> Quant(const std::string& value) {
  return Set("quantization_config", value);
}

TEST(BadFilesTest, ConfigTexts) {
  ExpectRefused(
      "config",
      {
          {"F6", "empty", Text(""), {kFile, "broken JSON"}},
          {"F6", "not JSON", Text("model_type: llama"), {kFile, "broken JSON"}},
          {"F6", "a list", Text("[]"), {kFile, "one JSON object"}},
          {"F6", "null", Text("null"), {kFile, "one JSON object"}},
          {"F6", "cut off", Text(R"({"model_type":"lla)"), {kFile, "broken JSON"}},
          {"F6", "two objects", Text("{}{}"), {kFile, "broken JSON"}},
          {"F6",
           "a byte that is no UTF-8",
           Text("{\"model_type\":\"\xC0\xAF\"}"),
           {kFile, "broken JSON"}},
          {"F6", "lone surrogate", Text(R"({"model_type":"\udfff"})"), {kFile, "broken JSON"}},
          {"F6",
           "LFS pointer",
           Text("version https://git-lfs.github.com/spec/v1\n"),
           {kFile, "git lfs pull"}},
          {"F3", "5 MB", Text(std::string(5'000'000, ' ')), {kFile, "5000000 bytes"}},
          {"F3",
           "1 TiB",
           [](const TempDir& dir) {
             TinyModel::Llama().Write(dir);
             std::filesystem::resize_file(dir.path() + "/" + kFile, 1ULL << 40);
           },
           {kFile, "bytes, more than"}},
          {"F3",
           "10,000 nested lists",
           Text("{\"a\":" + std::string(10'000, '[')),
           {kFile, "deeper than 32"}},
          {"F3",
           "a million empty objects",
           Text([] {
             std::string text = "{\"a\":[{}";
             for (int i = 0; i < 1'000'000; ++i) text += ",{}";
             return text + "]}";
           }()),
           {kFile, "values of more than"}},
          {"F5",
           "a key twice",
           Text(R"({"model_type":"llama","model_type":"opt"})"),
           {kFile, "\"model_type\" appears twice"}},
          {"F5",
           "a key twice inside",
           Set("rope_scaling", R"({"rope_type":"linear","rope_type":"dynamic","factor":2})"),
           {kFile, "\"rope_type\" appears twice"}},
          {"F16", "no model type", Set("model_type", ""), {kFile, "model_type is missing"}},
          {"F16", "model type a number", Set("model_type", "5"), {kFile, "model_type"}},
          {"F16",
           "model type unknown",
           Set("model_type", "\"bert\""),
           {kFile, "bert"},
           kUnimplemented},
          {"F16",
           "model type of 100,000 bytes",
           Set("model_type", "\"" + std::string(100'000, 'm') + "\""),
           {kFile, "model_type"},
           kUnimplemented},
      });
}

TEST(BadFilesTest, ConfigCounts) {
  std::vector<BadFile> cases;
  const auto add = [&cases](const char* rule, const std::string& key, const std::string& value,
                            bool opt) {
    cases.push_back({rule,
                     key + " = " + (value.empty() ? "(none)" : value),
                     Set(key, value, opt),
                     {kFile, key}});
  };
  for (const char* key : {"num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads",
                          "intermediate_size"}) {
    for (const char* value : {"1000000000", "-1", "0", "\"32\"", "1.5", "null"}) {
      add("F17", key, value, /*opt=*/false);
    }
  }
  add("F17", "num_hidden_layers", "", false);
  add("F17", "num_hidden_layers", "[1]", false);
  add("F17", "num_hidden_layers", "true", false);
  add("F17", "num_hidden_layers", "18446744073709551615", false);
  add("F17", "num_key_value_heads", "0", false);
  add("F17", "num_key_value_heads", "\"2\"", false);
  add("F17", "head_dim", "0", false);
  add("F17", "head_dim", "1000000", false);
  add("F17", "max_position_embeddings", "0", false);
  add("F17", "max_position_embeddings", "1000000000", false);
  add("F17", "rms_norm_eps", "-1", false);
  add("F17", "rms_norm_eps", "\"1e-5\"", false);
  add("F17", "rope_theta", "0", false);
  add("F17", "rope_theta", "\"10000\"", false);
  add("F17", "ffn_dim", "0", true);
  add("F17", "ffn_dim", "", true);
  add("F17", "word_embed_proj_dim", "-1", true);
  add("F17", "num_hidden_layers", "1001", true);
  cases.push_back(
      {"F17", "layers = 1e400", Set("num_hidden_layers", "1e400"), {kFile, "out of range"}});
  cases.push_back({"F17", "layers = NaN", Set("num_hidden_layers", "NaN"), {kFile, "broken JSON"}});
  cases.push_back({"F17",
                   "1,000 layers that the weights have not",
                   Set("num_hidden_layers", "1000"),
                   {"layers.1.", "is missing"}});
  ExpectRefused("config", cases);
}

// NOLINTNEXTLINE(readability-function-size): a table
TEST(BadFilesTest, ConfigAgainstTensors) {
  ExpectRefused(
      "config",
      {
          {"F16",
           "one row more than the table",
           Set("vocab_size", "9"),
           {"model.safetensors", "embed_tokens.weight", "[8, 32]", "[9, 32]"}},
          {"F16", "another width", Set("hidden_size", "36"), {"model.safetensors", "embed_tokens"}},
          {"F16",
           "another inner width",
           Set("intermediate_size", "63"),
           {"model.safetensors", "gate_proj.weight", "[63, 32]"}},
          {"F16",
           "heads that do not divide the width",
           Set("num_attention_heads", "3"),
           {kFile, "multiple of num_attention_heads"}},
          {"F16",
           "key/value heads that do not divide heads",
           Set("num_key_value_heads", "3"),
           {kFile, "key/value heads (3)"}},
          {"F16",
           "more key/value heads than heads",
           Set("num_key_value_heads", "4"),
           {kFile, "key/value heads (4)"}},
          {"F16", "odd head size", Set("head_dim", "17"), {kFile, "even"}},
          {"F16",
           "another head size",
           Set("head_dim", "8"),
           {"model.safetensors", "q_proj.weight"}},
          {"F16", "heads times head size beyond 2^17", Set("head_dim", "131072"), {kFile, "2^17"}},
          {"F16",
           "biases that are not there",
           Set("attention_bias", "true"),
           {"q_proj.bias is missing"}},
          {"F16",
           "bias flag a string",
           Set("attention_bias", "\"yes\""),
           {kFile, "attention_bias"}},
          {"F16",
           "tied flag a number",
           Set("tie_word_embeddings", "1"),
           {kFile, "tie_word_embeddings"}},
          {"F16",
           "untied without a head",
           Set("tie_word_embeddings", "false"),
           {"lm_head.weight is missing"}},
          {"F16",
           "activation unknown",
           Set("hidden_act", "\"tanhshrink\""),
           {kFile, "tanhshrink"},
           kUnimplemented},
          {"F16", "activation a list", Set("hidden_act", "[]"), {kFile, "hidden_act"}},
          {"F16",
           "dtype unknown",
           Set("torch_dtype", "\"float64\""),
           {kFile, "float64"},
           kUnimplemented},
          {"F16", "dtype a number", Set("torch_dtype", "16"), {kFile, "torch_dtype"}},
          {"F16",
           "rope type unknown",
           Set("rope_scaling", R"({"rope_type":"yarn","factor":2})"),
           {kFile, "yarn"},
           kUnimplemented},
          {"F16", "rope scaling a list", Set("rope_scaling", "[]"), {kFile, "rope_scaling"}},
          {"F16",
           "rope factor 0",
           Set("rope_scaling", R"({"type":"linear","factor":0})"),
           {kFile, "factor"}},
          {"F16",
           "rope factor a string",
           Set("rope_scaling", R"({"type":"linear","factor":"2"})"),
           {kFile, "factor"}},
          {"F16",
           "no rope factor",
           Set("rope_scaling", R"({"type":"linear"})"),
           {kFile, "factor is missing"}},
          {"F16",
           "llama3 scaling without its frequencies",
           Set("rope_scaling", R"({"rope_type":"llama3","factor":8})"),
           {kFile, "low_freq_factor"}},
          {"F16",
           "llama3 frequencies in reverse",
           Set("rope_scaling",
               R"({"rope_type":"llama3","factor":8,"low_freq_factor":4,"high_freq_factor":1,)"
               R"("original_max_position_embeddings":8192})"),
           {kFile, "high_freq_factor"}},
          {"F16",
           "rotary embedding of part of a head",
           Set("partial_rotary_factor", "0.5"),
           {kFile, "partial_rotary_factor"},
           kUnimplemented},
          {"F17", "eos id of 2^31", Set("eos_token_id", "2147483648"), {kFile, "eos_token_id"}},
          {"F17", "eos id -2", Set("eos_token_id", "-2"), {kFile, "eos_token_id"}},
          {"F17", "eos id a string", Set("eos_token_id", "\"2\""), {kFile, "eos_token_id"}},
          {"F17",
           "65 eos ids",
           Set("eos_token_id",
               [] {
                 std::string list = "[1";
                 for (int i = 0; i < 64; ++i) list += ",1";
                 return list + "]";
               }()),
           {kFile, "eos_token_id"}},
          {"F17",
           "eos id outside of the vocabulary",
           Set("eos_token_id", "8"),
           {kFile, "eos_token_id", "8"}},
          {"F17",
           "bos id outside of the vocabulary",
           Set("bos_token_id", "100"),
           {kFile, "bos_token_id", "100"}},
          {"F17",
           "generation config: eos id 1.5",
           [](const TempDir& dir) {
             TinyModel::Llama().Write(dir);
             dir.Write("generation_config.json", R"({"eos_token_id":[1.5]})");
           },
           {"generation_config.json", "eos_token_id"}},
          {"F6",
           "generation config: not JSON",
           [](const TempDir& dir) {
             TinyModel::Llama().Write(dir);
             dir.Write("generation_config.json", "{");
           },
           {"generation_config.json", "broken JSON"}},
      });
}

// NOLINTNEXTLINE(readability-function-size): a table
TEST(BadFilesTest, QuantConfigs) {
  std::vector<BadFile> cases;
  const auto gptq = [&cases](const char* rule, const std::string& key, const std::string& value,
                             absl::StatusCode code = kInvalid) {
    cases.push_back({rule,
                     key + " = " + value,
                     Quant(R"({"quant_method":"gptq",")" + key + "\":" + value +
                           (key == "bits" ? "" : R"(,"bits":4)") + "}"),
                     {kFile, key == "checkpoint_format" || key == "bits" ? "" : key},
                     code});
  };
  for (const char* bits : {"0", "-4", "3.5", "255", "\"4\"", "[4]", "1"}) {
    gptq("F16", "bits", bits);
  }
  for (const char* bits : {"2", "3", "8"}) gptq("F16", "bits", bits, kUnimplemented);
  for (const char* size : {"0", "-2", "7", "12", "1.5", "\"128\"", "100000000", "[128]"}) {
    gptq("F16", "group_size", size);
  }
  gptq("F16", "sym", "\"no\"");
  gptq("F16", "desc_act", "5");
  gptq("F16", "checkpoint_format", "\"marlin\"", kUnimplemented);
  gptq("F16", "checkpoint_format", "\"unheard\"", kUnimplemented);
  gptq("F16", "checkpoint_format", "7");
  gptq("F16", "is_marlin_format", "true", kUnimplemented);
  gptq("F16", "pack_dtype", "\"int8\"", kUnimplemented);
  gptq("F16", "pack_dtype", "8");
  cases.back().words = {kFile, "pack_dtype"};
  for (BadFile& bad : cases) {
    if (bad.name == "is_marlin_format = true") bad.words = {kFile, "Marlin"};
  }
  cases.insert(
      cases.end(),
      {
          {"F16", "quantization_config a list", Quant("[]"), {kFile, "quantization_config"}},
          {"F16",
           "quantization_config a string",
           Quant("\"gptq\""),
           {kFile, "quantization_config"}},
          {"F16",
           "method unknown",
           Quant(R"({"quant_method":"hqq"})"),
           {kFile, "hqq"},
           kUnimplemented},
          {"F16", "method a number", Quant(R"({"quant_method":4})"), {kFile, "quant_method"}},
          {"F16",
           "method of 100,000 bytes",
           Quant(R"({"quant_method":")" + std::string(100'000, 'q') + "\"}"),
           {kFile},
           kUnimplemented},
          {"F16",
           "AWQ layout gemv",
           Quant(R"({"quant_method":"awq","bits":4,"version":"gemv"})"),
           {kFile, "gemv"},
           kUnimplemented},
          {"F16",
           "AWQ group size 0",
           Quant(R"({"quant_method":"awq","bits":4,"group_size":0})"),
           {kFile, "group_size"}},
          {"F16", "AWQ w_bit 255", Quant(R"({"quant_method":"awq","w_bit":255})"), {kFile, "bits"}},
          {"F16",
           "LLM.int8",
           Quant(R"({"quant_method":"bitsandbytes","load_in_8bit":true})"),
           {kFile, "LLM.int8"},
           kUnimplemented},
          {"F16",
           "load_in_4bit a number",
           Quant(R"({"quant_method":"bitsandbytes","load_in_4bit":1})"),
           {kFile, "load_in_4bit"}},
          {"F16",
           "bitsandbytes without such weights",
           Quant(R"({"quant_method":"bitsandbytes","load_in_4bit":true})"),
           {kFile, "not quantized"},
           kUnimplemented},
          {"F16",
           "compressed-tensors",
           Set("compression_config", "{\"a\":1}"),
           {kFile, "compressed-tensors"},
           kUnimplemented},
          {"F5",
           "bits twice",
           Quant(R"({"quant_method":"gptq","bits":4,"bits":8})"),
           {kFile, "\"bits\" appears twice"}},
          {"F6",
           "quantize_config.json not JSON",
           [](const TempDir& dir) {
             TinyModel::Llama().Write(dir);
             dir.Write("quantize_config.json", "{");
           },
           {"quantize_config.json", "broken JSON"}},
          {"F16",
           "quantize_config.json with 9 bits",
           [](const TempDir& dir) {
             TinyModel::Llama().Write(dir);
             dir.Write("quantize_config.json", R"({"bits":9,"group_size":128})");
           },
           {"quantize_config.json", "bits"}},
          {"F16",
           "quant_config.json with a group of 7",
           [](const TempDir& dir) {
             TinyModel::Llama().Write(dir);
             dir.Write("quant_config.json", R"({"w_bit":4,"q_group_size":7})");
           },
           {"quant_config.json", "group_size"}},
          {"F3",
           "quant_config.json of 5 MB",
           [](const TempDir& dir) {
             TinyModel::Llama().Write(dir);
             dir.Write("quant_config.json", std::string(5'000'000, ' '));
           },
           {"quant_config.json", "5000000 bytes"}},
      });
  ExpectRefused("quantization config", cases);
}

}  // namespace
}  // namespace sluice::bad_files
