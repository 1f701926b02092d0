// Dequantize: the canonical planes of a quantized matrix (kernels/quant.h), as they come over the
// wire, to plain float16 on the device. For what wants plain weights: a large prefill through a
// library's matrix product, and the check of every packed layout. It moves (bits of a code / 8 + 2)
// bytes a weight and computes next to nothing, so memory bandwidth bounds it.
//
// Example: int4_zero, n = 1, k = 4, group_size = 2, codes 0x21 0x43, scales 0.5 2, zeros 0 3 gives
// 0.5 1 0 2.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include "absl/status/status.h"
#include "kernels/quant.h"

namespace sluice {

// Writes W, [n, k] row-major in input-feature order (perm undone), to `out`. Each element is
// DequantizeRow's float rounded to nearest even: the same bits as on the host.
//   spec    any quantized format; REQUIRES: CheckSpec(spec) is OK and spec.format is not kPlain
//   planes  device memory, SizesOf(spec).total() bytes, aligned to 16; only read
//   out     device memory, n * k elements, aligned to 16; must not overlap planes
// Asynchronous on `stream`; safe from many threads. INTERNAL with CUDA's own text when the launch
// is refused; an error of the kernel itself comes with the next call that waits for the stream.
absl::Status DequantizeOnDevice(const QuantSpec& spec, const void* planes, __half* out,
                                cudaStream_t stream);

}  // namespace sluice
