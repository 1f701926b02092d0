// Gemm: the matrix product of plain float16 or bfloat16 weights, by cuBLASLt. For large row counts,
// and for whatever has no kernel of its own.
//
// How a shape is computed is chosen by cuBLASLt's heuristic once per (shape, row bucket) and kept;
// a step chooses nothing. The row count itself is no part of the choice: all counts of one bucket
// (GemmRowBucket) run the same kernel, so within a bucket a row's result does not depend on how
// many rows there are. Sums are float32; split sums are added in float32 in a fixed order (no
// atomics): the same inputs give the same bits on the same kind of card.
//
// Threads: none of its own; one thread at a time. One Gemm serves one stream: its workspace is used
// by the product that runs.
#pragma once

#include <cublasLt.h>

#include <cstdint>
#include <map>
#include <memory>
#include <tuple>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/core/dtype.h"
#include "kernels/cuda/memory.h"

namespace sluice {

struct LaunchContext;

// y [m, n] = x [m, k] * w [n, k]^T + bias, or y += that. Rows are strides apart, in elements; x, w
// and y lie in device memory at multiples of 2 bytes (y of kF32: 4). Fastest when pointers and
// strides are multiples of 16 bytes.
struct GemmArgs {
  const void* x = nullptr;
  int64_t x_stride = 0;
  const void* w = nullptr;
  int64_t w_stride = 0;
  void* y = nullptr;
  int64_t y_stride = 0;
  int64_t m = 0, n = 0, k = 0;
  DType dtype = DType::kF16;    // Of x and w: kF16 or kBF16
  DType y_dtype = DType::kF16;  // dtype, or kF32
  const void* bias = nullptr;   // [n] of y_dtype at a multiple of 16 bytes, or null
  bool relu = false;            // y = max(0, ...); not together with accumulate
  bool accumulate = false;      // y += (residual)
};

// The smallest number of 1, 2, 4, ..., 64, 96, 128, 192, 256, 384, ... that is not below m.
int64_t GemmRowBucket(int64_t m);

class Gemm {
 public:
  // For the current device. 32 MiB of workspace are what cuBLAS advises for Hopper, 4 MiB for
  // earlier cards. RESOURCE_EXHAUSTED when the card has no room for it.
  static absl::StatusOr<std::unique_ptr<Gemm>> Create(int64_t workspace_bytes);
  ~Gemm();
  Gemm(const Gemm&) = delete;
  Gemm& operator=(const Gemm&) = delete;

  // Chooses for all buckets up to that of args.m. Of the pointers only the alignment counts, and
  // whether bias is null; the others may be null (aligned). UNIMPLEMENTED names a shape that
  // cuBLASLt has no kernel for. Runs nothing: CUDA loads a kernel when it is first launched, so run
  // a step once before one is recorded.
  absl::Status Prepare(const GemmArgs& args);

  // Asynchronous on context.stream, recordable in a graph. A shape that was not prepared is chosen
  // now; one that has no kernel is a CHECK failure.
  void Run(const LaunchContext& context, const GemmArgs& args);

 private:
  // n, k, bucket, and dtypes, epilogue and alignments as bits.
  using Key = std::tuple<int64_t, int64_t, int64_t, uint32_t>;

  Gemm(cublasLtHandle_t handle, DeviceMemory workspace);
  absl::Status Choose(const GemmArgs& args, int64_t bucket);

  cublasLtHandle_t handle_;
  DeviceMemory workspace_;
  std::map<Key, cublasLtMatmulAlgo_t> chosen_;
};

}  // namespace sluice
