// The elementwise kernels against references in double: both activation dtypes, shapes with and
// without remainders, aligned and not.
//
// Tolerance: kernels compute in float32 and round once, so an element is off by the rounding of its
// dtype, and by a few float roundings: sums of up to 16384 elements come as trees of depth < 64.
#include "kernels/cuda/elementwise.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <tuple>

#include "kernels/cpu/ops.h"
#include "tests/kernels/cuda/device_test.h"

namespace sluice {
namespace {

constexpr double kFloatError = 64 * 0x1p-24;

void ExpectNear(DType dtype, uint16_t got, double want, double scale, const std::string& where) {
  const double tolerance = RoundingOf(dtype) * std::abs(want) + kFloatError * scale + 0x1p-25;
  ASSERT_NEAR(ToFloat(dtype, got), want, tolerance) << where;
}

std::string At(int64_t row, int64_t column) {
  return "row " + std::to_string(row) + " column " + std::to_string(column);
}

double Activated(Activation act, double x) {
  switch (act) {
    case Activation::kNone:
      return x;
    case Activation::kRelu:
      return std::max(x, 0.0);
    case Activation::kSilu:
      return x / (1.0 + std::exp(-x));
    case Activation::kGelu:
      return 0.5 * x * (1.0 + std::erf(x * std::sqrt(0.5)));
    case Activation::kGeluTanh:
      return 0.5 * x * (1.0 + std::tanh(std::sqrt(2.0 / M_PI) * (x + 0.044715 * x * x * x)));
  }
  return x;
}

constexpr DType kDTypes[] = {DType::kF16, DType::kBF16};
// cols, stride: whole vectors, remainders, one element, more than registers hold.
struct Width {
  int64_t cols, stride;
};
constexpr Width kWidths[] = {{576, 576},     {80, 88},      {1, 1},       {7, 8},
                             {4097, 4097},   {64, 67},      {4096, 4096}, {8200, 8208},
                             {16384, 16384}, {32768, 32768}};
constexpr int64_t kRows = 5;

// --- Norm ------------------------------------------------------------------------------------

struct NormCase {
  NormKind kind;
  bool has_weight, has_bias, has_rows, has_perm;
};
constexpr NormCase kNormCases[] = {
    {NormKind::kRms, true, false, false, false},  {NormKind::kRms, true, false, true, true},
    {NormKind::kLayer, true, true, false, false}, {NormKind::kLayer, false, false, true, false},
    {NormKind::kLayer, true, true, false, true},  {NormKind::kNone, false, false, true, false},
    {NormKind::kNone, false, false, false, true}};

class CudaNormTest : public DeviceTest,
                     public testing::WithParamInterface<std::tuple<DType, Width>> {
 protected:
  void Check(const NormCase& norm);
  static std::vector<double> Reference(const NormCase& norm, const HostRows& x, int64_t row,
                                       const std::vector<float>& weight,
                                       const std::vector<float>& bias);
};

std::vector<double> CudaNormTest::Reference(const NormCase& norm, const HostRows& x, int64_t row,
                                            const std::vector<float>& weight,
                                            const std::vector<float>& bias) {
  const auto cols = static_cast<int64_t>(weight.size());
  std::vector<double> y(cols);
  for (int64_t i = 0; i < cols; ++i) y[i] = x.At(row, i);
  if (norm.kind == NormKind::kNone) return y;
  double mean = 0.0;
  if (norm.kind == NormKind::kLayer) mean = std::accumulate(y.begin(), y.end(), 0.0) / cols;
  double squares = 0.0;
  for (const double value : y) squares += (value - mean) * (value - mean);
  for (int64_t i = 0; i < cols; ++i) {
    y[i] = (y[i] - mean) / std::sqrt(squares / cols + 1e-5);
    if (norm.has_weight) y[i] *= weight[i];
    if (norm.has_bias) y[i] += bias[i];
  }
  return y;
}

void CudaNormTest::Check(const NormCase& norm) {
  const auto [dtype, width] = GetParam();
  std::mt19937 random(static_cast<unsigned>(width.cols));
  std::vector<uint16_t> x = RandomElements(dtype, 8 * width.stride, random);
  for (size_t i = 0; i < x.size(); ++i) x[i] = FromFloat(dtype, ToFloat(dtype, x[i]) + 0.5f);
  const std::vector<float> weight = RandomFloats(width.cols, random);
  const std::vector<float> bias = RandomFloats(width.cols, random);
  const std::vector<int32_t> rows = {7, 0, 3, 3, 5};
  std::vector<int32_t> perm(width.cols);
  std::iota(perm.begin(), perm.end(), 0);
  std::shuffle(perm.begin(), perm.end(), random);
  const DeviceArray<uint16_t> device_x(x);
  const DeviceArray<uint16_t> y(kRows * width.stride);
  const DeviceArray<float> device_weight(weight);
  const DeviceArray<float> device_bias(bias);
  const DeviceArray<int32_t> device_rows(rows);
  const DeviceArray<int32_t> device_perm(perm);

  NormRowsArgs args;
  args.kind = norm.kind;
  args.eps = 1e-5f;
  if (norm.has_weight) args.weight = device_weight.data();
  if (norm.has_bias) args.bias = device_bias.data();
  if (norm.has_rows) args.row_index = device_rows.data();
  if (norm.has_perm) args.perm = device_perm.data();
  args.x = device_x.data();
  args.y = y.data();
  args.x_stride = args.y_stride = width.stride;
  args.rows = kRows;
  args.cols = width.cols;
  args.dtype = dtype;
  NormRows(context_, args);
  Wait();

  const std::vector<uint16_t> got = y.Get();
  const HostRows host{dtype, x, width.stride};
  for (int64_t m = 0; m < kRows; ++m) {
    const std::vector<double> want =
        Reference(norm, host, norm.has_rows ? rows[m] : m, weight, bias);
    for (int64_t i = 0; i < width.cols; ++i) {
      const double scale = 4.0 + std::abs(weight[norm.has_perm ? perm[i] : i]);
      ExpectNear(dtype, got[m * width.stride + i], want[norm.has_perm ? perm[i] : i], scale,
                 At(m, i));
    }
    for (int64_t i = width.cols; i < width.stride; ++i) {
      ASSERT_EQ(got[m * width.stride + i], kPoison) << "written beyond the row: " << At(m, i);
    }
  }
}

TEST_P(CudaNormTest, IsTheReferences) {
  for (const NormCase& norm : kNormCases) {
    SCOPED_TRACE(testing::Message() << "kind " << static_cast<int>(norm.kind) << " rows "
                                    << norm.has_rows << " perm " << norm.has_perm);
    Check(norm);
    if (HasFatalFailure()) return;
  }
}

INSTANTIATE_TEST_SUITE_P(Sweep, CudaNormTest,
                         testing::Combine(testing::ValuesIn(kDTypes), testing::ValuesIn(kWidths)));

// --- Embedding -------------------------------------------------------------------------------

using CudaElementwiseTest = DeviceTest;

std::vector<uint8_t> TableBytes(DType dtype, const std::vector<float>& values) {
  const size_t size = SizeOf(dtype);
  std::vector<uint8_t> bytes(values.size() * size);
  for (size_t i = 0; i < values.size(); ++i) {
    const uint16_t half = dtype == DType::kF32 ? 0 : FromFloat(dtype, values[i]);
    std::memcpy(&bytes[i * size],
                dtype == DType::kF32 ? static_cast<const void*>(&values[i]) : &half, size);
  }
  return bytes;
}

TEST_F(CudaElementwiseTest, EmbedsAndAddsRows) {
  constexpr int64_t kVocab = 11;
  const std::vector<uint32_t> ids = {0, 10, 3, 3, 7};
  const std::vector<uint32_t> added = {9, 2, 2, 0, 1};
  const DeviceArray<uint32_t> device_ids(ids);
  const DeviceArray<uint32_t> device_added(added);
  std::mt19937 random(5);
  for (const DType table_dtype : {DType::kF16, DType::kBF16, DType::kF32}) {
    for (const DType dtype : kDTypes) {
      for (const auto& [cols, stride] : kWidths) {
        SCOPED_TRACE(testing::Message() << NameOf(table_dtype) << " to " << NameOf(dtype) << ", "
                                        << cols << " columns");
        const std::vector<float> values = RandomFloats(kVocab * stride, random);
        const std::vector<uint8_t> bytes = TableBytes(table_dtype, values);
        const auto element = [&, s = stride](uint32_t id, int64_t i) {
          float value;
          sluice::ToFloat(table_dtype, &bytes[(id * s + i) * SizeOf(table_dtype)], 1, &value);
          return value;
        };
        const DeviceArray<uint8_t> table(bytes);
        const DeviceArray<uint16_t> out(kRows * stride);
        DeviceStep step;
        step.rows = kRows;
        step.token_ids = device_ids.data();
        step.table_rows = device_added.data();
        const EmbeddingTable device_table{table.data(), table_dtype, kVocab, cols, stride};
        EmbedRows(context_, step, device_table, {out.data(), stride, dtype});
        Wait();
        std::vector<uint16_t> got = out.Get();
        for (int64_t m = 0; m < kRows; ++m) {
          for (int64_t i = 0; i < cols; ++i) {
            ASSERT_EQ(got[m * stride + i], FromFloat(dtype, element(ids[m], i))) << At(m, i);
          }
          if (stride > cols) {
            ASSERT_EQ(got[m * stride + cols], kPoison);
          }
        }
        const std::vector<uint16_t> before = got;
        AddEmbeddingRows(context_, step, device_table, {out.data(), stride, dtype});
        Wait();
        got = out.Get();
        for (int64_t m = 0; m < kRows; ++m) {
          for (int64_t i = 0; i < cols; ++i) {
            const float sum = ToFloat(dtype, before[m * stride + i]) + element(added[m], i);
            ASSERT_EQ(got[m * stride + i], FromFloat(dtype, sum)) << At(m, i);
          }
        }
      }
    }
  }
}

TEST_F(CudaElementwiseTest, AnIdBeyondTheTableReadsRowZero) {
  const DeviceArray<uint32_t> ids(std::vector<uint32_t>{0xffffffffu});
  const DeviceArray<uint16_t> table(std::vector<uint16_t>{0x3c00, 0x4000});
  const DeviceArray<uint16_t> out(1);
  DeviceStep step;
  step.rows = 1;
  step.token_ids = ids.data();
  EmbedRows(context_, step, {table.data(), DType::kF16, 2, 1, 1}, {out.data(), 1, DType::kF16});
  Wait();
  EXPECT_EQ(out.Get()[0], 0x3c00);
}

// --- Activation ------------------------------------------------------------------------------

constexpr Activation kActivations[] = {Activation::kNone, Activation::kRelu, Activation::kSilu,
                                       Activation::kGelu, Activation::kGeluTanh};

TEST_F(CudaElementwiseTest, GateUpIsActivatedGateTimesUp) {
  std::mt19937 random(6);
  for (const DType dtype : kDTypes) {
    for (const auto& [cols, stride] : kWidths) {
      for (const Activation act : kActivations) {
        const int64_t wide_stride = 2 * stride;
        std::vector<uint16_t> wide = RandomElements(dtype, kRows * wide_stride, random, 3.0f);
        wide[0] = FromFloat(dtype, -300.0f);  // e^300 is beyond float
        const DeviceArray<uint16_t> device_wide(wide);
        const DeviceArray<uint16_t> y(kRows * stride);
        GateUp(context_,
               {device_wide.data(), wide_stride, act, y.data(), stride, kRows, cols, dtype});
        Wait();
        const std::vector<uint16_t> got = y.Get();
        const HostRows host{dtype, wide, wide_stride};
        for (int64_t m = 0; m < kRows; ++m) {
          for (int64_t i = 0; i < cols; ++i) {
            const double gate = host.At(m, i);
            const double up = host.At(m, cols + i);
            ExpectNear(dtype, got[m * stride + i], Activated(act, gate) * up, std::abs(gate * up),
                       At(m, i));
            if (HasFatalFailure()) return;
          }
          if (stride > cols) {
            ASSERT_EQ(got[m * stride + cols], kPoison);
          }
        }
      }
    }
  }
}

struct BiasCase {
  bool float_input, has_bias, accumulate;
};

TEST_F(CudaElementwiseTest, AddsBiasActivationAndResidual) {
  std::mt19937 random(8);
  constexpr BiasCase kCases[] = {
      {false, true, false}, {true, true, true}, {true, false, false}, {false, false, true}};
  for (const DType dtype : kDTypes) {
    for (const auto& [cols, stride] : kWidths) {
      for (const BiasCase& c : kCases) {
        const Activation act = kActivations[(cols + c.accumulate) % 5];
        const std::vector<float> x = RandomFloats(kRows * stride, random);
        std::vector<uint16_t> half(x.size());
        for (size_t i = 0; i < x.size(); ++i) half[i] = FromFloat(dtype, x[i]);
        const std::vector<float> bias = RandomFloats(cols, random);
        const std::vector<uint16_t> before = RandomElements(dtype, kRows * stride, random);
        const DeviceArray<float> float_x(x);
        const DeviceArray<uint16_t> half_x(half);
        const DeviceArray<float> device_bias(bias);
        const DeviceArray<uint16_t> y(kRows * stride);
        if (c.accumulate) y.Put(before);
        BiasActivationArgs args;
        args.x = c.float_input ? static_cast<const void*>(float_x.data()) : half_x.data();
        args.x_dtype = c.float_input ? DType::kF32 : dtype;
        args.bias = c.has_bias ? device_bias.data() : nullptr;
        args.act = act;
        args.accumulate = c.accumulate;
        args.y = y.data();
        args.x_stride = args.y_stride = stride;
        args.rows = kRows;
        args.cols = cols;
        args.dtype = dtype;
        AddBiasActivation(context_, args);
        Wait();
        const std::vector<uint16_t> got = y.Get();
        for (int64_t m = 0; m < kRows; ++m) {
          for (int64_t i = 0; i < cols; ++i) {
            const int64_t at = m * stride + i;
            const double input = c.float_input ? x[at] : ToFloat(dtype, half[at]);
            double want = Activated(act, input + (c.has_bias ? bias[i] : 0.0f));
            if (c.accumulate) want += ToFloat(dtype, before[at]);
            ExpectNear(dtype, got[at], want, 8.0, At(m, i));
            if (HasFatalFailure()) return;
          }
        }
      }
    }
  }
}

// --- Rotary table ----------------------------------------------------------------------------

TEST_F(CudaElementwiseTest, RopeTableIsTheCpus) {
  const std::vector<uint32_t> positions = {0, 1, 511, 4095, 131071};
  std::vector<int32_t> device_positions(positions.begin(), positions.end());
  device_positions.push_back(kPaddingPosition);
  const auto rows = static_cast<int64_t>(device_positions.size());
  for (const int64_t half_dim : {16, 40, 64, 1}) {
    for (const bool per_row : {false, true}) {
      std::vector<float> inv_freq(rows * half_dim);
      for (int64_t m = 0; m < rows; ++m) {
        for (int64_t i = 0; i < half_dim; ++i) {
          const double base = per_row ? 1e4 * (m + 1) : 1e4;
          inv_freq[m * half_dim + i] =
              static_cast<float>(std::pow(base, -static_cast<double>(i) / half_dim));
        }
      }
      std::vector<const float*> pointers;
      for (int64_t m = 0; m < rows; ++m) pointers.push_back(&inv_freq[per_row ? m * half_dim : 0]);
      std::vector<float> cos(rows * half_dim);
      std::vector<float> sin(rows * half_dim);
      FillRopeTable(positions, pointers, 1.25f, cos.data(), sin.data(), half_dim);
      std::fill(cos.end() - half_dim, cos.end(), 1.0f);
      std::fill(sin.end() - half_dim, sin.end(), 0.0f);

      const DeviceArray<int32_t> at(device_positions);
      const DeviceArray<float> frequencies(inv_freq);
      const DeviceArray<float> got_cos(cos.size());
      const DeviceArray<float> got_sin(sin.size());
      RopeTable(context_, {at.data(), frequencies.data(), per_row ? half_dim : 0, half_dim, 1.25f,
                           rows, got_cos.data(), got_sin.data()});
      Wait();
      const std::vector<float> host_cos = got_cos.Get();
      const std::vector<float> host_sin = got_sin.Get();
      for (size_t i = 0; i < cos.size(); ++i) {  // Equal but for the last place
        ASSERT_NEAR(host_cos[i], cos[i], 0x1p-23) << i;
        ASSERT_NEAR(host_sin[i], sin[i], 0x1p-23) << i;
      }
    }
  }
}

}  // namespace
}  // namespace sluice
