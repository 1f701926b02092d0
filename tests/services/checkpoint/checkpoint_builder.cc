#include "tests/services/checkpoint/checkpoint_builder.h"

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <random>

#include "kernels/core/check.h"

namespace sluice::checkpoint {
namespace {

// `count` float16 values in -1..1, a fixed sequence.
std::string RandomHalves(size_t count) {
  static std::mt19937 generator(7);
  std::uniform_real_distribution<float> distribution(-1, 1);
  std::vector<uint16_t> values(count);
  for (uint16_t& value : values) value = FloatToHalf(distribution(generator));
  return Bytes(values);
}

BuiltTensor Half(const std::vector<uint64_t>& shape) {
  size_t count = 1;
  for (const uint64_t dim : shape) count *= dim;
  return {"F16", shape, RandomHalves(count)};
}

template <typename T>
std::string Number(T value) {
  return Bytes(std::vector<T>{value});
}

std::string GgufString(const std::string& text) { return Number<uint64_t>(text.size()) + text; }

template <typename T>
std::string GgufArray(uint32_t type, const std::vector<T>& values) {
  return Number<uint32_t>(type) + Number<uint64_t>(values.size()) + Bytes(values);
}

}  // namespace

TempDir::TempDir() {
  std::string path = (std::filesystem::temp_directory_path() / "sluice-XXXXXX").string();
  SLUICE_CHECK(mkdtemp(path.data()) != nullptr) << path;
  path_ = std::filesystem::canonical(path).string();
}

TempDir::~TempDir() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

void TempDir::Write(const std::string& name, const std::string& content) const {
  std::ofstream file(path_ + "/" + name, std::ios::binary);
  file.write(content.data(), static_cast<std::streamsize>(content.size()));
  SLUICE_CHECK(file.good()) << name;
}

void TempDir::Overwrite(const std::string& name, size_t at, char byte) const {
  std::fstream file(path_ + "/" + name, std::ios::binary | std::ios::in | std::ios::out);
  file.seekp(static_cast<std::streamoff>(at));
  file.put(byte);
  SLUICE_CHECK(file.good()) << name;
}

std::string SafetensorsFile(const std::string& header, const std::string& data) {
  return Number<uint64_t>(header.size()) + header + data;
}

std::string SafetensorsFile(const TensorMap& tensors) {
  Json header = Json::object();
  std::string data;
  for (const auto& [name, tensor] : tensors) {
    const size_t begin = data.size();
    data += tensor.data;
    header[name] = {
        {"dtype", tensor.dtype}, {"shape", tensor.shape}, {"data_offsets", {begin, data.size()}}};
  }
  return SafetensorsFile(header.dump(), data);
}

TinyModel TinyModel::Llama() {
  TinyModel model;
  model.config = {{"model_type", "llama"},    {"hidden_size", 32},
                  {"num_attention_heads", 2}, {"num_key_value_heads", 1},
                  {"intermediate_size", 64},  {"vocab_size", 8},
                  {"num_hidden_layers", 1},   {"rms_norm_eps", 1e-5},
                  {"torch_dtype", "float16"}, {"tie_word_embeddings", true}};
  TensorMap& t = model.tensors;
  t["model.embed_tokens.weight"] = Half({8, 32});
  t["model.norm.weight"] = Half({32});
  const std::string p = "model.layers.0.";
  t[p + "input_layernorm.weight"] = Half({32});
  t[p + "post_attention_layernorm.weight"] = Half({32});
  t[p + "self_attn.q_proj.weight"] = Half({32, 32});
  t[p + "self_attn.k_proj.weight"] = Half({16, 32});
  t[p + "self_attn.v_proj.weight"] = Half({16, 32});
  t[p + "self_attn.o_proj.weight"] = Half({32, 32});
  t[p + "mlp.gate_proj.weight"] = Half({64, 32});
  t[p + "mlp.up_proj.weight"] = Half({64, 32});
  t[p + "mlp.down_proj.weight"] = Half({32, 64});
  return model;
}

TinyModel TinyModel::Opt() {
  TinyModel model;
  model.config = {{"model_type", "opt"},      {"hidden_size", 16},
                  {"num_attention_heads", 2}, {"ffn_dim", 32},
                  {"vocab_size", 8},          {"num_hidden_layers", 1},
                  {"torch_dtype", "float16"}, {"max_position_embeddings", 6}};
  TensorMap& t = model.tensors;
  const std::string d = "model.decoder.";
  t[d + "embed_tokens.weight"] = Half({8, 16});
  t[d + "embed_positions.weight"] = Half({8, 16});
  const std::string p = d + "layers.0.";
  for (const std::string& norm :
       {d + "final_layer_norm", p + "self_attn_layer_norm", p + "final_layer_norm"}) {
    t[norm + ".weight"] = Half({16});
    t[norm + ".bias"] = Half({16});
  }
  for (const char* name : {"q_proj", "k_proj", "v_proj", "out_proj"}) {
    t[p + "self_attn." + name + ".weight"] = Half({16, 16});
    t[p + "self_attn." + name + ".bias"] = Half({16});
  }
  t[p + "fc1.weight"] = Half({32, 16});
  t[p + "fc1.bias"] = Half({32});
  t[p + "fc2.weight"] = Half({16, 32});
  t[p + "fc2.bias"] = Half({16});
  return model;
}

void TinyModel::Quantize(const std::string& name, const TensorMap& parts) {
  const bool opt = config["model_type"] == "opt";
  const std::string base = (opt ? "model.decoder.layers.0." : "model.layers.0.") + name;
  tensors.erase(base + ".weight");
  for (const auto& [part, tensor] : parts) tensors[base + "." + part] = tensor;
}

void TinyModel::Write(const TempDir& dir) const {
  dir.Write("config.json", config.dump());
  dir.Write("model.safetensors", SafetensorsFile(tensors));
}

absl::StatusOr<std::unique_ptr<Checkpoint>> TinyModel::Open(const TempDir& dir) const {
  Write(dir);
  return Checkpoint::Open(dir.path());
}

absl::StatusOr<QuantizedMatrix> ReadNamed(const Checkpoint& checkpoint, const std::string& name) {
  const auto& tensors = checkpoint.description().tensors();
  for (int i = 0; i < tensors.size(); ++i) {
    if (tensors[i].name() == name) return checkpoint.Read(i);
  }
  return absl::NotFoundError(name);
}

std::vector<float> Dequantize(const QuantizedMatrix& matrix) {
  std::vector<float> values(matrix.spec.n * matrix.spec.k);
  for (int64_t row = 0; row < matrix.spec.n; ++row) {
    DequantizeRow(matrix, row, values.data() + row * matrix.spec.k);
  }
  return values;
}

GgufBuilder GgufBuilder::Llama() {
  GgufBuilder gguf;
  gguf.Text("general.architecture", "llama");
  gguf.U32("llama.block_count", 1);
  gguf.U32("llama.embedding_length", 32);
  gguf.U32("llama.feed_forward_length", 64);
  gguf.U32("llama.context_length", 128);
  gguf.U32("llama.attention.head_count", 2);
  gguf.U32("llama.attention.head_count_kv", 1);
  gguf.U32("llama.rope.dimension_count", 16);
  gguf.F32("llama.attention.layer_norm_rms_epsilon", 1e-5F);
  gguf.Text("tokenizer.ggml.model", "gpt2");
  gguf.Texts("tokenizer.ggml.tokens", {"a", "b", "c", "d", "e", "f", "g", "h"});
  gguf.Ints("tokenizer.ggml.token_type", {3, 1, 1, 1, 1, 1, 1, 1});
  gguf.Texts("tokenizer.ggml.merges", {"a b"});
  gguf.U32("tokenizer.ggml.eos_token_id", 2);
  const auto f32 = [&gguf](const std::string& name, uint64_t k, uint64_t n) {
    const std::vector<uint64_t> dims =
        n == 0 ? std::vector<uint64_t>{k} : std::vector<uint64_t>{k, n};
    gguf.Tensor(name, 0, dims, Repeat<float>(0.5F, k * std::max<uint64_t>(n, 1)));
  };
  f32("token_embd.weight", 32, 8);
  f32("output_norm.weight", 32, 0);
  f32("blk.0.attn_norm.weight", 32, 0);
  f32("blk.0.ffn_norm.weight", 32, 0);
  f32("blk.0.attn_q.weight", 32, 32);
  f32("blk.0.attn_k.weight", 32, 16);
  f32("blk.0.attn_v.weight", 32, 16);
  f32("blk.0.attn_output.weight", 32, 32);
  f32("blk.0.ffn_gate.weight", 32, 64);
  f32("blk.0.ffn_up.weight", 32, 64);
  f32("blk.0.ffn_down.weight", 64, 32);
  return gguf;
}

void GgufBuilder::Raw(const std::string& key, uint32_t type, const std::string& value) {
  keys_[key] = Number(type) + value;
}
void GgufBuilder::Text(const std::string& key, const std::string& value) {
  Raw(key, 8, GgufString(value));
}
void GgufBuilder::U32(const std::string& key, uint32_t value) { Raw(key, 4, Number(value)); }
void GgufBuilder::F32(const std::string& key, float value) { Raw(key, 6, Number(value)); }
void GgufBuilder::Flag(const std::string& key, bool value) {
  Raw(key, 7, Number<uint8_t>(value ? 1 : 0));
}
void GgufBuilder::Texts(const std::string& key, const std::vector<std::string>& values) {
  std::string bytes = Number<uint32_t>(8) + Number<uint64_t>(values.size());
  for (const std::string& value : values) bytes += GgufString(value);
  Raw(key, 9, bytes);
}
void GgufBuilder::Floats(const std::string& key, const std::vector<float>& values) {
  Raw(key, 9, GgufArray(6, values));
}
void GgufBuilder::Ints(const std::string& key, const std::vector<int32_t>& values) {
  Raw(key, 9, GgufArray(5, values));
}

void GgufBuilder::Tensor(const std::string& name, uint32_t type, const std::vector<uint64_t>& dims,
                         const std::string& data) {
  tensors_[name] = {type, dims, data};
}

std::string GgufBuilder::Build(size_t* header_bytes) const {
  std::string out = "GGUF" + Number(version) +
                    Number<uint64_t>(tensors_.size() + extra_tensor_count) +
                    Number<uint64_t>(keys_.size() + extra_key_count);
  for (const auto& [key, value] : keys_) out += GgufString(key) + value;
  std::string data;
  for (const auto& [name, info] : tensors_) {
    data.resize((data.size() + alignment - 1) / alignment * alignment);
    out += GgufString(name) + Number(static_cast<uint32_t>(info.dims.size())) + Bytes(info.dims) +
           Number(info.type) + Number<uint64_t>(data.size());
    data += info.data;
  }
  if (header_bytes != nullptr) *header_bytes = out.size();
  out.resize((out.size() + alignment - 1) / alignment * alignment);
  return out + data;
}

absl::StatusOr<std::unique_ptr<Checkpoint>> GgufBuilder::Open(const TempDir& dir) const {
  dir.Write("model.gguf", Build());
  return Checkpoint::Open(dir.path() + "/model.gguf");
}

}  // namespace sluice::checkpoint
