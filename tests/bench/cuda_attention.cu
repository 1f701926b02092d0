// Times the CUDA attention kernels alone: decode for batches of sequences, prefill of a prompt.
// Each figure is the median over replays of a graph that goes through the KV caches of many layers,
// so that nothing comes out of L2 by repetition (decode turns and writes the new keys); beside it
// the bandwidth of a plain read in the same run. Prints one JSON object a line.
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdio>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "kernels/cuda/attention.h"
#include "kernels/cuda/rope_kv.h"

namespace sluice {
namespace {

constexpr int kBlockSize = 16;
constexpr int kReplays = 15;

__global__ void FillRandom(__half* out, size_t count, uint32_t seed) {
  const size_t step = static_cast<size_t>(gridDim.x) * blockDim.x;
  for (size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += step) {
    uint32_t x = static_cast<uint32_t>(i) * 2654435761u ^ seed;
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    out[i] = __float2half((static_cast<float>(x >> 8) - 8388608.0f) * (1.7f / 8388608.0f));
  }
}

// Reads everything with four 16-byte loads in flight a thread.
__global__ void __launch_bounds__(512) ReadAll(const uint4* from, size_t count, uint32_t* out) {
  uint32_t sum = 0;
  const size_t step = static_cast<size_t>(gridDim.x) * blockDim.x;
  size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; i + 3 * step < count; i += 4 * step) {
    uint4 values[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) values[j] = __ldcs(from + i + j * step);
#pragma unroll
    for (int j = 0; j < 4; ++j) sum ^= values[j].x ^ values[j].y ^ values[j].z ^ values[j].w;
  }
  if (sum == 0x12345678u) *out = sum;
}

class DeviceMemory {
 public:
  explicit DeviceMemory(size_t bytes) {
    SLUICE_CUDA_CHECK(cudaMalloc(&data_, bytes));
    SLUICE_CUDA_CHECK(cudaMemset(data_, 0, bytes));
  }
  template <typename T>
  explicit DeviceMemory(const std::vector<T>& values) : DeviceMemory(values.size() * sizeof(T)) {
    SLUICE_CUDA_CHECK(
        cudaMemcpy(data_, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  ~DeviceMemory() { cudaFree(data_); }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
};

LaunchContext MakeContext(bool dependent_launch) {
  LaunchContext context;
  cudaDeviceProp properties;
  SLUICE_CUDA_CHECK(cudaGetDeviceProperties(&properties, 0));
  context.num_sms = properties.multiProcessorCount;
  context.max_shared_bytes = static_cast<int>(properties.sharedMemPerBlockOptin);
  context.dependent_launch = dependent_launch && properties.major >= 9;
  SLUICE_CUDA_CHECK(cudaStreamCreate(&context.stream));
  return context;
}

// Median seconds of one replay of what `record` launches.
double TimeGraph(const LaunchContext& context, const std::function<void()>& record) {
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  SLUICE_CUDA_CHECK(cudaStreamBeginCapture(context.stream, cudaStreamCaptureModeThreadLocal));
  record();
  SLUICE_CUDA_CHECK(cudaStreamEndCapture(context.stream, &graph));
  SLUICE_CUDA_CHECK(cudaGraphInstantiate(&exec, graph, 0));
  cudaEvent_t begin, end;
  SLUICE_CUDA_CHECK(cudaEventCreate(&begin));
  SLUICE_CUDA_CHECK(cudaEventCreate(&end));
  std::vector<float> times;
  for (int i = 0; i < kReplays + 2; ++i) {
    SLUICE_CUDA_CHECK(cudaEventRecord(begin, context.stream));
    SLUICE_CUDA_CHECK(cudaGraphLaunch(exec, context.stream));
    SLUICE_CUDA_CHECK(cudaEventRecord(end, context.stream));
    SLUICE_CUDA_CHECK(cudaStreamSynchronize(context.stream));
    float ms = 0.0f;
    SLUICE_CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
    if (i >= 2) times.push_back(ms);
  }
  std::nth_element(times.begin(), times.begin() + kReplays / 2, times.end());
  SLUICE_CUDA_CHECK(cudaGraphExecDestroy(exec));
  SLUICE_CUDA_CHECK(cudaGraphDestroy(graph));
  return times[kReplays / 2] * 1e-3;
}

struct Model {
  const char* name;
  int heads, kv_heads, head_dim;
};

class AttentionBench {
 public:
  // `pool` holds random values, `pool_bytes` of them.
  AttentionBench(void* pool, size_t pool_bytes, double read_bandwidth)
      : pool_(static_cast<uint8_t*>(pool)), pool_bytes_(pool_bytes), read_(read_bandwidth) {
    cudaDeviceProp properties;
    SLUICE_CUDA_CHECK(cudaGetDeviceProperties(&properties, 0));
    card_ = properties.name;
  }

  void Decode(const Model& model, int batch, int context_length, bool dependent_launch) {
    Prepare(model, batch, context_length, dependent_launch);
    std::vector<int32_t> rows(batch);
    std::iota(rows.begin(), rows.end(), 0);
    const std::vector<int32_t> positions(batch, context_length - 1);
    const DeviceMemory device_rows(rows), device_positions(positions);
    DeviceStep step = step_;
    step.rows = step.num_decode_rows = batch;
    step.decode_rows = step.sequences = device_rows.as<int32_t>();
    step.positions = device_positions.as<int32_t>();
    const DeviceMemory qkv(static_cast<size_t>(batch) * QkvColumns() * 2);
    FillRandom<<<64, 256>>>(qkv.as<__half>(), batch * QkvColumns(), 7);
    const DeviceMemory out(static_cast<size_t>(batch) * model.heads * model.head_dim * 2);
    const DeviceMemory angles(std::vector<float>(batch * model.head_dim / 2, 0.6f));
    step.cos = step.sin = angles.as<float>();
    step.half_dim = model.head_dim / 2;
    const DeviceMemory scratch(DecodeScratchBytes(shape_, context_.num_sms));
    SLUICE_CUDA_CHECK(cudaDeviceSynchronize());
    const double seconds = TimeLayers([&](const KvLayer& kv) {
      DecodeAttention(context_, step, shape_, qkv.as<void>(), QkvColumns(), kv, out.as<void>(),
                      model.heads * model.head_dim, scratch.as<void>(), NewKeys::kTurnAndWrite);
    });
    const double bytes = 4.0 * batch * context_length * model.kv_heads * model.head_dim;
    std::printf(
        "{\"row\": \"decode_attention\", \"card\": \"%s\", \"model\": \"%s\", \"batch\": %d, "
        "\"context\": %d, \"dependent_launch\": %s, \"layers\": %d, \"us\": %.2f, \"kv_bytes\": "
        "%.0f, \"gb_per_s\": %.0f, \"of_read_bandwidth\": %.3f}\n",
        card_.c_str(), model.name, batch, context_length, dependent_launch ? "true" : "false",
        layers_, seconds * 1e6, bytes, bytes / seconds * 1e-9, bytes / seconds / read_);
  }

  void Prefill(const Model& model, int tokens) {
    Prepare(model, 1, tokens, true);
    std::vector<PrefillTile> tiles;
    for (int i = 0; i < tokens; i += kPrefillTileRows) {
      tiles.push_back({0, i, std::min(kPrefillTileRows, tokens - i), i});
    }
    const DeviceMemory device_tiles(tiles);
    DeviceStep step = step_;
    step.rows = tokens;
    step.num_prefill_tiles = static_cast<int32_t>(tiles.size());
    step.prefill_tiles = device_tiles.as<PrefillTile>();
    const DeviceMemory qkv(static_cast<size_t>(tokens) * QkvColumns() * 2);
    FillRandom<<<256, 256>>>(qkv.as<__half>(), tokens * QkvColumns(), 7);
    const DeviceMemory out(static_cast<size_t>(tokens) * model.heads * model.head_dim * 2);
    SLUICE_CUDA_CHECK(cudaDeviceSynchronize());
    const double seconds = TimeLayers([&](const KvLayer& kv) {
      PrefillAttention(context_, step, shape_, qkv.as<void>(), QkvColumns(), kv, out.as<void>(),
                       model.heads * model.head_dim);
    });
    const double flops = 4.0 * model.heads * model.head_dim * (0.5 * tokens * (tokens + 1.0));
    std::printf(
        "{\"row\": \"prefill_attention\", \"card\": \"%s\", \"model\": \"%s\", \"tokens\": %d, "
        "\"us\": %.1f, \"tflop_per_s\": %.1f}\n",
        card_.c_str(), model.name, tokens, seconds * 1e6, flops / seconds * 1e-12);
  }

 private:
  int64_t QkvColumns() const {
    return static_cast<int64_t>(shape_.num_heads + 2 * shape_.num_kv_heads) * shape_.head_dim;
  }

  // As many layers as the pool has room for, at most 32; block tables in random order.
  void Prepare(const Model& model, int batch, int length, bool dependent_launch) {
    shape_ = {model.heads, model.kv_heads, model.head_dim, kBlockSize, 0.088f, DType::kF16};
    context_ = MakeContext(dependent_launch);
    const int blocks_each = (length + kBlockSize - 1) / kBlockSize;
    blocks_ = batch * blocks_each;
    layer_bytes_ = static_cast<size_t>(blocks_) * kBlockSize * model.kv_heads * model.head_dim * 4;
    layers_ = static_cast<int>(std::clamp<size_t>(pool_bytes_ / layer_bytes_, 1, 32));
    std::vector<int32_t> table(blocks_);
    std::iota(table.begin(), table.end(), 0);
    std::shuffle(table.begin(), table.end(), std::mt19937(1));
    tables_ = std::make_unique<DeviceMemory>(table);
    step_ = {};
    step_.block_tables = tables_->as<int32_t>();
    step_.block_table_stride = blocks_each;
  }

  double TimeLayers(const std::function<void(const KvLayer&)>& launch) {
    return TimeGraph(context_,
                     [&] {
                       for (int layer = 0; layer < layers_; ++layer) {
                         uint8_t* k = pool_ + layer * layer_bytes_;
                         launch({k, k + layer_bytes_ / 2, blocks_, kBlockSize, shape_.num_kv_heads,
                                 shape_.head_dim});
                       }
                     }) /
           layers_;
  }

  uint8_t* pool_;
  size_t pool_bytes_;
  double read_;
  std::string card_;
  AttentionShape shape_;
  LaunchContext context_;
  DeviceStep step_;
  std::unique_ptr<DeviceMemory> tables_;
  int64_t blocks_ = 0;
  size_t layer_bytes_ = 0;
  int layers_ = 0;
};

double ReadBandwidth(const DeviceMemory& pool, size_t bytes) {
  const LaunchContext context = MakeContext(false);
  const DeviceMemory sink(16);
  double best = 0.0;
  for (const int blocks_per_sm : {2, 4, 16}) {
    const double seconds = TimeGraph(context, [&] {
      ReadAll<<<context.num_sms * blocks_per_sm, 512, 0, context.stream>>>(
          pool.as<uint4>(), bytes / 16, sink.as<uint32_t>());
    });
    best = std::max(best, bytes / seconds);
  }
  std::printf("{\"row\": \"read\", \"bytes\": %zu, \"gb_per_s\": %.0f}\n", bytes, best * 1e-9);
  return best;
}

void Run() {
  constexpr size_t kPoolBytes = size_t{9} << 29;  // 4.5 GiB
  const DeviceMemory pool(kPoolBytes);
  FillRandom<<<1024, 256>>>(pool.as<__half>(), kPoolBytes / 2, 3);
  SLUICE_CUDA_CHECK(cudaDeviceSynchronize());
  AttentionBench bench(pool.as<void>(), kPoolBytes, ReadBandwidth(pool, kPoolBytes));
  const Model models[] = {{"MHA 32 x 128", 32, 32, 128}, {"GQA 32/8 x 128", 32, 8, 128}};
  for (const Model& model : models) {
    for (const bool dependent : {true, false}) {
      bench.Decode(model, 64, 512, dependent);
      bench.Decode(model, 64, 2048, dependent);
      bench.Decode(model, 16, 512, dependent);
      bench.Decode(model, 1, 512, dependent);
      bench.Decode(model, 1, 4096, dependent);
    }
    bench.Prefill(model, 2000);
    bench.Prefill(model, 512);
  }
}

}  // namespace
}  // namespace sluice

int main() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::fprintf(stderr, "no GPU\n");
    return 1;
  }
  sluice::Run();
  return 0;
}
