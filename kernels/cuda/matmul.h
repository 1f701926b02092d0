// The product of activations with a packed weight, at the number of rows of a decode step.
//
// SmallMatMul, up to kSmallRows rows of x: bounded by the read of the weights. Blocks stay on their
// multiprocessor and walk over tiles of 16 rows; the warps of a block split k, each with a ring of
// records under way in shared memory; x (normed on the way) is kept in shared memory. The first
// records are asked for before the kernel waits for the one in front of it.
//
// BatchedMatMul, up to kBatchRows rows: blocks of 128 rows of W against all rows of x, records and
// columns of x staged together. Every block gets the same number of stages; a block of rows that
// more than one block worked on is summed by the last of them, in a fixed order.
//
// Both: weights as the 16-row operand of the tensor cores, float32 accumulation, no float atomics.
// A row of the result depends on its own row of x, the number of rows of the bucket and the card.
#pragma once

#include <cstdint>

#include "kernels/core/dtype.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/matmul_params.h"

namespace sluice {

inline constexpr int kSmallRows = 8;
inline constexpr int kBatchRows = 64;

// Shared memory that SmallMatMul needs; the caller takes another way when it is more than the card
// has (LaunchContext::max_shared_bytes).
int64_t SmallMatMulShared(QuantFormat format, const WeightParams& w, int rows, NormKind norm);

// REQUIRES: 1 <= in.rows <= kSmallRows.
void SmallMatMul(const LaunchContext& context, DType dtype, QuantFormat format,
                 const MatMulParams& params);

// Scratch for BatchedMatMul on a card with num_sms multiprocessors, bytes; zeroed before the first
// use.
int64_t BatchScratchBytes(int num_sms);

// x is taken as it is: no norm, no perm, rows in order, 16-byte aligned with a stride that is a
// multiple of 8. REQUIRES: format is not kPlain, 1 <= in.rows <= kBatchRows.
void BatchedMatMul(const LaunchContext& context, DType dtype, QuantFormat format,
                   const MatMulParams& params, void* scratch);

}  // namespace sluice
