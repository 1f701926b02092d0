#include "services/convert/bnb.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <utility>

#include "absl/strings/str_format.h"
#include "kernels/core/status_macros.h"
#include "services/checkpoint/bnb_tables.h"

namespace sluice::convert {
namespace {

constexpr int64_t kSlabElements = 1 << 20;
constexpr float kLeastAbsmax = 1e-38F;  // So that a block of zeros is not divided by zero

// checkpoint's table but for its negative zero, which the library's files hold as 0.
constexpr float kFp4[16] = {
    0.0F, 0.005208333333F,  0.6666666667F,  1.0F,  0.3333333333F,  0.5F,  0.1666666667F,  0.25F,
    0.0F, -0.005208333333F, -0.6666666667F, -1.0F, -0.3333333333F, -0.5F, -0.1666666667F, -0.25F};

// Finds the nearest entry of a table; at a midpoint the lower one.
class Nearest {
 public:
  explicit Nearest(const std::vector<float>& table) : order_(table.size()) {
    std::iota(order_.begin(), order_.end(), uint8_t{0});
    std::stable_sort(order_.begin(), order_.end(),
                     [&](uint8_t a, uint8_t b) { return table[a] < table[b]; });
    for (size_t i = 0; i + 1 < order_.size(); ++i) {
      bounds_.push_back((table[order_[i]] + table[order_[i + 1]]) / 2);
    }
  }
  uint8_t CodeOf(float value) const {
    const auto bound = std::lower_bound(bounds_.begin(), bounds_.end(), value);
    return order_[static_cast<size_t>(bound - bounds_.begin())];
  }

 private:
  std::vector<uint8_t> order_;  // Codes by ascending value
  std::vector<float> bounds_;
};

// Takes weights block by block.
class Quantizer {
 public:
  Quantizer(const std::string& type, uint64_t elements)
      : nearest_(std::vector<float>(BnbTable(type), BnbTable(type) + 16)),
        weight_((elements + 1) / 2) {
    absmax_.reserve((elements + kBnbBlock - 1) / kBnbBlock);
  }

  void Add(const float* weights, uint64_t count) {
    float absmax = 0;
    for (uint64_t i = 0; i < count; ++i) absmax = std::max(absmax, std::abs(weights[i]));
    absmax_.push_back(absmax);
    const float inverse = 1.0F / std::max(absmax, kLeastAbsmax);
    for (uint64_t i = 0; i < count; ++i, ++done_) {
      const uint8_t code = nearest_.CodeOf(std::clamp(weights[i] * inverse, -1.0F, 1.0F));
      weight_[done_ / 2] |= static_cast<uint8_t>(done_ % 2 == 0 ? code << 4 : code);
    }
  }

  std::vector<float>& absmax() { return absmax_; }
  Bytes TakeWeight() {
    if (done_ % 2 != 0) weight_.back() |= nearest_.CodeOf(0);  // Filled up with a zero
    return std::move(weight_);
  }

