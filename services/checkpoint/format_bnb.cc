// bitsandbytes 4-bit linears (W is [N, K], flattened by row):
//
//   weight                    any dtype, ceil(N*K/2) bytes: byte j has element 2j in its HIGH nibble
//   weight.absmax             float32 [blocks], or uint8 [blocks] when nested;
//                             blocks = ceil(N*K / blocksize)
//   weight.quant_map          float32 [16], the code table
//   weight.nested_absmax      float32 [ceil(blocks / nested_blocksize)]
//   weight.nested_quant_map   float32 [256]
//   weight.quant_state.bitsandbytes__nf4 (or fp4)   JSON: quant_type, blocksize, shape, dtype,
//                             nested_blocksize, nested_offset
//
// Nested: absmax[i] = nested_quant_map[u8[i]] * nested_absmax[i / nested_blocksize] + nested_offset.
// w = quant_map[code] * absmax[element / blocksize]. Blocks run over the flattened weight; where K
// is no multiple of the block size the canonical group is their greatest common divisor, with scales
// repeated, so that no group crosses a row.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/core/status_macros.h"
#include "services/checkpoint/bnb_tables.h"
#include "services/checkpoint/format.h"
#include "services/checkpoint/json.h"

namespace sluice::checkpoint {
namespace {

// Bit 3 is the sign; the magnitudes are not monotonic.
constexpr float kFp4[16] = {
    0.0F,  0.005208333333F,  0.6666666667F,  1.0F,  0.3333333333F,  0.5F,  0.1666666667F,  0.25F,
    -0.0F, -0.005208333333F, -0.6666666667F, -1.0F, -0.3333333333F, -0.5F, -0.1666666667F, -0.25F};

struct BnbParts {
  StoredTensor weight, absmax;
  const StoredTensor* quant_map = nullptr;
  const StoredTensor* nested_absmax = nullptr;
  const StoredTensor* nested_quant_map = nullptr;
  const StoredTensor* unused_bias = nullptr;
  std::string type;  // "nf4" or "fp4"
  uint64_t block_size = 64;
  uint64_t nested_block_size = 256;
  double nested_offset = 0;
};

const StoredTensor* FindState(const TensorSet& set, const std::string& base, std::string* type) {
  for (const char* kind : {"nf4", "fp4"}) {
    const StoredTensor* state =
        set.Find(absl::StrCat(base, ".weight.quant_state.bitsandbytes__", kind));
    if (state == nullptr) continue;
    *type = kind;
    return state;
  }
  return nullptr;
}

class BnbReader : public TensorReader {
 public:
  BnbReader(const QuantSpec& spec, BnbParts parts) : TensorReader(spec), parts_(std::move(parts)) {}

  absl::StatusOr<QuantizedMatrix> Read() const override {
    SLUICE_RETURN_IF_ERROR(CheckUnusedBias(parts_.unused_bias));
    QuantizedMatrix matrix(spec());
    SLUICE_RETURN_IF_ERROR(ReadCodes(&matrix));
    SLUICE_RETURN_IF_ERROR(ReadScales(&matrix));
    const float* table = parts_.type == "nf4" ? kNf4Codes : kFp4;
    std::memcpy(matrix.table(), table, sizeof(kNf4Codes));
    if (parts_.quant_map != nullptr) {
      SLUICE_RETURN_IF_ERROR(ReadStored(*parts_.quant_map, matrix.table()));
    }
    SLUICE_RETURN_IF_ERROR(CheckValues(matrix));
    return matrix;
  }

 private:
  // Swaps nibbles; with an odd K every second row starts in the middle of a byte.
  absl::Status ReadCodes(QuantizedMatrix* matrix) const {
    const auto n = static_cast<uint64_t>(spec().n), k = static_cast<uint64_t>(spec().k);
    std::vector<uint8_t> source(std::min(parts_.weight.bytes, kSlabBytes));
    uint8_t* codes = matrix->codes();
    for (uint64_t first = 0; first < parts_.weight.bytes; first += source.size()) {
      const uint64_t count = std::min<uint64_t>(source.size(), parts_.weight.bytes - first);
      SLUICE_RETURN_IF_ERROR(ReadStoredAt(parts_.weight, first, count, source.data()));
      if (k % 2 == 0) {
        for (uint64_t i = 0; i < count; ++i) {
          codes[first + i] = static_cast<uint8_t>(source[i] << 4 | source[i] >> 4);
        }
        continue;
      }
      for (uint64_t element = 2 * first; element < std::min(2 * (first + count), n * k);
           ++element) {
        const uint8_t byte = source[element / 2 - first];
        const auto code = static_cast<uint8_t>(element % 2 == 0 ? byte >> 4 : byte & 15);
        const uint64_t row = element / k, column = element % k;
        codes[row * ((k + 1) / 2) + column / 2] |= static_cast<uint8_t>(code << (4 * (column % 2)));
      }
    }
    return absl::OkStatus();
  }

