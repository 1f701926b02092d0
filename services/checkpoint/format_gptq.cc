// GPTQ linears, 4 bit (W is [N, K], G = group size):
//
//   qweight  int32 [K/8, N]        along K: nibble i of a word is row 8r + i, low bits first
//   qzeros   int32 [groups, N/8]   along N, low bits first; v2 holds the zero, v1 the zero - 1
//   scales   float [groups, N]     may be negative
//   g_idx    int32 [K]             group of each column; absent: column / G
//
// w[n, k] = scales[g_idx[k], n] * (q[k, n] - zero[g_idx[k], n]). When g_idx is not column / G
// (act-order), columns are sorted by group, stably, and the order is kept as the matrix's
// permutation. Test vector: rows 0..7 holding 0..7 are 0x76543210.
#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/core/status_macros.h"
#include "services/checkpoint/format.h"

namespace sluice::checkpoint {
namespace {

constexpr int64_t kPerWord = 8;     // 4-bit values in 32 bits.
constexpr int64_t kTileWords = 16;  // One cache line of source words.

struct GptqParts {
  StoredTensor qweight, qzeros, scales;
  const StoredTensor* g_idx = nullptr;
  const StoredTensor* unused_bias = nullptr;
};

// Column order that makes groups contiguous; empty when it is the natural one.
absl::StatusOr<std::vector<int32_t>> ReadOrder(const StoredTensor* g_idx, int64_t k,
                                               int64_t group_size) {
  std::vector<int32_t> order;
  if (g_idx == nullptr) return order;
  std::vector<int32_t> groups(k);
  SLUICE_RETURN_IF_ERROR(ReadStored(*g_idx, groups.data()));
  const int64_t count = (k + group_size - 1) / group_size;
  bool natural = true;
  for (int64_t i = 0; i < k; ++i) {
    if (groups[i] < 0 || groups[i] >= count) {
      return absl::InvalidArgumentError(
          absl::StrCat(g_idx->file->name(), ": tensor ", g_idx->name, "[", i, "] = ", groups[i],
                       " is outside the groups 0..", count - 1, "; quantize the model again"));
    }
    natural &= groups[i] == i / group_size;
  }
  if (natural) return order;
  order.resize(k);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&groups](int32_t a, int32_t b) { return groups[a] < groups[b]; });
  for (int64_t i = 0; i < k; ++i) {
    if (groups[order[i]] == i / group_size) continue;
    return absl::InvalidArgumentError(
        absl::StrCat(g_idx->file->name(), ": tensor ", g_idx->name, ": group ", i / group_size,
                     " has not ", group_size, " columns; quantize the model again"));
  }
  return order;
}

class GptqReader : public TensorReader {
 public:
  GptqReader(const QuantSpec& spec, GptqParts parts, bool zero_is_true, bool packed_zeros)
      : TensorReader(spec),
        parts_(std::move(parts)),
        zero_is_true_(zero_is_true),
        packed_zeros_(packed_zeros) {}

  absl::StatusOr<QuantizedMatrix> Read() const override {
    SLUICE_RETURN_IF_ERROR(CheckUnusedBias(parts_.unused_bias));
    SLUICE_ASSIGN_OR_RETURN(const std::vector<int32_t> order,
                            ReadOrder(parts_.g_idx, spec().k, spec().group_size));
    if (order.empty() == spec().has_perm) return absl::DataLossError("g_idx has changed");
    QuantizedMatrix matrix(spec());
    if (spec().has_perm) std::memcpy(matrix.perm(), order.data(), order.size() * sizeof(int32_t));
    SLUICE_RETURN_IF_ERROR(ReadCodes(order, &matrix));
    SLUICE_RETURN_IF_ERROR(ReadScales(&matrix));
    SLUICE_RETURN_IF_ERROR(ReadZeros(&matrix));
    SLUICE_RETURN_IF_ERROR(CheckValues(matrix));
    return matrix;
  }

 private:
  absl::Status ReadCodes(const std::vector<int32_t>& order, QuantizedMatrix* matrix) const {
    const int64_t n = spec().n, words = spec().k / kPerWord;
    std::vector<int32_t> position(order.size());  // Where a column of the file goes.
    for (size_t i = 0; i < order.size(); ++i) position[order[i]] = static_cast<int32_t>(i);
    const int64_t slab = std::clamp<int64_t>(static_cast<int64_t>(kSlabBytes) / (4 * n), 1, words);
    std::vector<uint32_t> source(slab * n);
    for (int64_t first = 0; first < words; first += slab) {
      const int64_t count = std::min(slab, words - first);
      SLUICE_RETURN_IF_ERROR(
          ReadStoredAt(parts_.qweight, 4 * first * n, 4 * count * n, source.data()));
      for (int64_t column = 0; column < n; column += kTileWords) {
        Scatter(source.data(), {first, count, column}, position, matrix);
      }
    }
    return absl::OkStatus();
  }

  struct Tile {
    int64_t first_word, words, column;
  };

  // Words of up to 16 output rows. A word holds 8 neighbours of one row, as the canonical codes do:
  // without act-order it is copied as it is.
  void Scatter(const uint32_t* source, const Tile& tile, const std::vector<int32_t>& position,
               QuantizedMatrix* matrix) const {
    const int64_t n = spec().n, row_bytes = spec().k / 2;
    const int64_t rows = std::min(kTileWords, n - tile.column);
    for (int64_t w = 0; w < tile.words; ++w) {
      const uint32_t* from = source + w * n + tile.column;
      const int64_t word = tile.first_word + w;
      for (int64_t r = 0; r < rows; ++r) {
        uint8_t* row = matrix->codes() + (tile.column + r) * row_bytes;
        if (position.empty()) {
          std::memcpy(row + 4 * word, &from[r], 4);
          continue;
        }
        for (int64_t i = 0; i < kPerWord; ++i) {
          const int32_t to = position[kPerWord * word + i];
          row[to / 2] |= static_cast<uint8_t>((from[r] >> (4 * i) & 15) << (4 * (to % 2)));
        }
      }
    }
  }

