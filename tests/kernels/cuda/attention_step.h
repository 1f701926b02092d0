// Random steps for the tests of the attention kernels: sequences, block tables, queries and a KV
// cache, on the host and on the device.
#pragma once

#include <cuda_runtime_api.h>
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <tuple>
#include <vector>
#include "gtest/gtest.h"
#include "kernels/core/dtype.h"
#include "kernels/cuda/attention.h"
#include "kernels/cuda/rope_kv.h"

namespace sluice {

inline constexpr uint16_t kPoison = 0x7fff;  // NaN in both dtypes

// Device memory for the length of a test.
class DeviceMemory {
 public:
  explicit DeviceMemory(size_t bytes) : bytes_(std::max<size_t>(bytes, 16)) {
    EXPECT_EQ(cudaMalloc(&data_, bytes_), cudaSuccess);
    EXPECT_EQ(cudaMemset(data_, 0, bytes_), cudaSuccess);
  }
  template <typename T>
  explicit DeviceMemory(const std::vector<T>& values) : DeviceMemory(values.size() * sizeof(T)) {
    Set(values);
  }
  ~DeviceMemory() { cudaFree(data_); }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  template <typename T>
  void Set(const std::vector<T>& values) {
    const size_t bytes = values.size() * sizeof(T);
    EXPECT_EQ(cudaMemcpy(data_, values.data(), bytes, cudaMemcpyHostToDevice), cudaSuccess);
  }
  template <typename T>
  std::vector<T> Get(size_t count) const {
    std::vector<T> values(count);
    EXPECT_EQ(cudaMemcpy(values.data(), data_, count * sizeof(T), cudaMemcpyDeviceToHost),
              cudaSuccess);
    return values;
  }
  void* data() const { return data_; }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  size_t bytes_;
  void* data_ = nullptr;
};

inline float Decode(DType dtype, uint16_t bits) {
  return dtype == DType::kF16 ? HalfToFloat(bits) : BFloat16ToFloat(bits);
}
inline uint16_t Encode(DType dtype, float value) {
  return dtype == DType::kF16 ? FloatToHalf(value) : FloatToBFloat16(value);
}
inline double UnitRoundoff(DType dtype) { return dtype == DType::kF16 ? 0x1p-11 : 0x1p-8; }

// Rows of one sequence in the step: positions [start, start + rows). A start of -1 is padding.
struct Rows {
  int start = 0;
  int count = 1;
};

// A step with everything the kernels read, on host and device.
struct Step {
  AttentionShape shape;
  int half_dim = 0;
  std::vector<Rows> sequences;
  int num_blocks = 0;
  std::vector<int32_t> positions, row_sequences, tables, decode_rows;
  std::vector<PrefillTile> tiles;
  std::vector<float> cos, sin;
  std::vector<uint16_t> qkv, k, v;

  int rows() const { return static_cast<int>(positions.size()); }
  int64_t qkv_columns() const {
    return static_cast<int64_t>(shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim;
  }
  int64_t out_columns() const { return static_cast<int64_t>(shape.num_heads) * shape.head_dim; }
  int64_t table_stride() const {
    int64_t most = 0;
    for (const Rows& r : sequences) most = std::max<int64_t>(most, r.start + r.count);
    return (most + shape.block_size - 1) / shape.block_size + 1;
  }
  int64_t Slot(int sequence, int position, int kv_head) const {
    const int64_t block = tables[sequence * table_stride() + position / shape.block_size];
    return ((block * shape.num_kv_heads + kv_head) * shape.block_size +
            position % shape.block_size) *
           shape.head_dim;
  }
};

// A random value of about unit size, rounded to the dtype.
inline uint16_t RandomBits(DType dtype, std::mt19937* random) {
  const auto integer = static_cast<int32_t>((*random)());
  return Encode(dtype, static_cast<float>(integer) * (1.7f / 2147483648.0f));
}

inline void AddRows(Step* step, int sequence) {
  const Rows& rows = step->sequences[sequence];
  const int begin = step->rows();
  for (int i = 0; i < rows.count; ++i) {
    step->positions.push_back(rows.start < 0 ? kPaddingPosition : rows.start + i);
    step->row_sequences.push_back(rows.start < 0 ? 0 : sequence);
  }
  if (rows.count == 1) {
    step->decode_rows.push_back(begin);
    return;
  }
  for (int i = 0; i < rows.count; i += kPrefillTileRows) {
    step->tiles.push_back(
        {sequence, begin + i, std::min(kPrefillTileRows, rows.count - i), rows.start + i});
  }
}

inline Step MakeStep(const AttentionShape& shape, std::vector<Rows> sequences, int half_dim,
                     int seed) {
  std::mt19937 random(seed);
  Step step;
  step.shape = shape;
  step.half_dim = half_dim;
  step.sequences = std::move(sequences);
  const auto num_sequences = static_cast<int>(step.sequences.size());
  const int64_t stride = step.table_stride();
  step.num_blocks = static_cast<int>(num_sequences * stride) + 3;
  std::vector<int32_t> blocks(step.num_blocks);
  std::iota(blocks.begin(), blocks.end(), 0);
  std::shuffle(blocks.begin(), blocks.end(), random);
  step.tables.assign(blocks.begin(), blocks.begin() + num_sequences * stride);
  for (int s = 0; s < num_sequences; ++s) AddRows(&step, s);
  const int64_t cache = static_cast<int64_t>(step.num_blocks) * shape.num_kv_heads *
                        shape.block_size * shape.head_dim;
  step.k.assign(cache, kPoison);
  step.v.assign(cache, kPoison);
  for (int s = 0; s < num_sequences; ++s) {
    for (int position = 0; position < step.sequences[s].start; ++position) {
      for (int head = 0; head < shape.num_kv_heads; ++head) {
        const int64_t slot = step.Slot(s, position, head);
        for (int i = 0; i < shape.head_dim; ++i) {
          step.k[slot + i] = RandomBits(shape.dtype, &random);
          step.v[slot + i] = RandomBits(shape.dtype, &random);
        }
      }
    }
  }
  step.qkv.resize(step.rows() * step.qkv_columns());
  for (uint16_t& bits : step.qkv) bits = RandomBits(shape.dtype, &random);
  std::uniform_real_distribution<float> angle(0.0f, 6.28f);
  for (int i = 0; i < step.rows() * half_dim; ++i) {
    const float a = angle(random);
    step.cos.push_back(std::cos(a));
    step.sin.push_back(std::sin(a));
  }
  return step;
}

}  // namespace sluice
