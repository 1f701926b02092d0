// The weight formats that kernel tests sweep: every format, dtype of scales, group size and
// act-order.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "kernels/quant.h"

namespace sluice {

struct WeightFormat {
  QuantFormat format = QuantFormat::kPlain;
  DType dtype = DType::kF16;  // Of the elements (plain) or the scales
  int64_t group_size = 0;     // 0: the whole row
  bool has_perm = false;

  QuantSpec Spec(int64_t n, int64_t k) const {
    QuantSpec spec;
    spec.format = format;
    spec.n = n;
    spec.k = k;
    if (format == QuantFormat::kPlain) {
      spec.plain_dtype = dtype;
    } else {
      spec.scale_dtype = dtype;
      spec.group_size = group_size == 0 ? k : std::min(group_size, k);
      spec.has_perm = has_perm;
    }
    return spec;
  }
};

inline std::vector<WeightFormat> AllWeightFormats() {
  std::vector<WeightFormat> formats;
  const DType dtypes[] = {DType::kF16, DType::kBF16, DType::kF32};
  for (const DType dtype : dtypes) formats.push_back({QuantFormat::kPlain, dtype});
  for (const QuantFormat format : {QuantFormat::kInt4Zero, QuantFormat::kInt4Offset,
                                   QuantFormat::kTable4, QuantFormat::kInt8}) {
    for (const DType dtype : dtypes) {
      for (const int64_t group_size : {0, 3, 20, 32, 64, 128}) {
        formats.push_back({format, dtype, group_size, /*has_perm=*/false});
      }
      formats.push_back({format, dtype, 32, /*has_perm=*/true});
    }
  }
  return formats;
}

inline std::string WeightFormatLabel(const testing::TestParamInfo<WeightFormat>& info) {
  const WeightFormat& format = info.param;
  return absl::StrCat(NameOf(format.format), "_", NameOf(format.dtype), "_g", format.group_size,
                      format.has_perm ? "_perm" : "");
}

}  // namespace sluice
