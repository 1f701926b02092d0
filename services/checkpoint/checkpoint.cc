#include "services/checkpoint/checkpoint.h"

#include <filesystem>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "kernels/core/check.h"
#include "kernels/core/status_macros.h"
#include "services/checkpoint/hf_cache.h"
#include "services/checkpoint/reader_checkpoint.h"

namespace sluice::checkpoint {
namespace {

absl::Status WithTensor(const absl::Status& status, const std::string& name) {
  if (status.ok()) return status;
  const std::string rule(status.message());
  // Rules of values come from kernels/quant, which knows no files.
  const char* const way_out =
      absl::StrContains(rule, "; ") ? "" : "; the weights are damaged, download them again";
  return absl::Status(status.code(), absl::StrCat("tensor ", name, ": ", rule, way_out));
}

// A folder without config.json that holds exactly one .gguf file stands for that file.
absl::StatusOr<std::unique_ptr<Checkpoint>> OpenFolder(const std::string& path) {
  SLUICE_ASSIGN_OR_RETURN(ModelDir dir, ModelDir::Open(path));
  SLUICE_ASSIGN_OR_RETURN(const std::vector<std::string> names, dir.List());
  std::vector<std::string> ggufs;
  for (const std::string& name : names) {
    if (name == "config.json") return OpenHfCheckpoint(std::move(dir));
    if (absl::EndsWith(name, ".gguf")) ggufs.push_back(name);
  }
  if (ggufs.size() == 1) return OpenGgufCheckpoint(dir, ggufs[0]);
  return absl::NotFoundError(absl::StrCat(
      path, ": no model here; looked for config.json and for one .gguf file, found ", ggufs.size(),
      " .gguf files", ggufs.empty() ? "" : " (name the file instead of the folder)",
      "; the folder holds ", ListText(names)));
}

}  // namespace

absl::StatusOr<std::unique_ptr<Checkpoint>> Checkpoint::Open(const std::string& model,
                                                             const std::string& revision) {
  SLUICE_ASSIGN_OR_RETURN(const std::string path, ResolveModel(model, revision));
  std::error_code error;
  const std::filesystem::path real = std::filesystem::canonical(path, error);
  if (error) return absl::NotFoundError(absl::StrCat(path, ": ", error.message()));
  if (std::filesystem::is_directory(real, error)) return OpenFolder(real.string());
  if (!absl::EndsWith(path, ".gguf") && !absl::EndsWith(real.string(), ".gguf")) {
    return absl::InvalidArgumentError(
        absl::StrCat(path,
                     ": neither a folder nor a .gguf file; give the model's folder (with "
                     "config.json and weights) or a .gguf file"));
  }
  SLUICE_ASSIGN_OR_RETURN(const ModelDir dir, ModelDir::Open(real.parent_path().string()));
  return OpenGgufCheckpoint(dir, real.filename().string());
}

absl::StatusOr<QuantizedMatrix> ReaderCheckpoint::Read(int index) const {
  SLUICE_CHECK(index >= 0 && index < static_cast<int>(readers_.size())) << index;
  absl::StatusOr<QuantizedMatrix> matrix = readers_[index]->Read();
  if (matrix.ok()) return matrix;
  return WithTensor(matrix.status(), description_.tensors(index).name());
}

absl::Status ReaderCheckpoint::ReadPlain(int index, uint64_t offset, uint64_t size,
                                         uint8_t* out) const {
  SLUICE_CHECK(index >= 0 && index < static_cast<int>(readers_.size())) << index;
  return WithTensor(readers_[index]->ReadPlain(offset, size, out),
                    description_.tensors(index).name());
}

void ReaderCheckpoint::AddReader(const std::string& name, std::unique_ptr<TensorReader> reader) {
  *description_.add_tensors() = ToProto(name, reader->spec());
  readers_.push_back(std::move(reader));
}

void ReaderCheckpoint::AddSource(const std::string& name, const SourceDType& dtype,
                                 const Shape& shape, uint64_t bytes) {
  internal::v1::SourceTensor* source = description_.add_source_tensors();
  source->set_name(name);
  source->set_dtype(dtype.name);
  for (const uint64_t dim : shape) source->add_shape(dim);
  source->set_bytes(bytes);
}

void ReaderCheckpoint::SummarizeQuantization(const std::string& method, const std::string& detail) {
  internal::v1::QuantSummary* quant = description_.mutable_quant();
  quant->set_method(method);
  quant->set_detail(detail);
  uint32_t bits = 0;
  uint64_t group = 0;
  bool one_group = true;
  for (const auto& reader : readers_) {
    const QuantSpec& spec = reader->spec();
    if (spec.format == QuantFormat::kPlain) continue;
    // Most tensors are 4 bit when any is; 8 bit ones beside them (embeddings of GGUF files) do not
    // count.
    const uint32_t this_bits = spec.format == QuantFormat::kInt8 ? 8 : 4;
    bits = bits == 0 ? this_bits : std::min(bits, this_bits);
    const auto this_group = static_cast<uint64_t>(spec.group_size);
    one_group &= group == 0 || group == this_group;
    group = this_group;
    quant->set_act_order(quant->act_order() || spec.has_perm);
  }
  if (bits == 0) bits = description_.config().dtype() == "float32" ? 32 : 16;
  quant->set_bits(bits);
  quant->set_group_size(one_group ? group : 0);
}

}  // namespace sluice::checkpoint
