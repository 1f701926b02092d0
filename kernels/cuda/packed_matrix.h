// CudaPackedMatrix: a weight on the card, packed on the card from its canonical planes
// (packed_layout.h), and the way back to plain rows for products with many rows of x.
#pragma once

#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kernels/backend.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/matmul_params.h"
#include "kernels/cuda/memory.h"

namespace sluice {

class CudaPackedMatrix final : public PackedMatrix {
 public:
  // Rows [row_begin, row_begin + weight.order.n) of the stacked matrix: sources that follow each
  // other and share format, groups, table and perm. Nearly always there is one part.
  struct Part {
    QuantFormat format = QuantFormat::kPlain;
    int64_t row_begin = 0;
    WeightParams weight;
    float scale = 1.0f;             // Of the product: scales are stored divided by it
    const int32_t* perm = nullptr;  // [k], device
    DeviceMemory memory, perm_memory;
  };

  CudaPackedMatrix(int64_t n, int64_t k, int64_t bytes, std::vector<Part> parts)
      : PackedMatrix(n, k, bytes), parts_(std::move(parts)) {}
  absl::Span<const Part> parts() const { return parts_; }

 private:
  std::vector<Part> parts_;
};

// Packs matrices of one k, one above the other. pair_distance: see packed_layout.h; taken when the
// result is one part and its n allows it. Group sizes that are no multiple of 32 are kept plain.
// Weights become dtype (kF16 or kBF16). Waits for the stream. INVALID_ARGUMENT: sources that do not
// fit together; RESOURCE_EXHAUSTED: no memory left on the card.
absl::StatusOr<std::unique_ptr<CudaPackedMatrix>> PackOnDevice(
    const LaunchContext& context, absl::Span<const QuantizedMatrix* const> stacked,
    int64_t pair_distance, DType dtype);

// Writes tiles [tile_begin, tile_end) of a quantized part as plain rows of dtype, `stride` elements
// from one to the next. Without `high`, rows keep their order, counted from the first row of the
// first tile (the tiles are whole sections then). With it, row g of tile i becomes row (i -
// tile_begin) * 8 + g of `low` and its partner the same row of `high`. Columns keep the order of the
// planes (perm is not undone). REQUIRES: stride >= k, a multiple of 8.
void UnpackTiles(const LaunchContext& context, DType dtype, const CudaPackedMatrix::Part& part,
                 int tile_begin, int tile_end, void* low, void* high, int64_t stride);

// Row m of out = row ids[m] of a quantized table, or that is added. ids [rows], device.
void EmbedPacked(const LaunchContext& context, DType dtype, const CudaPackedMatrix::Part& part,
                 const uint32_t* ids, int rows, bool add, void* out, int64_t stride);

}  // namespace sluice