 private:
  const Nearest nearest_;
  Bytes weight_;
  std::vector<float> absmax_;
  uint64_t done_ = 0;
};

Bytes BytesOf(const std::vector<float>& values) {
  Bytes out(values.size() * sizeof(float));
  std::memcpy(out.data(), values.data(), out.size());
  return out;
}

struct Nested {
  Bytes codes;
  std::vector<float> outer;
  float offset = 0;
};

// The mean is taken out, what remains is stored in 8 bits.
Nested Nest(const std::vector<float>& absmax) {
  static const Nearest* const nearest = new Nearest(BnbDynamicMap());
  Nested nested;
  const double sum = std::accumulate(absmax.begin(), absmax.end(), 0.0);
  nested.offset = static_cast<float>(sum / static_cast<double>(absmax.size()));
  for (size_t first = 0; first < absmax.size(); first += kBnbNestedBlock) {
    const size_t last = std::min<size_t>(first + kBnbNestedBlock, absmax.size());
    float outer = 0;
    for (size_t i = first; i < last; ++i) {
      outer = std::max(outer, std::abs(absmax[i] - nested.offset));
    }
    nested.outer.push_back(outer);
    const float inverse = 1.0F / std::max(outer, kLeastAbsmax);
    for (size_t i = first; i < last; ++i) {
      const float value = (absmax[i] - nested.offset) * inverse;
      nested.codes.push_back(nearest->CodeOf(std::clamp(value, -1.0F, 1.0F)));
    }
  }
  return nested;
}

// As torch.linspace(0.1, 1, count) in float32: from both ends to the middle, with one rounding.
std::vector<float> Linspace(int count) {
  const float begin = 0.1F, end = 1.0F;
  const float step = (end - begin) / static_cast<float>(count - 1);
  std::vector<float> out(static_cast<size_t>(count));
  for (int i = 0; i < count; ++i) {
    out[i] = i < count / 2 ? std::fma(step, static_cast<float>(i), begin)
                           : std::fma(-step, static_cast<float>(count - 1 - i), end);
  }
  return out;
}

}  // namespace

const float* BnbTable(const std::string& type) {
  return type == "nf4" ? checkpoint::kNf4Codes : kFp4;
}

const std::vector<float>& BnbDynamicMap() {
  static const std::vector<float>* const map = [] {
    auto* out = new std::vector<float>({0.0F, 1.0F});
    for (int exponent = 0; exponent < 7; ++exponent) {
      const std::vector<float> bounds = Linspace((1 << exponent) + 1);
      const auto power = static_cast<float>(std::pow(10.0, exponent - 6));
      for (size_t i = 0; i + 1 < bounds.size(); ++i) {
        const float middle = power * ((bounds[i] + bounds[i + 1]) / 2);
        out->push_back(middle);
        out->push_back(-middle);
      }
    }
    std::sort(out->begin(), out->end());
    return out;
  }();
  return *map;
}

std::string BnbState(const std::string& type, int64_t n, int64_t k, bool nested, double offset) {
  std::string text = absl::StrFormat(
      R"({"quant_type": "%s", "blocksize": %d, "dtype": "float16", "shape": [%d, %d])", type,
      kBnbBlock, n, k);
  if (nested) {
    absl::StrAppendFormat(
        &text, R"(, "nested_blocksize": %d, "nested_dtype": "float32", "nested_offset": %.16e)",
        kBnbNestedBlock, offset);
  }
  return text + "}";
}

absl::StatusOr<std::vector<Bytes>> QuantizeBnb(const WeightRows& rows, const std::string& type,
                                               bool nested) {
  const int64_t n = rows.n(), k = rows.k();
  Quantizer quantizer(type, static_cast<uint64_t>(n) * static_cast<uint64_t>(k));
  const int64_t slab = std::clamp<int64_t>(kSlabElements / k, 1, n);
  std::vector<float> weights(static_cast<size_t>(slab * k) + kBnbBlock);
  size_t held = 0;  // Of a block that goes on in the next row
  for (int64_t first = 0; first < n; first += slab) {
    const int64_t count = std::min(slab, n - first);
    SLUICE_RETURN_IF_ERROR(rows.Read(first, count, DType::kF16, weights.data() + held));
    held += static_cast<size_t>(count * k);
    size_t taken = 0;
    for (; taken + kBnbBlock <= held; taken += kBnbBlock) {
      quantizer.Add(&weights[taken], kBnbBlock);
    }
    std::copy(weights.begin() + static_cast<ptrdiff_t>(taken),
              weights.begin() + static_cast<ptrdiff_t>(held), weights.begin());
    held -= taken;
  }
  if (held > 0) quantizer.Add(weights.data(), held);
  std::vector<Bytes> parts = {quantizer.TakeWeight()};
  const std::vector<float> table(BnbTable(type), BnbTable(type) + 16);
  float offset = 0;
  Nested inner;
  if (nested) {
    inner = Nest(quantizer.absmax());
    offset = inner.offset;
  }
  const std::string state = BnbState(type, n, k, nested, offset);
  parts.push_back(nested ? std::move(inner.codes) : BytesOf(quantizer.absmax()));
  parts.push_back(BytesOf(table));
  parts.emplace_back(state.begin(), state.end());
  if (nested) {
    parts.push_back(BytesOf(inner.outer));
    parts.push_back(BytesOf(BnbDynamicMap()));
  }
  return parts;
}

}  // namespace sluice::convert
