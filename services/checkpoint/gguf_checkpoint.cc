// A model in one GGUF file.
#include <map>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "kernels/core/status_macros.h"
#include "services/checkpoint/gguf_config.h"
#include "services/checkpoint/hash.h"
#include "services/checkpoint/reader_checkpoint.h"

namespace sluice::checkpoint {
namespace {

constexpr char kVocabularyName[] = "gguf_vocab.json";

class GgufCheckpoint : public ReaderCheckpoint {
 public:
  static absl::StatusOr<std::unique_ptr<Checkpoint>> Open(GgufFile gguf) {
    auto self = std::unique_ptr<GgufCheckpoint>(new GgufCheckpoint(std::move(gguf)));
    SLUICE_RETURN_IF_ERROR(self->Describe());
    return std::unique_ptr<Checkpoint>(std::move(self));
  }

  absl::StatusOr<std::string> ReadFile(const std::string& name) const override {
    if (name == kVocabularyName) return vocabulary_;
    return absl::NotFoundError(absl::StrCat("file ", name, " is not part of this model; it has ",
                                            kVocabularyName, " only"));
  }

 private:
  explicit GgufCheckpoint(GgufFile gguf) : gguf_(std::move(gguf)) {}

  absl::Status Describe() {
    SLUICE_ASSIGN_OR_RETURN(*description_.mutable_config(), ParseGgufConfig(gguf_));
    SLUICE_RETURN_IF_ERROR(AddTensors());
    SLUICE_ASSIGN_OR_RETURN(vocabulary_,
                            GgufVocabularyJson(gguf_, description_.config().vocab_size()));
    internal::v1::FileInfo* info = description_.add_files();
    info->set_name(kVocabularyName);
    info->set_bytes(vocabulary_.size());
    gguf_.Drop("tokenizer.");  // Some megabytes, all of it in vocabulary_ now.
    const File& file = gguf_.file();
    description_.set_model_digest(
        HexHash(absl::StrCat(file.name(), "\n", file.size(), "\n", gguf_.header_hash())));
    description_.set_model_name(std::string(absl::StripSuffix(file.name(), ".gguf")));
    return absl::OkStatus();
  }

  absl::Status AddTensors() {
    const internal::v1::ModelConfig& config = description_.config();
    std::map<std::string, uint64_t> bytes_by_dtype;
    size_t used = gguf_.Find("rope_freqs.weight") == nullptr ? 0 : 1;
    for (const ExpectedTensor& expected : ExpectedTensors(config)) {
      const std::string name = GgufName(expected.name);
      const GgufTensor* tensor = gguf_.Find(name);
      if (tensor == nullptr) {
        return absl::InvalidArgumentError(absl::StrCat(gguf_.file().name(), ": tensor ", name,
                                                       " is missing; convert the model again"));
      }
      const bool query = expected.name.find(".q_proj.") != std::string::npos;
      const bool key = expected.name.find(".k_proj.") != std::string::npos;
      const uint32_t heads = query ? config.num_heads() : key ? config.num_kv_heads() : 0;
      SLUICE_ASSIGN_OR_RETURN(auto reader, MakeGgufReader(gguf_, *tensor, expected, heads));
      AddReader(expected.name, std::move(reader));
      AddSource(HfName(config, expected.name), tensor->dtype, tensor->shape, tensor->bytes);
      bytes_by_dtype[tensor->dtype.name] += tensor->bytes;
      ++used;
    }
    if (used < gguf_.tensors().size()) {
      description_.add_warnings(absl::StrCat(gguf_.tensors().size() - used, " tensors of ",
                                             gguf_.file().name(), " are not used"));
    }
    std::string main_dtype;
    for (const auto& [dtype, bytes] : bytes_by_dtype) {
      if (main_dtype.empty() || bytes > bytes_by_dtype[main_dtype]) main_dtype = dtype;
    }
    SummarizeQuantization("gguf", main_dtype);
    return absl::OkStatus();
  }

  GgufFile gguf_;
  std::string vocabulary_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Checkpoint>> OpenGgufCheckpoint(const ModelDir& dir,
                                                               const std::string& name) {
  SLUICE_ASSIGN_OR_RETURN(std::unique_ptr<File> file, dir.OpenFile(name));
  SLUICE_ASSIGN_OR_RETURN(GgufFile gguf, GgufFile::Open(std::move(file)));
  return GgufCheckpoint::Open(std::move(gguf));
}

}  // namespace sluice::checkpoint