  absl::Status ReadScales(QuantizedMatrix* matrix) const {
    std::vector<float> absmax(parts_.absmax.shape[0]);
    if (parts_.nested_absmax == nullptr) {
      SLUICE_RETURN_IF_ERROR(ReadStored(parts_.absmax, absmax.data()));
      SLUICE_RETURN_IF_ERROR(CheckAbsmax(absmax, /*slack=*/{}));
    } else {
      SLUICE_RETURN_IF_ERROR(ReadNested(&absmax));
    }
    const auto groups = static_cast<uint64_t>(spec().groups());
    const auto group_size = static_cast<uint64_t>(spec().group_size);
    const auto n = static_cast<uint64_t>(spec().n), k = static_cast<uint64_t>(spec().k);
    for (uint64_t row = 0; row < n; ++row) {
      for (uint64_t g = 0; g < groups; ++g) {
        const float scale = absmax[(row * k + g * group_size) / parts_.block_size];
        std::memcpy(matrix->scales() + 4 * (row * groups + g), &scale, 4);
      }
    }
    return absl::OkStatus();
  }

  absl::Status ReadNested(std::vector<float>* absmax) const {
    std::vector<uint8_t> codes(absmax->size());
    std::vector<float> outer(parts_.nested_absmax->shape[0]), map(256);
    SLUICE_RETURN_IF_ERROR(ReadStored(parts_.absmax, codes.data()));
    SLUICE_RETURN_IF_ERROR(ReadStored(*parts_.nested_absmax, outer.data()));
    SLUICE_RETURN_IF_ERROR(ReadStored(*parts_.nested_quant_map, map.data()));
    const auto offset = static_cast<float>(parts_.nested_offset);
    for (size_t i = 0; i < codes.size(); ++i) {
      // Two roundings, as bitsandbytes does it: first the product, then the sum.
      const float product = map[codes[i]] * outer[i / parts_.nested_block_size];
      (*absmax)[i] = product + offset;
    }
    return CheckAbsmax(*absmax, outer);
  }

  // Finite, and not negative beyond what rounding of a nested value explains: 2 % of its block's
  // own scale.
  absl::Status CheckAbsmax(const std::vector<float>& absmax,
                           const std::vector<float>& slack) const {
    for (size_t i = 0; i < absmax.size(); ++i) {
      const float least =
          slack.empty() ? 0.0F : -0.02F * std::abs(slack[i / parts_.nested_block_size]);
      if (std::isfinite(absmax[i]) && absmax[i] >= least) continue;
      return absl::InvalidArgumentError(
          absl::StrCat(parts_.absmax.file->name(), ": tensor ", parts_.absmax.name, "[", i, "] is ",
                       absmax[i], "; it must be finite and not negative: the weights are damaged"));
    }
    return absl::OkStatus();
  }