  absl::Status ReadScales(QuantizedMatrix* matrix) const {
    std::vector<uint8_t> source(parts_.scales.bytes);
    SLUICE_RETURN_IF_ERROR(ReadStored(parts_.scales, source.data()));
    const size_t width = SizeOf(spec().scale_dtype);
    const int64_t n = spec().n, groups = spec().groups();
    for (int64_t row = 0; row < n; ++row) {
      for (int64_t g = 0; g < groups; ++g) {
        std::memcpy(matrix->scales() + (row * groups + g) * width,
                    source.data() + (g * n + row) * width, width);
      }
    }
    return absl::OkStatus();
  }

  absl::Status ReadZeros(QuantizedMatrix* matrix) const {
    std::vector<uint32_t> source(parts_.qzeros.bytes / 4);
    SLUICE_RETURN_IF_ERROR(ReadStored(parts_.qzeros, source.data()));
    const int64_t groups = spec().groups(), words = spec().n / kPerWord;
    // v1: the writer either took 1 from each value or, newer, 0x11111111 from the word, with
    // borrow.
    const uint32_t add_word = packed_zeros_ ? 0x11111111U : 0;
    const uint32_t add_value = zero_is_true_ || packed_zeros_ ? 0 : 1;
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t w = 0; w < words; ++w) {
        const uint32_t word = source[g * words + w] + add_word;
        for (int64_t i = 0; i < kPerWord; ++i) {
          matrix->zeros()[(kPerWord * w + i) * groups + g] =
              static_cast<uint8_t>((word >> (4 * i) & 15) + add_value);
        }
      }
    }
    return absl::OkStatus();
  }

  const GptqParts parts_;
  const bool zero_is_true_;
  const bool packed_zeros_;
};

// The group size that the number of groups in the file stands for; the configuration's unless it
// may differ by module.
absl::StatusOr<int64_t> GroupSize(const QuantConfig& config, const StoredTensor& scales,
                                  int64_t k) {
  const int64_t stated = config.group_size == -1 ? k : std::min(config.group_size, k);
  const auto rows = static_cast<int64_t>(
      std::min<uint64_t>(scales.shape.empty() ? 0 : scales.shape[0], INT32_MAX));
  if (!config.mixed || rows < 1 || (k + stated - 1) / stated == rows) return stated;
  if (k % rows == 0) return k / rows;
  return absl::InvalidArgumentError(absl::StrCat(scales.file->name(), ": tensor ", scales.name,
                                                 " has ", rows, " groups for ", k, " columns"));
}

}  // namespace

TensorReaderOr MakeGptqReader(const TensorRequest& request, const QuantConfig& config) {
  const int64_t n = request.expected.n, k = request.expected.k;
  const auto un = static_cast<uint64_t>(n), uk = static_cast<uint64_t>(k);
  GptqParts parts;
  SLUICE_ASSIGN_OR_RETURN(parts.qweight, FindPart(request, ".qweight"));
  SLUICE_ASSIGN_OR_RETURN(parts.qzeros, FindPart(request, ".qzeros"));
  SLUICE_ASSIGN_OR_RETURN(parts.scales, FindPart(request, ".scales"));
  parts.g_idx = request.set->Find(request.base + ".g_idx");
  parts.unused_bias = request.unused_bias;
  if (n % kPerWord != 0 || k % kPerWord != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("tensor ", request.base, ": [", n, ", ", k,
                     "] cannot be GPTQ: both must be multiples of 8"));
  }
  const Shape& shape = parts.qweight.shape;
  const bool other_bits = shape.size() == 2 && shape[1] == un && shape[0] != uk / 8 &&
                          shape[0] * 32 % uk == 0 && shape[0] * 32 / uk <= 8;
  if (other_bits) {
    return absl::UnimplementedError(absl::StrCat("tensor ", parts.qweight.name, " holds ",
                                                 shape[0] * 32 / uk,
                                                 "-bit GPTQ, which is not supported; use a 4-bit "
                                                 "version of the model"));
  }
  SLUICE_RETURN_IF_ERROR(CheckStored(parts.qweight, "I32", {uk / 8, un}));
  QuantSpec spec;
  spec.format = QuantFormat::kInt4Zero;
  spec.n = n;
  spec.k = k;
  SLUICE_ASSIGN_OR_RETURN(spec.group_size, GroupSize(config, parts.scales, k));
  const auto groups = static_cast<uint64_t>(spec.groups());
  SLUICE_RETURN_IF_ERROR(CheckStored(parts.qzeros, "I32", {groups, un / 8}));
  const std::optional<DType> scale_dtype = FloatDType(parts.scales.dtype);
  SLUICE_RETURN_IF_ERROR(CheckStored(
      parts.scales, scale_dtype.has_value() ? parts.scales.dtype.name : "F16", {groups, un}));
  spec.scale_dtype = *scale_dtype;
  if (parts.g_idx != nullptr) SLUICE_RETURN_IF_ERROR(CheckStored(*parts.g_idx, "I32", {uk}));
  SLUICE_ASSIGN_OR_RETURN(const std::vector<int32_t> order,
                          ReadOrder(parts.g_idx, k, spec.group_size));
  spec.has_perm = !order.empty();
  SLUICE_RETURN_IF_ERROR(CheckSpec(spec));
  return std::make_unique<GptqReader>(spec, std::move(parts), config.zero_is_true,
                                      config.packed_zeros);
}

}  // namespace sluice::checkpoint
