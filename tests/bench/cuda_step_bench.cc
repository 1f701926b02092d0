// The step loop of one GPU by itself: a StageEngine that holds a whole model of real shape with
// random weights, fed with steps as the controller would send them. Prints one line of JSON a case:
// step time, tokens a second, bytes that the step must read and
// their rate.
//
//   cuda_step_bench --model llama-2-7b --format w4 --batch 1,16,64 --context 512 --steps 128

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "kernels/backend.h"
#include "kernels/core/check.h"
#include "worker/engine/stage_engine.h"

namespace sluice::worker {
namespace {

using internal::v1::ModelConfig;
using internal::v1::ShardAssignment;
using internal::v1::StepHeader;

struct ModelShape {
  const char* name;
  bool opt;
  uint32_t layers, hidden, inner, heads, kv_heads, vocab;
};
constexpr ModelShape kModels[] = {
    {"llama-2-7b", false, 32, 4096, 11008, 32, 32, 32000},
    {"llama-3-8b", false, 32, 4096, 14336, 32, 8, 128256},
    {"opt-6.7b", true, 32, 4096, 16384, 32, 32, 50272},
    {"opt-125m", true, 12, 768, 3072, 12, 12, 50272},
    {"smollm2-135m", false, 30, 576, 1536, 9, 3, 49152},
};

struct Options {
  std::string model = "llama-2-7b", format = "w4", dtype = "float16";
  std::string batches = "1", contexts = "512";
  int steps = 64, layers = 0, prefill = 0;
  uint32_t max_batch_tokens = 2048;
};

ModelConfig MakeConfig(const ModelShape& shape, const Options& options) {
  ModelConfig config;
  config.set_architecture(shape.opt ? internal::v1::ARCHITECTURE_OPT
                                    : internal::v1::ARCHITECTURE_LLAMA);
  config.set_num_layers(options.layers > 0 ? options.layers : shape.layers);
  config.set_hidden_size(shape.hidden);
  config.set_intermediate_size(shape.inner);
  config.set_num_heads(shape.heads);
  config.set_num_kv_heads(shape.kv_heads);
  config.set_head_dim(shape.hidden / shape.heads);
  config.set_vocab_size(shape.vocab);
  config.set_max_position_embeddings(4096);
  config.set_norm_eps(1e-5f);
  config.set_activation(shape.opt ? internal::v1::MLP_ACTIVATION_RELU
                                  : internal::v1::MLP_ACTIVATION_SILU);
  config.mutable_rope()->set_theta(10000);
  config.mutable_rope()->set_type("default");
  config.mutable_rope()->set_factor(1);
  config.set_attention_bias(shape.opt);
  config.set_mlp_bias(shape.opt);
  config.set_norm_before(true);
  config.set_has_final_norm(true);
  config.set_norm_affine(true);
  config.set_word_embed_dim(shape.hidden);
  config.set_model_type(shape.opt ? "opt" : "llama");
  return config;
}

// Random codes and scales of about the size that keeps activations in range.
class RandomWeights {
 public:
  explicit RandomWeights(const std::string& format) : format_(format) {}

  QuantizedMatrix Linear(int64_t n, int64_t k) {
    QuantSpec spec;
    spec.n = n;
    spec.k = k;
    spec.format = format_ == "fp16"   ? QuantFormat::kPlain
                  : format_ == "nf4"  ? QuantFormat::kTable4
                  : format_ == "int8" ? QuantFormat::kInt8
                                      : QuantFormat::kInt4Zero;
    spec.group_size = format_ == "fp16" ? 0 : format_ == "nf4" ? 64 : format_ == "int8" ? k : 128;
    return Fill(spec);
  }
  QuantizedMatrix Plain(int64_t n, int64_t k) {
    QuantSpec spec;
    spec.n = n;
    spec.k = k;
    return Fill(spec);
  }

