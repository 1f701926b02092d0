// A model in a Hugging Face folder: config.json, weights, tokenizer files.
#include <algorithm>
#include <map>
#include <memory>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/core/status_macros.h"
#include "services/checkpoint/hash.h"
#include "services/checkpoint/hf_cache.h"
#include "services/checkpoint/hf_config.h"
#include "services/checkpoint/reader_checkpoint.h"

namespace sluice::checkpoint {
namespace {

constexpr uint64_t kMaxConfigBytes = 4 << 20;
constexpr const char* kSmallFiles[] = {
    "config.json",         "generation_config.json",  "tokenizer.json", "tokenizer_config.json",
    "chat_template.jinja", "chat_template.json",      "vocab.json",     "merges.txt",
    "added_tokens.json",   "special_tokens_map.json", "tokenizer.model"};

// What quantized and saved the model, by its own words in config.json.
std::string WriterOf(const Json& config) {
  std::vector<std::string> writers;
  const Json quantizer =
      config.value(Json::json_pointer("/quantization_config/meta/quantizer"), Json());
  for (const Json& entry : quantizer.is_array() ? quantizer : Json::array({quantizer})) {
    if (entry.is_string()) writers.push_back(entry.get<std::string>().substr(0, 64));
  }
  if (const auto version = config.find("transformers_version");
      version != config.end() && version->is_string()) {
    writers.push_back("transformers " + version->get<std::string>().substr(0, 64));
  }
  return absl::StrJoin(writers, ", ");
}

class HfCheckpoint : public ReaderCheckpoint {
 public:
  static absl::StatusOr<std::unique_ptr<Checkpoint>> Open(ModelDir dir) {
    auto self = std::unique_ptr<HfCheckpoint>(new HfCheckpoint(std::move(dir)));
    SLUICE_RETURN_IF_ERROR(self->Describe());
    return std::unique_ptr<Checkpoint>(std::move(self));
  }

  absl::StatusOr<std::string> ReadFile(const std::string& name) const override {
    const auto it = files_.find(name);
    if (it == files_.end()) {
      return absl::NotFoundError(absl::StrCat("file ", name, " is not part of this model"));
    }
    return it->second->ReadAll(kMaxSmallFileBytes);
  }

 private:
  explicit HfCheckpoint(ModelDir dir) : dir_(std::move(dir)) {}

  absl::Status Describe() {
    SLUICE_RETURN_IF_ERROR(OpenSmallFiles());
    QuantConfigFiles quant_files;
    SLUICE_ASSIGN_OR_RETURN(quant_files.config, ReadJson("config.json"));
    SLUICE_ASSIGN_OR_RETURN(quant_files.quantize_config, ReadJson("quantize_config.json"));
    SLUICE_ASSIGN_OR_RETURN(quant_files.quant_config, ReadJson("quant_config.json"));
    SLUICE_ASSIGN_OR_RETURN(const Json generation, ReadJson("generation_config.json"));
    SLUICE_ASSIGN_OR_RETURN(*description_.mutable_config(),
                            ParseHfConfig(quant_files.config, generation));
    SLUICE_ASSIGN_OR_RETURN(quant_, ParseQuantConfig(quant_files));
    for (const std::string& warning : quant_.warnings) description_.add_warnings(warning);
    SLUICE_ASSIGN_OR_RETURN(set_, TensorSet::Open(dir_));
    SLUICE_RETURN_IF_ERROR(FindPrefix());
    SLUICE_RETURN_IF_ERROR(AddTensors());
    SLUICE_RETURN_IF_ERROR(CheckMethod());
    WarnUnused();
    if (description_.config().dtype().empty()) SetDtypeFromTensors();
    SummarizeQuantization(NameOf(quant_.method), Detail());
    description_.mutable_quant()->set_symmetric(quant_.symmetric);
    description_.set_writer(WriterOf(quant_files.config));
    description_.set_model_digest(HexHash(fingerprint_ + set_.fingerprint()));
    description_.set_model_name(ModelNameOfPath(dir_.path()));
    return absl::OkStatus();
  }

