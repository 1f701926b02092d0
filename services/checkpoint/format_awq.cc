// AWQ linears, GEMM layout (W is [N, K], G = group size):
//
//   qweight  int32 [K, N/8]      word c of a row holds outputs 8c..8c+7
//   qzeros   int32 [K/G, N/8]    the same order; true zeros
//   scales   float [K/G, N]
//
// Nibble i of a word holds output 8c + {0,2,4,6,1,3,5,7}[i], so output 8c + j sits in nibble
// {0,4,1,5,2,6,3,7}[j]. Test vector: outputs 0..7 holding 0..7 are 0x75316420.
#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/core/status_macros.h"
#include "services/checkpoint/format.h"

namespace sluice::checkpoint {
namespace {

constexpr int64_t kPerWord = 8;
constexpr int kNibble[kPerWord] = {0, 4, 1, 5, 2, 6, 3, 7};  // Of output 8c + j.

uint32_t ValueAt(uint32_t word, int64_t j) { return word >> (4 * kNibble[j]) & 15; }

struct AwqParts {
  StoredTensor qweight, qzeros, scales;
  const StoredTensor* unused_bias = nullptr;
};

class AwqReader : public TensorReader {
 public:
  AwqReader(const QuantSpec& spec, AwqParts parts) : TensorReader(spec), parts_(std::move(parts)) {}

  absl::StatusOr<QuantizedMatrix> Read() const override {
    SLUICE_RETURN_IF_ERROR(CheckUnusedBias(parts_.unused_bias));
    QuantizedMatrix matrix(spec());
    SLUICE_RETURN_IF_ERROR(ReadCodes(&matrix));
    SLUICE_RETURN_IF_ERROR(ReadGroups(&matrix));
    SLUICE_RETURN_IF_ERROR(CheckValues(matrix));
    return matrix;
  }

 private:
  absl::Status ReadCodes(QuantizedMatrix* matrix) const {
    const int64_t k = spec().k, words = spec().n / kPerWord;
    const int64_t fit = static_cast<int64_t>(kSlabBytes) / (4 * words) / kPerWord * kPerWord;
    const int64_t slab = std::clamp<int64_t>(fit, kPerWord, k);
    std::vector<uint32_t> source(slab * words);
    for (int64_t first = 0; first < k; first += slab) {
      const int64_t count = std::min(slab, k - first);
      SLUICE_RETURN_IF_ERROR(
          ReadStoredAt(parts_.qweight, 4 * first * words, 4 * count * words, source.data()));
      for (int64_t i = 0; i < count; i += kPerWord) {
        for (int64_t word = 0; word < words; ++word) {
          Transpose(source.data() + i * words + word, first + i, word, matrix);
        }
      }
    }
    return absl::OkStatus();
  }

  // One word (8 outputs) of 8 columns from `column` on: 8 canonical words of 8 neighbours each.
  void Transpose(const uint32_t* source, int64_t column, int64_t word,
                 QuantizedMatrix* matrix) const {
    const int64_t words = spec().n / kPerWord, row_bytes = spec().k / 2;
    uint32_t out[kPerWord] = {};
    for (int64_t i = 0; i < kPerWord; ++i) {
      const uint32_t packed = source[i * words];
      for (int64_t j = 0; j < kPerWord; ++j) out[j] |= ValueAt(packed, j) << (4 * i);
    }
    for (int64_t j = 0; j < kPerWord; ++j) {
      std::memcpy(matrix->codes() + (kPerWord * word + j) * row_bytes + column / 2, &out[j], 4);
    }
  }

  absl::Status ReadGroups(QuantizedMatrix* matrix) const {
    const int64_t n = spec().n, groups = spec().groups(), words = n / kPerWord;
    std::vector<uint16_t> scales(groups * n);
    std::vector<uint32_t> zeros(groups * words);
    SLUICE_RETURN_IF_ERROR(ReadStored(parts_.scales, scales.data()));
    SLUICE_RETURN_IF_ERROR(ReadStored(parts_.qzeros, zeros.data()));
    for (int64_t row = 0; row < n; ++row) {
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t to = row * groups + g;
        std::memcpy(matrix->scales() + 2 * to, &scales[g * n + row], 2);
        const uint32_t word = zeros[g * words + row / kPerWord];
        matrix->zeros()[to] = static_cast<uint8_t>(ValueAt(word, row % kPerWord));
      }
    }
    return absl::OkStatus();
  }

  const AwqParts parts_;
};

}  // namespace

TensorReaderOr MakeAwqReader(const TensorRequest& request, const QuantConfig& config) {
  const int64_t n = request.expected.n, k = request.expected.k;
  const auto un = static_cast<uint64_t>(n), uk = static_cast<uint64_t>(k);
  AwqParts parts;
  SLUICE_ASSIGN_OR_RETURN(parts.qweight, FindPart(request, ".qweight"));
  SLUICE_ASSIGN_OR_RETURN(parts.qzeros, FindPart(request, ".qzeros"));
  SLUICE_ASSIGN_OR_RETURN(parts.scales, FindPart(request, ".scales"));
  parts.unused_bias = request.unused_bias;
  const int64_t group_size = config.group_size == -1 ? k : config.group_size;
  if (n % kPerWord != 0 || k % kPerWord != 0 || k % group_size != 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        "tensor ", request.base, ": [", n, ", ", k,
        "] cannot be AWQ: rows must be a multiple of 8, columns of the group size ", group_size));
  }
  if (parts.qweight.dtype.name == "I16") {
    return absl::UnimplementedError(
        absl::StrCat("tensor ", parts.qweight.name,
                     " is in AWQ layout gemv_fast, which is not supported; use version \"gemm\""));
  }
  const auto groups = static_cast<uint64_t>(k / group_size);
  SLUICE_RETURN_IF_ERROR(CheckStored(parts.qweight, "I32", {uk, un / 8}));
  SLUICE_RETURN_IF_ERROR(CheckStored(parts.qzeros, "I32", {groups, un / 8}));
  const bool bfloat = parts.scales.dtype.name == "BF16";
  SLUICE_RETURN_IF_ERROR(CheckStored(parts.scales, bfloat ? "BF16" : "F16", {groups, un}));
  QuantSpec spec;
  spec.format = QuantFormat::kInt4Zero;
  spec.scale_dtype = bfloat ? DType::kBF16 : DType::kF16;
  spec.n = n;
  spec.k = k;
  spec.group_size = group_size;
  SLUICE_RETURN_IF_ERROR(CheckSpec(spec));
  return std::make_unique<AwqReader>(spec, std::move(parts));
}

}  // namespace sluice::checkpoint
