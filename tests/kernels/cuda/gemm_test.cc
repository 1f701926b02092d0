// Gemm against products in double: dtypes, epilogues, shapes with remainders, strides; that a row's
// result does not depend on the row count within a bucket, and that a recorded graph gives the same.
#include "kernels/cuda/gemm.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "tests/kernels/cuda/device_test.h"

namespace sluice {
namespace {

constexpr int64_t kWorkspaceBytes = int64_t{32} << 20;

class CudaGemmTest : public DeviceTest {
 protected:
  void SetUp() override {
    DeviceTest::SetUp();
    if (IsSkipped() || HasFatalFailure()) return;
    auto gemm = Gemm::Create(kWorkspaceBytes);
    ASSERT_TRUE(gemm.ok()) << gemm.status().ToString();
    gemm_ = *std::move(gemm);
  }
  void TearDown() override {
    gemm_.reset();
    DeviceTest::TearDown();
  }
  std::unique_ptr<Gemm> gemm_;
};

// One product with random operands and everything that Gemm is told of it.
struct Product {
  GemmArgs args;
  std::vector<uint16_t> x, w, y;
  std::vector<float> bias;
  DeviceArray<uint16_t> device_x, device_w;
  DeviceArray<uint8_t> device_y, device_bias;

  Product(const GemmArgs& shape, bool has_bias, std::mt19937& random)
      : args(shape),
        x(RandomElements(shape.dtype, shape.m * shape.x_stride, random)),
        w(RandomElements(shape.dtype, shape.n * shape.w_stride, random)),
        y(RandomElements(shape.dtype, shape.m * shape.y_stride, random)),
        bias(RandomFloats(shape.n, random)),
        device_x(x),
        device_w(w),
        device_y(shape.m * shape.y_stride * SizeOf(shape.y_dtype)),
        device_bias(shape.n * SizeOf(shape.y_dtype)) {
    args.x = device_x.data();
    args.w = device_w.data();
    args.y = device_y.data();
    if (has_bias) args.bias = device_bias.data();
    std::vector<uint8_t> bytes(shape.n * SizeOf(shape.y_dtype));
    for (int64_t i = 0; i < shape.n; ++i) {
      const uint16_t half = FromFloat(shape.dtype, bias[i]);
      if (shape.y_dtype == DType::kF32) {
        std::memcpy(&bytes[4 * i], &bias[i], 4);
      } else {
        std::memcpy(&bytes[2 * i], &half, 2);
        bias[i] = ToFloat(shape.dtype, half);
      }
    }
    device_bias.Put(bytes);
    ResetOutput();
  }

  void ResetOutput() {
    if (!args.accumulate) return;
    std::vector<uint8_t> bytes(y.size() * SizeOf(args.y_dtype));
    for (size_t i = 0; i < y.size(); ++i) {
      const float value = ToFloat(args.dtype, y[i]);
      if (args.y_dtype == DType::kF32) {
        std::memcpy(&bytes[4 * i], &value, 4);
      } else {
        std::memcpy(&bytes[2 * i], &y[i], 2);
      }
    }
    device_y.Put(bytes);
  }

  std::vector<float> Got() const {
    const std::vector<uint8_t> bytes = device_y.Get();
    std::vector<float> values(args.m * args.y_stride);
    sluice::ToFloat(args.y_dtype, bytes.data(), values.size(), values.data());
    return values;
  }