 private:
  QuantizedMatrix Fill(const QuantSpec& spec) {
    QuantizedMatrix matrix(spec);
    const PlaneSizes sizes = SizesOf(spec);
    const float size = 0.5f / std::sqrt(static_cast<float>(spec.k));
    if (spec.format == QuantFormat::kPlain) {
      std::vector<uint16_t> values(4096);
      std::normal_distribution<float> normal(0, size);
      for (uint16_t& value : values) value = FloatToHalf(normal(random_));
      auto* out = reinterpret_cast<uint16_t*>(matrix.codes());
      for (int64_t i = 0; i < spec.n * spec.k; ++i) out[i] = values[Next() % 4096];
      return matrix;
    }
    for (uint64_t i = 0; i + 8 <= sizes.codes; i += 8) {
      const uint64_t bits = Next();
      std::memcpy(matrix.codes() + i, &bits, 8);
    }
    const float unit = spec.format == QuantFormat::kInt8     ? 64
                       : spec.format == QuantFormat::kTable4 ? 1
                                                             : 4;
    auto* scales = reinterpret_cast<uint16_t*>(matrix.scales());
    for (uint64_t i = 0; i < sizes.scales / 2; ++i) scales[i] = FloatToHalf(size / unit);
    for (uint64_t i = 0; i < sizes.zeros; ++i) matrix.zeros()[i] = 7 + Next() % 2;
    for (int i = 0; i < 16 && sizes.table > 0; ++i) matrix.table()[i] = (i - 7.5f) / 7.5f;
    return matrix;
  }
  uint64_t Next() {
    state_ ^= state_ << 13, state_ ^= state_ >> 7, state_ ^= state_ << 17;
    return state_;
  }
  const std::string format_;
  uint64_t state_ = 88172645463325252ull;
  std::mt19937 random_{1};
};

// Names of a layer's linears with their shapes, or of what is outside layers.
using Tensors = std::vector<std::pair<std::string, std::pair<int64_t, int64_t>>>;

Tensors LayerLinears(const ModelShape& s) {
  const int64_t h = s.hidden, kv = h / s.heads * s.kv_heads;
  if (s.opt) {
    return {{"self_attn.q_proj", {h, h}}, {"self_attn.k_proj", {h, h}},
            {"self_attn.v_proj", {h, h}}, {"self_attn.out_proj", {h, h}},
            {"fc1", {s.inner, h}},        {"fc2", {h, s.inner}}};
  }
  return {{"self_attn.q_proj", {h, h}},    {"self_attn.k_proj", {kv, h}},
          {"self_attn.v_proj", {kv, h}},   {"self_attn.o_proj", {h, h}},
          {"mlp.gate_proj", {s.inner, h}}, {"mlp.up_proj", {s.inner, h}},
          {"mlp.down_proj", {h, s.inner}}};
}

void AddOrDie(StageEngine::Loader& loader, const std::string& name, QuantizedMatrix tensor) {
  const absl::Status status = loader.Add(name, std::move(tensor));
  SLUICE_CHECK(status.ok()) << status;
}

void Load(const ModelShape& shape, const Options& options, StageEngine::Loader& loader) {
  RandomWeights random(options.format);
  const uint32_t layers = options.layers > 0 ? options.layers : shape.layers;
  const int64_t h = shape.hidden;
  std::map<std::string, QuantizedMatrix> made;  // The same values in every layer
  for (const auto& [name, size] : LayerLinears(shape)) {
    made[name + ".weight"] = random.Linear(size.first, size.second);
    if (shape.opt) made[name + ".bias"] = random.Plain(1, size.first);
  }
  QuantizedMatrix ones(random.Plain(1, h).spec);
  for (int64_t i = 0; i < h; ++i) reinterpret_cast<uint16_t*>(ones.codes())[i] = 0x3c00;
  const std::vector<std::string> norms =
      shape.opt ? std::vector<std::string>{"self_attn_layer_norm", "final_layer_norm"}
                : std::vector<std::string>{"input_layernorm", "post_attention_layernorm"};
  for (uint32_t layer = 0; layer < layers; ++layer) {
    const std::string prefix = absl::StrCat("layers.", layer, ".");
    for (const auto& [name, matrix] : made) {
      QuantizedMatrix copy(matrix.spec);
      std::memcpy(copy.planes.data(), matrix.planes.data(), matrix.planes.size());
      AddOrDie(loader, prefix + name, std::move(copy));
    }
    for (const std::string& norm : norms) {
      for (const char* part : {".weight", ".bias"}) {
        if (!shape.opt && part[1] == 'b') continue;
        QuantizedMatrix copy(ones.spec);
        std::memcpy(copy.planes.data(), ones.planes.data(), ones.planes.size());
        AddOrDie(loader, prefix + norm + part, std::move(copy));
      }
    }
  }
  AddOrDie(loader, "embed_tokens.weight", random.Plain(shape.vocab, h));
  AddOrDie(loader, "lm_head.weight", random.Plain(shape.vocab, h));
  if (shape.opt) {
    AddOrDie(loader, "embed_positions.weight", random.Plain(4098, h));
    AddOrDie(loader, "final_layer_norm.bias", random.Plain(1, h));
  }
  AddOrDie(loader, shape.opt ? "final_layer_norm.weight" : "norm.weight", std::move(ones));
}

double Seconds(std::chrono::steady_clock::duration time) {
  return std::chrono::duration<double>(time).count();
}

class Driver {
 public:
  Driver(const ModelShape& shape, const Options& options) : shape_(shape), options_(options) {
    auto backend = MakeCudaBackend(0, options.dtype == "bfloat16" ? DType::kBF16 : DType::kF16);
    SLUICE_CHECK(backend.ok()) << backend.status();
    backend_ = *std::move(backend);
  }

