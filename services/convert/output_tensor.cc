#include "services/convert/output_tensor.h"

#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/strip.h"
#include "kernels/core/check.h"
#include "kernels/core/status_macros.h"
#include "services/checkpoint/layout.h"
#include "services/convert/bnb.h"

namespace sluice::convert {
namespace {

using checkpoint::ExpectedTensor;
using checkpoint::Shape;
using checkpoint::TensorRole;
using Encoding = PlannedTensor::Encoding;

constexpr int64_t kPerWord = 8;  // 4-bit values in 32 bits

OutputTensor Part(std::string name, const char* dtype, Shape shape) {
  const auto type = checkpoint::SafetensorsDType(dtype);
  SLUICE_CHECK(type.ok()) << dtype;
  uint64_t bytes = type->block_bytes;
  for (const uint64_t dim : shape) bytes *= dim;
  return {std::move(name), dtype, std::move(shape), bytes};
}

const char* PlainDType(Format format) {
  return format == Format::kFloat32 ? "F32" : format == Format::kBFloat16 ? "BF16" : "F16";
}

Encoding EncodingOf(const ExpectedTensor& tensor, Format format) {
  if (tensor.role != TensorRole::kLinear) return Encoding::kPlain;
  const bool in_layer = absl::StartsWith(tensor.name, "layers.");
  switch (format) {
    case Format::kGptq:
      return in_layer ? Encoding::kGptq : Encoding::kPlain;
    case Format::kAwq:
      return in_layer ? Encoding::kAwq : Encoding::kPlain;
    case Format::kNf4:
    case Format::kFp4:  // OPT's project_in and project_out too, as transformers does it
      return absl::StartsWith(tensor.name, "lm_head.") ? Encoding::kPlain : Encoding::kBnb;
    default:
      return Encoding::kPlain;
  }
}

// Columns that share a scale, after the check that both sides of the linear allow the format.
absl::StatusOr<int64_t> GroupSize(const std::string& name, const ExpectedTensor& tensor,
                                  const ConvertOptions& options) {
  const std::string what = absl::StrCat("tensor ", name, " [", tensor.n, ", ", tensor.k, "]");
  if (tensor.n % kPerWord != 0 || tensor.k % kPerWord != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(what, ": ", NameOf(options.format),
                     " needs rows and columns in multiples of 8; use --to nf4 or fp4"));
  }
  if (options.group_size == -1) return tensor.k;
  if (options.group_size >= kPerWord && options.group_size % kPerWord == 0 &&
      tensor.k % options.group_size == 0) {
    return options.group_size;
  }
  std::vector<std::string> fit;
  for (const int size : {128, 64, 32}) {
    if (tensor.k % size == 0) fit.push_back(absl::StrCat("--group-size ", size));
  }
  fit.push_back("--group-size -1 (one group a row)");
  return absl::InvalidArgumentError(absl::StrCat(
      what, ": --group-size ", options.group_size, " must be a multiple of 8 that divides its ",
      tensor.k, " columns; use ", absl::StrJoin(fit, " or ")));
}

}  // namespace

std::vector<OutputTensor> GptqParts(const std::string& base, int64_t n, int64_t k,
                                    int64_t group_size) {
  const auto un = static_cast<uint64_t>(n), uk = static_cast<uint64_t>(k);
  const uint64_t groups = uk / static_cast<uint64_t>(group_size);
  return {Part(base + ".qweight", "I32", {uk / kPerWord, un}),
          Part(base + ".scales", "F16", {groups, un}),
          Part(base + ".qzeros", "I32", {groups, un / kPerWord}),
          Part(base + ".g_idx", "I32", {uk})};
}

std::vector<OutputTensor> AwqParts(const std::string& base, int64_t n, int64_t k,
                                   int64_t group_size) {
  const auto un = static_cast<uint64_t>(n), uk = static_cast<uint64_t>(k);
  const uint64_t groups = uk / static_cast<uint64_t>(group_size);
  return {Part(base + ".qweight", "I32", {uk, un / kPerWord}),
          Part(base + ".scales", "F16", {groups, un}),
          Part(base + ".qzeros", "I32", {groups, un / kPerWord})};
}

std::vector<OutputTensor> BnbParts(const std::string& base, int64_t n, int64_t k,
                                   const ConvertOptions& options) {
  const std::string weight = base + ".weight";
  const uint64_t elements = static_cast<uint64_t>(n) * static_cast<uint64_t>(k);
  const uint64_t blocks = (elements + kBnbBlock - 1) / kBnbBlock;
  const bool nested = options.double_quant;
  const char* type = options.format == Format::kNf4 ? "nf4" : "fp4";
  const uint64_t state_bytes = BnbState(type, n, k, nested, 0).size();
  std::vector<OutputTensor> parts = {
      Part(weight, "U8", {(elements + 1) / 2, 1}),
      Part(weight + ".absmax", nested ? "U8" : "F32", {blocks}),
      Part(weight + ".quant_map", "F32", {16}),
      Part(absl::StrCat(weight, ".quant_state.bitsandbytes__", type), "U8", {state_bytes})};
  if (nested) {
    parts.push_back(
        Part(weight + ".nested_absmax", "F32", {(blocks + kBnbNestedBlock - 1) / kBnbNestedBlock}));
    parts.push_back(Part(weight + ".nested_quant_map", "F32", {256}));
  }
  return parts;
}

absl::StatusOr<std::vector<PlannedTensor>> PlanTensors(const checkpoint::Checkpoint& source,
                                                       const ConvertOptions& options) {
  const internal::v1::ModelConfig& config = source.description().config();
  const std::vector<ExpectedTensor> expected = checkpoint::ExpectedTensors(config);
  SLUICE_CHECK(static_cast<int>(expected.size()) == source.description().tensors_size())
      << expected.size();
  std::vector<PlannedTensor> plan;
  for (const ExpectedTensor& tensor : expected) {
    PlannedTensor planned;
    planned.index = static_cast<int>(plan.size());
    planned.encoding = EncodingOf(tensor, options.format);
    planned.n = tensor.n;
    planned.k = tensor.k;
    const std::string name = checkpoint::HfName(config, tensor.name);
    const std::string base(absl::StripSuffix(name, ".weight"));
    const auto un = static_cast<uint64_t>(tensor.n), uk = static_cast<uint64_t>(tensor.k);
    switch (planned.encoding) {
      case Encoding::kPlain:
        planned.parts = {Part(name, PlainDType(options.format),
                              tensor.role == TensorRole::kVector ? Shape{uk} : Shape{un, uk})};
        break;
      case Encoding::kBnb:
        planned.parts = BnbParts(base, tensor.n, tensor.k, options);
        break;
      case Encoding::kGptq:
      case Encoding::kAwq:
        SLUICE_ASSIGN_OR_RETURN(planned.group_size, GroupSize(name, tensor, options));
        planned.parts = planned.encoding == Encoding::kGptq
                            ? GptqParts(base, tensor.n, tensor.k, planned.group_size)
                            : AwqParts(base, tensor.n, tensor.k, planned.group_size);
        break;
    }
    plan.push_back(std::move(planned));
  }
  return plan;
}

}  // namespace sluice::convert
