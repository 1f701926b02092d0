#include <algorithm>

#include "kernels/core/check.h"
#include "kernels/cpu/ops.h"

namespace sluice {
namespace {

// Unpacking an element costs about 8 times what an element of a vector loop does.
int64_t RowsPerPiece(const CpuPackedMatrix& table) {
  return std::max<int64_t>(1, kFloatsPerPiece / 8 / table.k());
}

template <typename Row>
void ForRows(const CpuPackedMatrix& table, absl::Span<const uint32_t> ids, ThreadPool& pool,
             const Row& row) {
  const int64_t count = static_cast<int64_t>(ids.size());
  const int64_t rows_per_piece = RowsPerPiece(table);
  pool.ParallelFor((count + rows_per_piece - 1) / rows_per_piece, [&](int64_t piece, int thread) {
    const int64_t end = std::min(count, (piece + 1) * rows_per_piece);
    for (int64_t m = piece * rows_per_piece; m < end; ++m) {
      SLUICE_CHECK(ids[m] < table.n()) << "id " << ids[m] << " beyond a table of " << table.n();
      row(m, thread);
    }
  });
}

}  // namespace

void EmbedRows(const CpuPackedMatrix& table, absl::Span<const uint32_t> ids, TensorView out,
               ThreadPool& pool) {
  ForRows(table, ids, pool, [&](int64_t m, int) { UnpackRow(table, ids[m], out.Row(m)); });
}

void AddEmbeddedRows(const CpuPackedMatrix& table, absl::Span<const uint32_t> ids, TensorView x,
                     float* scratch, ThreadPool& pool) {
  ForRows(table, ids, pool, [&](int64_t m, int thread) {
    float* row = scratch + thread * table.k();
    UnpackRow(table, ids[m], row);
    for (int64_t i = 0; i < table.k(); ++i) x.Row(m)[i] += row[i];
  });
}

}  // namespace sluice