  void Start(uint32_t max_batch, uint32_t max_context) {
    ShardAssignment& a = assignment_;
    a.set_model_digest("bench");
    a.set_stages(1);
    *a.mutable_config() = MakeConfig(shape_, options_);
    a.mutable_layers()->set_end(a.config().num_layers());
    a.set_has_embedding(true);
    a.set_has_head(true);
    a.set_block_size(16);
    a.set_max_model_len(max_context + 16);
    a.set_num_blocks(max_batch * ((max_context + 31) / 16));
    a.set_max_batch_tokens(options_.max_batch_tokens);
    a.set_max_batch_size(max_batch);
    const auto begin = std::chrono::steady_clock::now();
    auto loader = StageEngine::NewLoader(a, backend_.get());
    SLUICE_CHECK(loader.ok()) << loader.status();
    Load(shape_, options_, **loader);
    auto engine = (*loader)->Finish();
    SLUICE_CHECK(engine.ok()) << engine.status();
    engine_ = *std::move(engine);
    std::printf("{\"card\": \"%s\", \"load_s\": %.1f, \"weight_GB\": %.3f, \"kv_GB\": %.2f}\n",
                backend_->Name().c_str(), Seconds(std::chrono::steady_clock::now() - begin),
                engine_->memory().weight_bytes / 1e9, engine_->memory().kv_bytes / 1e9);
  }

  // Decode step time, seconds (median), of `batch` sequences at contexts from `context` on.
  void Decode(uint32_t batch, uint32_t context) {
    Release();
    StageEngine::StepOutput output;
    std::vector<uint32_t> last(batch, 1);
    for (uint32_t i = 0; i < batch; ++i) {
      for (uint32_t pos = 0; pos < context; pos += options_.max_batch_tokens) {
        StepHeader header = NewStep();
        const uint32_t count = std::min(options_.max_batch_tokens, context - pos);
        AddSlice(header, i, pos, std::vector<uint32_t>(count, 5 + i), pos + count == context);
        Run(header, output);
      }
      last[i] = output.tokens.tokens(0).token_id();
    }
    std::vector<double> times;
    for (int step = 0; step < options_.steps; ++step) {
      StepHeader header = NewStep();
      for (uint32_t i = 0; i < batch; ++i) AddSlice(header, i, context + step, {last[i]}, true);
      const auto begin = std::chrono::steady_clock::now();
      Run(header, output);
      times.push_back(Seconds(std::chrono::steady_clock::now() - begin));
      for (uint32_t i = 0; i < batch; ++i) last[i] = output.tokens.tokens(i).token_id();
    }
    std::sort(times.begin(), times.end());
    const double median = times[times.size() / 2];
    const ModelConfig& c = assignment_.config();
    const double kv = 4.0 * c.num_kv_heads() * c.head_dim() * c.num_layers() *
                      (context + options_.steps / 2.0) * batch;
    const double embedding = 2.0 * c.vocab_size() * c.hidden_size();
    const double bytes = engine_->memory().weight_bytes - embedding + kv;
    std::printf(
        "{\"model\": \"%s\", \"format\": \"%s\", \"batch\": %u, \"context\": %u, "
        "\"step_ms\": %.3f, \"p90_ms\": %.3f, \"tokens_per_s\": %.1f, \"GB\": %.3f, "
        "\"TB_per_s\": %.3f}\n",
        shape_.name, options_.format.c_str(), batch, context, 1e3 * median,
        1e3 * times[times.size() * 9 / 10], batch / median, bytes / 1e9, bytes / median / 1e12);
    std::fflush(stdout);
  }

  void Prefill(uint32_t length) {
    std::vector<double> times;
    StageEngine::StepOutput output;
    for (int i = 0; i < 7; ++i) {
      Release();
      const auto begin = std::chrono::steady_clock::now();
      for (uint32_t pos = 0; pos < length; pos += options_.max_batch_tokens) {
        StepHeader header = NewStep();
        const uint32_t count = std::min(options_.max_batch_tokens, length - pos);
        AddSlice(header, 0, pos, std::vector<uint32_t>(count, 5), pos + count == length);
        Run(header, output);
      }
      times.push_back(Seconds(std::chrono::steady_clock::now() - begin));
    }
    std::sort(times.begin(), times.end());
    std::printf(
        "{\"model\": \"%s\", \"format\": \"%s\", \"prefill\": %u, \"ms\": %.2f, "
        "\"tokens_per_s\": %.0f}\n",
        shape_.name, options_.format.c_str(), length, 1e3 * times[3], length / times[3]);
    std::fflush(stdout);
  }