  const BnbParts parts_;
};

// Reads the JSON text beside the weight into `parts`.
absl::Status ReadState(const StoredTensor& state, const ExpectedTensor& expected, BnbParts* parts) {
  constexpr uint64_t kMaxStateBytes = 65'536;
  const std::string what = absl::StrCat(state.file->name(), ": tensor ", state.name);
  if (state.dtype.name != "U8" || state.bytes > kMaxStateBytes) {
    return absl::InvalidArgumentError(absl::StrCat(what, " must be U8 of at most ", kMaxStateBytes,
                                                   " bytes; save the model again"));
  }
  std::string text(state.bytes, '\0');
  SLUICE_RETURN_IF_ERROR(ReadStored(state, text.data()));
  SLUICE_ASSIGN_OR_RETURN(const Json json, ParseJsonObject(text, what));
  JsonFields fields(json, what);
  const std::string type = fields.TextOr("quant_type", parts->type);
  if (type != parts->type) fields.Fail("quant_type", "disagrees with the tensor's name");
  parts->block_size = fields.Uint("blocksize", 1, 1 << 20);
  parts->nested_block_size = fields.UintOr("nested_blocksize", 1, 1 << 20, 256);
  parts->nested_offset = fields.DoubleOr("nested_offset", -1e30, 1e30, 0);
  if (fields.Has("nested_dtype") && fields.TextOr("nested_dtype", "") != "float32") {
    fields.Fail("nested_dtype", "must be float32");
  }
  if ((parts->block_size & (parts->block_size - 1)) != 0) {
    fields.Fail("blocksize", "must be a power of two");
  }
  const Json wanted = Json::array({expected.n, expected.k});
  if (!json.contains("shape") || json["shape"] != wanted) {
    fields.Fail("shape", absl::StrCat("must be [", expected.n, ", ", expected.k,
                                      "], as config.json asks for"));
  }
  return fields.status();
}

absl::Status CheckShapes(const BnbParts& parts, const ExpectedTensor& expected) {
  const uint64_t elements = static_cast<uint64_t>(expected.n) * static_cast<uint64_t>(expected.k);
  if (parts.weight.bytes != (elements + 1) / 2) {
    return absl::InvalidArgumentError(absl::StrCat(
        parts.weight.file->name(), ": tensor ", parts.weight.name, " has ", parts.weight.bytes,
        " bytes; [", expected.n, ", ", expected.k, "] in 4 bits needs ", (elements + 1) / 2));
  }
  const uint64_t blocks = (elements + parts.block_size - 1) / parts.block_size;
  const bool nested = parts.nested_absmax != nullptr;
  SLUICE_RETURN_IF_ERROR(CheckStored(parts.absmax, nested ? "U8" : "F32", {blocks}));
  if (parts.quant_map != nullptr)
    SLUICE_RETURN_IF_ERROR(CheckStored(*parts.quant_map, "F32", {16}));
  if (!nested) return absl::OkStatus();
  const uint64_t outer = (blocks + parts.nested_block_size - 1) / parts.nested_block_size;
  SLUICE_RETURN_IF_ERROR(CheckStored(*parts.nested_absmax, "F32", {outer}));
  if (parts.nested_quant_map == nullptr) {
    return absl::InvalidArgumentError(absl::StrCat(
        "tensor ", parts.weight.name, ".nested_quant_map is missing; save the model again"));
  }
  return CheckStored(*parts.nested_quant_map, "F32", {256});
}

}  // namespace

std::string BnbKind(const TensorSet& set, const std::string& base) {
  std::string type;
  if (FindState(set, base, &type) == nullptr) return "";
  return set.Find(base + ".weight.nested_absmax") == nullptr ? type : type + "+nested";
}

TensorReaderOr MakeBnbReader(const TensorRequest& request) {
  BnbParts parts;
  const std::string weight = request.base + ".weight";
  const StoredTensor* state = FindState(*request.set, request.base, &parts.type);
  const StoredTensor* codes = request.set->Find(weight);
  const StoredTensor* absmax = request.set->Find(weight + ".absmax");
  if (state == nullptr || codes == nullptr || absmax == nullptr) {
    return absl::InvalidArgumentError(absl::StrCat(
        "tensor ", weight, " needs .absmax and .quant_state beside it; save the model again"));
  }
  parts.weight = *codes;
  parts.absmax = *absmax;
  parts.quant_map = request.set->Find(weight + ".quant_map");
  parts.nested_absmax = request.set->Find(weight + ".nested_absmax");
  parts.nested_quant_map = request.set->Find(weight + ".nested_quant_map");
  parts.unused_bias = request.unused_bias;
  SLUICE_RETURN_IF_ERROR(ReadState(*state, request.expected, &parts));
  SLUICE_RETURN_IF_ERROR(CheckShapes(parts, request.expected));
  QuantSpec spec;
  spec.format = QuantFormat::kTable4;
  spec.scale_dtype = DType::kF32;
  spec.n = request.expected.n;
  spec.k = request.expected.k;
  spec.group_size = std::gcd(spec.k, static_cast<int64_t>(parts.block_size));
  SLUICE_RETURN_IF_ERROR(CheckSpec(spec));
  return std::make_unique<BnbReader>(spec, std::move(parts));
}

}  // namespace sluice::checkpoint