  absl::Status OpenSmallFiles() {
    for (const char* name : kSmallFiles) {
      absl::StatusOr<std::unique_ptr<File>> file = dir_.OpenFile(name);
      if (absl::IsNotFound(file.status())) continue;
      if (!file.ok()) return file.status();
      if ((*file)->size() > kMaxSmallFileBytes) {
        return absl::InvalidArgumentError(absl::StrCat(name, ": ", (*file)->size(),
                                                       " bytes, more than the ", kMaxSmallFileBytes,
                                                       " allowed; download it again"));
      }
      internal::v1::FileInfo* info = description_.add_files();
      info->set_name(name);
      info->set_bytes((*file)->size());
      absl::StrAppend(&fingerprint_, name, "\n", (*file)->size(), "\n");
      files_.emplace(name, *std::move(file));
    }
    return absl::OkStatus();
  }

  // Null JSON when the file is not there. Its content becomes part of the digest.
  absl::StatusOr<Json> ReadJson(const std::string& name) {
    absl::StatusOr<std::unique_ptr<File>> file = dir_.OpenFile(name);
    if (absl::IsNotFound(file.status())) return Json(nullptr);
    if (!file.ok()) return file.status();
    SLUICE_ASSIGN_OR_RETURN(const std::string text, (*file)->ReadAll(kMaxConfigBytes));
    absl::StrAppend(&fingerprint_, name, "\n", HexHash(text), "\n");
    return ParseJsonObject(text, name);
  }

  // Base models and some old files leave out "model.".
  absl::Status FindPrefix() {
    const bool opt = description_.config().architecture() == internal::v1::ARCHITECTURE_OPT;
    const std::vector<std::string> prefixes =
        opt ? std::vector<std::string>{"model.decoder.", "decoder.", ""}
            : std::vector<std::string>{"model.", ""};
    for (const std::string& prefix : prefixes) {
      prefix_ = prefix;
      if (set_.Find(prefix + "embed_tokens.weight") != nullptr) return absl::OkStatus();
    }
    return absl::InvalidArgumentError(absl::StrCat(
        dir_.path(), ": tensor ", prefixes[0],
        "embed_tokens.weight is missing; config.json and weights do not belong together"));
  }

  std::string SourceName(const std::string& canonical) const {
    return canonical.rfind("lm_head.", 0) == 0 ? canonical : prefix_ + canonical;
  }

  absl::Status AddTensors() {
    for (const ExpectedTensor& expected : ExpectedTensors(description_.config())) {
      TensorRequest request;
      request.set = &set_;
      request.expected = expected;
      request.base = SourceName(expected.name);
      SLUICE_ASSIGN_OR_RETURN(auto reader, MakeReader(request));
      AddReader(expected.name, std::move(reader));
    }
    // The parts found above are the model's; in the order of the files.
    for (const StoredTensor& tensor : set_.tensors()) {
      if (!used_.contains(tensor.name)) continue;
      const std::string rest =
          tensor.name.rfind(prefix_, 0) == 0 ? tensor.name.substr(prefix_.size()) : tensor.name;
      AddSource(HfName(description_.config(), rest), tensor.dtype, tensor.shape, tensor.bytes);
    }
    return absl::OkStatus();
  }

  // Picks the format by what lies in the file, and notes the parts as used.
  TensorReaderOr MakeReader(TensorRequest request) {
    if (request.expected.role != TensorRole::kLinear) {
      used_.insert(request.base);
      return MakePlainReader(request);
    }
    const std::string weight = request.base;
    const std::string base = weight.substr(0, weight.size() - 7);  // Without ".weight".
    SLUICE_RETURN_IF_ERROR(CheckSupported(base));
    const bool packed = set_.Find(base + ".qweight") != nullptr;
    const std::string bnb = BnbKind(set_, base);
    if (!packed && bnb.empty()) {
      used_.insert(weight);
      return MakePlainReader(request);
    }
    for (const char* part : {".qweight", ".qzeros", ".scales", ".g_idx"}) used_.insert(base + part);
    for (const char* part : {"", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map",
                             ".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4"}) {
      used_.insert(weight + part);
    }
    request.base = base;
    if (!HasBias(request.expected.name)) {
      request.unused_bias = set_.Find(base + ".bias");
      if (request.unused_bias != nullptr) ignored_.insert(base + ".bias");
    }
    if (!packed) {
      if (bnb_kind_.empty()) bnb_kind_ = bnb;
      return MakeBnbReader(request);
    }
    if (quant_.method == QuantMethod::kGptq) return MakeGptqReader(request, quant_);
    if (quant_.method == QuantMethod::kAwq) return MakeAwqReader(request, quant_);
    return absl::InvalidArgumentError(
        absl::StrCat("tensor ", base,
                     ".qweight is there, but no configuration says gptq or awq; add "
                     "quantization_config to config.json, or quantize_config.json"));
  }

