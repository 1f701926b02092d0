// Speed of the CPU kernels beside the machine's own limits, measured by the same program.
//   kernel_bench --benchmark_filter='read|fma|m:1/'
// Arguments: m = rows, threads. GB/s counts the packed weights (or the KV cache) once; GFLOP/s
// counts 2 per multiply-add of the product, not the conversion of codes.
#include <memory>
#include <string>
#include <vector>

#include "benchmark/benchmark.h"
#include "kernels/backend.h"
#include "kernels/core/buffer.h"
#include "kernels/core/check.h"
#include "tests/bench/machine_limits.h"
#include "tests/support/random_tensor.h"

namespace sluice {
namespace {

using benchmark::Counter;

struct Shape {
  const char* name;
  int64_t n, k;
};
struct Format {
  const char* name;
  QuantFormat format;
  DType dtype;
  int64_t group_size;
};

constexpr Shape kSmolShapes[] = {{"smol_qkv", 960, 576},
                                 {"smol_o", 576, 576},
                                 {"smol_gate_up", 3072, 576},
                                 {"smol_down", 576, 1536}};
constexpr Shape kHead = {"smol_head", 49152, 576};
constexpr Shape kOpt = {"opt_6.7b", 4096, 4096};
constexpr Format kQ41 = {"q4_1", QuantFormat::kInt4Offset, DType::kF16, 32};
constexpr Format kQ80 = {"q8_0", QuantFormat::kInt8, DType::kF16, 32};
constexpr Format kFormats[] = {{"gptq_g128", QuantFormat::kInt4Zero, DType::kF16, 128},
                               kQ41,
                               {"nf4_g64", QuantFormat::kTable4, DType::kF32, 64},
                               kQ80,
                               {"f16", QuantFormat::kPlain, DType::kF16, 0},
                               {"bf16", QuantFormat::kPlain, DType::kBF16, 0}};

TensorView NewTensor(Backend& backend, int64_t rows, int64_t cols,
                     std::vector<std::unique_ptr<DeviceBuffer>>& owner) {
  owner.push_back(*backend.Allocate(rows * cols * 4));
  const TensorView view = {owner.back()->data(), DType::kF32, rows, cols, cols};
  backend.CopyFromHost(RandomTensors(1).Normals(rows * cols).data(), view);
  return view;
}

// As many copies of the weight as exceed the last-level cache take turns, as the layers of a model
// do.
void MatMulBench(benchmark::State& state, Shape shape, Format format) {
  const int64_t m = state.range(0);
  const auto backend = *MakeCpuBackend(static_cast<int>(state.range(1)));
  SLUICE_CHECK(backend->Reserve({m, shape.n, shape.k, 1, 1}).ok());
  QuantSpec spec;
  spec.format = format.format;
  spec.plain_dtype = spec.scale_dtype = format.dtype;
  spec.n = shape.n;
  spec.k = shape.k;
  spec.group_size = format.group_size;
  const QuantizedMatrix source = RandomTensors(1).Matrix(spec);
  std::vector<std::unique_ptr<PackedMatrix>> weights;
  constexpr int64_t kMoreThanCache = int64_t{128} << 20;
  int64_t bytes = 0;
  do {
    weights.push_back(*backend->Upload({&source}));
    bytes += weights.back()->bytes();
  } while (bytes < kMoreThanCache);
  std::vector<std::unique_ptr<DeviceBuffer>> owner;
  const TensorView x = NewTensor(*backend, m, shape.k, owner),
                   y = NewTensor(*backend, m, shape.n, owner);
  size_t next = 0;
  for (auto _ : state) {
    backend->NormMatMul({}, x, {weights[next++ % weights.size()].get(), nullptr}, Activation::kNone,
                        y);
  }
  const double seconds_bytes = static_cast<double>(weights[0]->bytes()) / 1e9;
  state.counters["GB/s"] = Counter(seconds_bytes, Counter::kIsIterationInvariantRate);
  state.counters["GFLOP/s"] = Counter(2e-9 * static_cast<double>(m * shape.n * shape.k),
                                      Counter::kIsIterationInvariantRate);
}

// Rows start_pos .. start_pos + m of one sequence of SmolLM2's heads.
void AttentionBench(benchmark::State& state) {
  const int64_t m = state.range(0), context = state.range(2);
  const int64_t heads = 9, kv_heads = 3, head_dim = 64, block_size = 16;
  const auto backend = *MakeCpuBackend(static_cast<int>(state.range(1)));
  SLUICE_CHECK(backend->Reserve({m, 1, 1, heads, context}).ok());
  std::vector<std::unique_ptr<DeviceBuffer>> owner;
  const int64_t blocks = (context + block_size - 1) / block_size;
  const TensorView k = NewTensor(*backend, blocks, kv_heads * block_size * head_dim, owner);
  const TensorView v = NewTensor(*backend, blocks, kv_heads * block_size * head_dim, owner);
  const TensorView qkv = NewTensor(*backend, m, (heads + 2 * kv_heads) * head_dim, owner);
  const TensorView out = NewTensor(*backend, m, heads * head_dim, owner);
  std::vector<uint32_t> table(blocks);
  for (int64_t i = 0; i < blocks; ++i) table[i] = static_cast<uint32_t>(i);
  const KvLayer kv = {k.data, v.data, blocks, block_size, kv_heads, head_dim};
  const SequenceRows rows = {0, m, context - m, table.data()};
  for (auto _ : state) backend->PagedAttention(qkv, {&rows, 1}, kv, 0.125f, out);
  const double keys =
      static_cast<double>(m) * (static_cast<double>(context - m) + static_cast<double>(m + 1) / 2);
  state.counters["GB/s"] = Counter(8e-9 * static_cast<double>(context * kv_heads * head_dim),
                                   Counter::kIsIterationInvariantRate);
  state.counters["GFLOP/s"] = Counter(4e-9 * keys * static_cast<double>(heads * head_dim),
                                      Counter::kIsIterationInvariantRate);
}

void ReadLimit(benchmark::State& state) {
  ThreadPool pool(static_cast<int>(state.range(0)));
  const Buffer buffer(size_t{256} << 20);
  for (auto _ : state)
    benchmark::DoNotOptimize(ReadAll(buffer.as<float>(), buffer.size() / 4, pool));
  state.counters["GB/s"] =
      Counter(static_cast<double>(buffer.size()) / 1e9, Counter::kIsIterationInvariantRate);
}

void MultiplyAddLimit(benchmark::State& state) {
  ThreadPool pool(static_cast<int>(state.range(0)));
  float sink = 0;
  int64_t operations = 0;
  for (auto _ : state) operations += MultiplyAddAll(int64_t{1} << 20, pool, &sink);
  benchmark::DoNotOptimize(sink);
  state.counters["GFLOP/s"] = Counter(static_cast<double>(operations) / 1e9, Counter::kIsRate);
}

void Register() {
  const std::vector<int64_t> rows = {1, 2, 4, 8, 32, 512}, threads = {1, 2};
  const auto add = [&](Shape shape, Format format) {
    benchmark::RegisterBenchmark(
        (std::string(shape.name) + "/" + format.name).c_str(),
        [shape, format](benchmark::State& state) { MatMulBench(state, shape, format); })
        ->ArgsProduct({rows, threads})
        ->ArgNames({"m", "threads"})
        ->UseRealTime()
        ->Unit(benchmark::kMicrosecond);
  };
  benchmark::RegisterBenchmark("read", ReadLimit)
      ->Arg(1)
      ->Arg(2)
      ->ArgName("threads")
      ->UseRealTime();
  benchmark::RegisterBenchmark("fma", MultiplyAddLimit)
      ->Arg(1)
      ->Arg(2)
      ->ArgName("threads")
      ->UseRealTime();
  for (const Shape& shape : kSmolShapes) add(shape, kQ41);
  add(kHead, kQ80);
  for (const Format& format : kFormats) add(kOpt, format);
  benchmark::RegisterBenchmark("smol_attention", AttentionBench)
      ->ArgsProduct({{1}, threads, {128, 512, 2048}})
      ->ArgsProduct({{512}, threads, {512, 2048}})
      ->ArgNames({"m", "threads", "context"})
      ->UseRealTime()
      ->Unit(benchmark::kMicrosecond);
}

}  // namespace
}  // namespace sluice

int main(int argc, char** argv) {
  sluice::Register();
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}