  // Tolerance: k products summed in float32, in some order: k/2 roundings of 2^-24 of partial sums
  // that are about sqrt(k) large; one rounding to y_dtype.
  void ExpectProduct() const {
    const std::vector<float> got = Got();
    const HostRows rows{args.dtype, x, args.x_stride};
    const HostRows weights{args.dtype, w, args.w_stride};
    const double rounding = args.y_dtype == DType::kF32 ? 0x1p-24 : RoundingOf(args.dtype);
    for (int64_t m = 0; m < args.m; ++m) {
      for (int64_t n = 0; n < args.n; ++n) {
        double want = args.bias != nullptr ? bias[n] : 0.0;
        double size = 1.0;
        for (int64_t k = 0; k < args.k; ++k) {
          want += rows.At(m, k) * weights.At(n, k);
          size += std::abs(rows.At(m, k) * weights.At(n, k));
        }
        if (args.relu) want = std::max(want, 0.0);
        if (args.accumulate) want += ToFloat(args.dtype, y[m * args.y_stride + n]);
        // An epilogue after a split sum may round to y_dtype once more.
        const double tolerance = 2 * rounding * (std::abs(want) + 4.0) + size * 0x1p-20;
        ASSERT_NEAR(got[m * args.y_stride + n], want, tolerance)
            << "row " << m << " column " << n << " of " << args.m << " x " << args.n << " x "
            << args.k << " " << NameOf(args.dtype) << " to " << NameOf(args.y_dtype);
      }
      if (args.y_stride > args.n && !args.accumulate) {
        ASSERT_TRUE(std::isnan(got[m * args.y_stride + args.n])) << "written beyond row " << m;
      }
    }
  }
};

GemmArgs Shape(int64_t m, int64_t n, int64_t k, DType dtype) {
  GemmArgs args;
  args.m = m;
  args.n = n;
  args.k = k;
  args.x_stride = args.w_stride = k;
  args.y_stride = n;
  args.dtype = args.y_dtype = dtype;
  return args;
}

TEST_F(CudaGemmTest, IsTheProduct) {
  std::mt19937 random(1);
  constexpr int64_t kShapes[][3] = {{1, 576, 576}, {3, 80, 96},    {17, 192, 1536},
                                    {64, 1, 64},   {1, 257, 4096}, {5, 129, 577},
                                    {100, 7, 33},  {200, 320, 64}, {2, 33, 1}};
  for (const auto& shape : kShapes) {
    for (const DType dtype : {DType::kF16, DType::kBF16}) {
      for (int variant = 0; variant < 5; ++variant) {
        GemmArgs args = Shape(shape[0], shape[1], shape[2], dtype);
        if (variant % 2 == 1) args.y_dtype = DType::kF32;
        args.accumulate = variant == 2 || variant == 3;
        args.relu = variant == 4;
        Product product(args, /*has_bias=*/variant == 1 || variant == 4, random);
        gemm_->Run(context_, product.args);
        Wait();
        product.ExpectProduct();
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST_F(CudaGemmTest, KeepsToItsRows) {
  std::mt19937 random(2);
  for (const DType dtype : {DType::kF16, DType::kBF16}) {
    GemmArgs args = Shape(9, 72, 128, dtype);
    args.x_stride = 136;
    args.w_stride = 144;
    args.y_stride = 80;
    const Product product(args, /*has_bias=*/false, random);
    gemm_->Run(context_, product.args);
    Wait();
    product.ExpectProduct();
  }
}

TEST_F(CudaGemmTest, ARowDoesNotDependOnTheCountWithinABucket) {
  std::mt19937 random(3);
  for (const int64_t most : {8, 64, 192}) {
    GemmArgs args = Shape(most, 1024, 4096, DType::kF16);
    Product product(args, /*has_bias=*/false, random);
    gemm_->Run(context_, product.args);
    Wait();
    const std::vector<float> all = product.Got();
    for (const int64_t fewer : {most - 1, most - most / 4}) {
      ASSERT_EQ(GemmRowBucket(fewer), most);
      product.args.m = fewer;
      gemm_->Run(context_, product.args);
      Wait();
      const std::vector<float> got = product.Got();
      for (size_t i = 0; i < got.size(); ++i) ASSERT_EQ(got[i], all[i]) << fewer << ": " << i;
    }
  }
}

TEST_F(CudaGemmTest, ARecordedGraphGivesTheSame) {
  std::mt19937 random(4);
  Product product(Shape(33, 512, 512, DType::kBF16), /*has_bias=*/true, random);
  ASSERT_TRUE(gemm_->Prepare(product.args).ok());
  gemm_->Run(context_, product.args);
  Wait();
  const std::vector<float> direct = product.Got();
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  ASSERT_EQ(cudaStreamBeginCapture(context_.stream, cudaStreamCaptureModeThreadLocal), cudaSuccess);
  gemm_->Run(context_, product.args);
  ASSERT_EQ(cudaStreamEndCapture(context_.stream, &graph), cudaSuccess);
  ASSERT_EQ(cudaGraphInstantiate(&exec, graph, 0), cudaSuccess);
  for (int replay = 0; replay < 3; ++replay) {
    ASSERT_EQ(cudaMemset(product.args.y, 0xff, product.y.size() * 2), cudaSuccess);
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    ASSERT_EQ(cudaGraphLaunch(exec, context_.stream), cudaSuccess);
    Wait();
    EXPECT_EQ(product.Got(), direct);
  }
  EXPECT_EQ(cudaGraphExecDestroy(exec), cudaSuccess);
  EXPECT_EQ(cudaGraphDestroy(graph), cudaSuccess);
}

TEST_F(CudaGemmTest, MemorySaysWhatIsNeededAndFree) {
  const auto memory = DeviceMemory::Allocate(int64_t{1} << 50);
  ASSERT_EQ(memory.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_NE(std::string(memory.status().message()).find("1125899906842624 bytes"),
            std::string::npos);
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);  // Not left for the next call to report
  const auto zeroed = DeviceMemory::Allocate(1000);
  ASSERT_TRUE(zeroed.ok());
  std::vector<uint8_t> bytes(1000, 1);
  ASSERT_EQ(cudaMemcpy(bytes.data(), zeroed->data(), 1000, cudaMemcpyDeviceToHost), cudaSuccess);
  EXPECT_EQ(bytes, std::vector<uint8_t>(1000, 0));
  EXPECT_TRUE(PinnedMemory::Allocate(4096).ok());
}

TEST(GemmRowBucket, IsTheNextOfALadder) {
  EXPECT_EQ(GemmRowBucket(1), 1);
  EXPECT_EQ(GemmRowBucket(3), 4);
  EXPECT_EQ(GemmRowBucket(64), 64);
  EXPECT_EQ(GemmRowBucket(65), 96);
  EXPECT_EQ(GemmRowBucket(97), 128);
  EXPECT_EQ(GemmRowBucket(1537), 2048);
}

}  // namespace
}  // namespace sluice