  // A configuration alone does not quantize anything here, and tensors tell more than a
  // configuration.
  absl::Status CheckMethod() {
    const bool found = !bnb_kind_.empty();
    if (quant_.method == QuantMethod::kBitsAndBytes && !found) {
      return absl::UnimplementedError(
          "config.json asks for bitsandbytes, but the weights are not quantized, and quantizing "
          "while loading is not supported; remove quantization_config to serve them as they are, "
          "or save the quantized model");
    }
    if (quant_.method == QuantMethod::kNone && found) {
      quant_.method = QuantMethod::kBitsAndBytes;
      description_.add_warnings(
          "config.json has no quantization_config; the tensors are those of bitsandbytes");
    }
    return absl::OkStatus();
  }

  bool HasBias(const std::string& canonical) const {
    if (canonical.rfind("layers.", 0) != 0) return false;
    const bool attention = absl::StrContains(canonical, ".self_attn.");
    const internal::v1::ModelConfig& config = description_.config();
    return attention ? config.attention_bias() : config.mlp_bias();
  }

  // Formats that are known and not supported, by the names they leave in the file.
  absl::Status CheckSupported(const std::string& base) const {
    static constexpr std::pair<const char*, const char*> kUnsupported[] = {
        {".weight.SCB", "LLM.int8"},
        {".SCB", "LLM.int8"},
        {".weight_packed", "compressed-tensors"},
        {".weight_scale", "compressed-tensors or FP8"},
        {".scaled_zeros", "llm-awq"},
        {".B", "Marlin"},
        {".qweight_type", "GGUF weights inside of safetensors"}};
    for (const auto& [part, format] : kUnsupported) {
      if (set_.Find(base + part) == nullptr) continue;
      return absl::UnimplementedError(
          absl::StrCat("tensor ", base, part, " belongs to format ", format,
                       ", which is not supported; quantize with GPTQ, AWQ (gemm) or bitsandbytes "
                       "4 bit, or use the unquantized model"));
    }
    return absl::OkStatus();
  }

  void WarnUnused() {
    std::vector<std::string> names;
    size_t unused = 0;
    for (const StoredTensor& tensor : set_.tensors()) {
      if (used_.contains(tensor.name) || ignored_.contains(tensor.name)) continue;
      if (absl::EndsWith(tensor.name, ".rotary_emb.inv_freq")) continue;
      const bool tied =
          description_.config().tie_word_embeddings() && tensor.name.rfind("lm_head.", 0) == 0;
      if (tied) continue;
      if (++unused <= 3) names.push_back(tensor.name);
    }
    if (unused > 0) {
      description_.add_warnings(
          absl::StrCat(unused, " tensors of the file are not used: ", absl::StrJoin(names, ", "),
                       unused > 3 ? ", ..." : ""));
    }
    if (!ignored_.empty()) {
      description_.add_warnings(absl::StrCat(
          ignored_.size(), " bias tensors that the architecture has not are ignored if all zeros"));
    }
  }

  void SetDtypeFromTensors() {
    const auto table = static_cast<DType>(description_.tensors(0).plain_dtype());
    description_.mutable_config()->set_dtype(NameOf(table));
  }

  std::string Detail() const {
    switch (quant_.method) {
      case QuantMethod::kGptq:
        return quant_.zero_is_true ? "v2" : "v1";
      case QuantMethod::kAwq:
        return "gemm";
      case QuantMethod::kBitsAndBytes:
        return bnb_kind_;
      case QuantMethod::kNone:
        break;
    }
    return "";
  }

  const ModelDir dir_;
  std::map<std::string, std::unique_ptr<File>> files_;  // Small files that are served.
  TensorSet set_;
  QuantConfig quant_;
  std::string prefix_;  // Of every tensor but lm_head's.
  std::string fingerprint_;
  std::string bnb_kind_;
  absl::flat_hash_set<std::string> used_;     // Source names the model is made of.
  absl::flat_hash_set<std::string> ignored_;  // Extra biases.
};

}  // namespace

absl::StatusOr<std::unique_ptr<Checkpoint>> OpenHfCheckpoint(ModelDir dir) {
  return HfCheckpoint::Open(std::move(dir));
}

}  // namespace sluice::checkpoint