 private:
  StepHeader NewStep() {
    StepHeader header;
    header.set_epoch(1);
    header.set_step(++step_);
    for (const uint64_t id : released_) header.add_released_seq_ids(id);
    released_.clear();
    return header;
  }
  void Release() {
    for (uint64_t id = first_id_; id < next_id_; ++id) released_.push_back(id);
    first_id_ = next_id_;
    blocks_ = 0;
  }
  void AddSlice(StepHeader& header, uint32_t index, uint32_t pos, const std::vector<uint32_t>& ids,
                bool sample) {
    auto* slice = header.add_sequences();
    next_id_ = std::max<uint64_t>(next_id_, first_id_ + index + 1);
    slice->set_seq_id(first_id_ + index);
    slice->set_start_pos(pos);
    slice->set_num_tokens(static_cast<uint32_t>(ids.size()));
    for (const uint32_t id : ids) slice->add_token_ids(id);
    slice->set_sample(sample);
    const uint32_t have = (pos + 15) / 16,
                   need = (pos + static_cast<uint32_t>(ids.size()) + 15) / 16;
    for (uint32_t i = have; i < need; ++i) slice->add_new_block_ids(blocks_++);
    if (pos == 0) tokens_[index] = 0;
    if (sample) slice->set_token_index(tokens_[index]++);
    if (pos > 0) return;
    slice->set_prompt_len(prompt_len_);
    auto* sampling = slice->mutable_sampling();
    sampling->set_top_p(1);
    sampling->set_repetition_penalty(1);
    sampling->set_num_logprobs(-1);
    sampling->set_num_prompt_logprobs(-1);
  }
  void Run(StepHeader& header, StageEngine::StepOutput& output) {
    StageEngine::StepInput input;
    input.header = &header;
    const absl::Status status = engine_->Step(input, &output);
    SLUICE_CHECK(status.ok()) << status;
  }

 public:
  uint32_t prompt_len_ = 1;

 private:
  const ModelShape& shape_;
  const Options& options_;
  ShardAssignment assignment_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<StageEngine> engine_;
  uint64_t step_ = 0, first_id_ = 1, next_id_ = 1;
  uint32_t blocks_ = 0;
  std::map<uint32_t, uint32_t> tokens_;  // Sampled so far, by index in the batch
  std::vector<uint64_t> released_;
};

std::vector<uint32_t> Numbers(const std::string& text) {
  std::vector<uint32_t> numbers;
  for (const auto& part : absl::StrSplit(text, ',')) {
    numbers.push_back(static_cast<uint32_t>(std::stoul(std::string(part))));
  }
  return numbers;
}

int Main(int argc, char** argv) {
  CLI::App app("cuda_step_bench: step times of one GPU worker's engine");
  Options options;
  app.add_option("--model", options.model);
  app.add_option("--format", options.format, "w4, nf4, int8 or fp16");
  app.add_option("--dtype", options.dtype);
  app.add_option("--batch", options.batches);
  app.add_option("--context", options.contexts);
  app.add_option("--steps", options.steps);
  app.add_option("--layers", options.layers);
  app.add_option("--prefill", options.prefill, "Length of a prompt whose time is taken; 0: none");
  CLI11_PARSE(app, argc, argv);
  for (const ModelShape& shape : kModels) {
    if (options.model != shape.name) continue;
    const auto batches = Numbers(options.batches), contexts = Numbers(options.contexts);
    Driver driver(shape, options);
    const uint32_t longest = std::max(*std::max_element(contexts.begin(), contexts.end()),
                                      static_cast<uint32_t>(options.prefill));
    driver.Start(*std::max_element(batches.begin(), batches.end()), longest + options.steps);
    for (const uint32_t context : contexts) {
      driver.prompt_len_ = context;
      for (const uint32_t batch : batches) driver.Decode(batch, context);
    }
    if (options.prefill > 0) {
      driver.prompt_len_ = options.prefill;
      driver.Prefill(options.prefill);
    }
    return 0;
  }
  std::fprintf(stderr, "--model %s: not known\n", options.model.c_str());
  return 1;
}

}  // namespace
}  // namespace sluice::worker

int main(int argc, char** argv) { return sluice::worker::Main(argc, argv); }
