#include <algorithm>

#include "kernels/cuda/epilogue.cuh"
#include "kernels/cuda/fragment.cuh"
#include "kernels/cuda/matmul.h"

namespace sluice {
namespace {

constexpr int kRowWarps = 4;  // Each with two tiles
constexpr int kKWarps = 2;    // Each with half the columns of a record
constexpr int kThreads = 32 * kRowWarps * kKWarps;
constexpr int kTiles = 2 * kRowWarps;  // Of a block of rows
constexpr int kMaxTokenTiles = kBatchRows / 8;
constexpr int kMaxStages = 4;
constexpr int kMinUnits = 8;
constexpr int kMaxRowBlocks = 1 << 15;

// A unit of work is one record of each of the kTiles tiles of a block of rows, against the columns
// of x that belong to it; units are numbered along k first. Block i of the grid does units [begin(i),
// begin(i + 1)), begin(i) = i * units / blocks.
struct Division {
  int64_t units;
  int blocks;
  __host__ __device__ int64_t Begin(int block) const { return block * units / blocks; }
  // The block that does a unit: the last one that begins at it or before.
  __device__ int BlockOf(int64_t unit) const {
    return static_cast<int>(((unit + 1) * blocks - 1) / units);
  }
};

struct StageLayout {
  int record_bytes, x_row_bytes, x_offset, bytes;
};
template <QuantFormat kFormat, int kTokenTiles>
__host__ __device__ constexpr StageLayout LayoutOf(int record_bytes) {
  StageLayout layout{};
  layout.record_bytes = record_bytes;
  layout.x_row_bytes =
      RecordColumns(kFormat) * 2 + 64;  // Off a multiple of 128 by 64: no conflicts
  layout.x_offset = kTiles * record_bytes;
  layout.bytes = layout.x_offset + kTokenTiles * 8 * layout.x_row_bytes;
  return layout;
}
constexpr int ExchangeBytes(int token_tiles) { return kRowWarps * token_tiles * 4 * 32 * 4; }

// Copies the units of a block in order: warp i the record of tile i, each thread its pieces of x.
template <typename T, QuantFormat kFormat, int kTokenTiles>
class Producer {
 public:
  static constexpr int kColumns = RecordColumns(kFormat);
  static constexpr int kPieces = kColumns / 8;  // Of a row of x
  static constexpr int kRowBytes = kColumns * 2 + 64;
  static constexpr int kRowsAtOnce = kThreads / kPieces;

  __device__ __forceinline__ Producer(const MatMulParams& p, int row_block, int record)
      : p_(p), row_block_(row_block), record_(record), x_record_(record) {
    Seek();
  }

  __device__ __forceinline__ void StartRecord(uint8_t* stage) {
    const int lane = threadIdx.x % 32;
    uint8_t* slot = stage + threadIdx.x / 32 * p_.w.record_bytes + lane * 16;
    CopyAsync16(slot, source_);
    CopyAsync16(slot + 512, source_ + 512);
    if (lane * 16 < p_.w.record_bytes - kRecordCodeBytes) {
      CopyAsync16(slot + kRecordCodeBytes, source_ + kRecordCodeBytes);
    }
    source_ += p_.w.record_bytes;
    if (++record_ == p_.w.records) {
      record_ = 0;
      ++row_block_;
      Seek();
    }
  }

  __device__ __forceinline__ void StartX(uint8_t* x) {
    const int piece = threadIdx.x % kPieces, first = threadIdx.x / kPieces;
    const int column = x_record_ * kColumns + piece * 8;
    const int in_row = max(0, min(16, (p_.w.k - column) * 2));
    // What is not there is read from the start of x, with 0 bytes.
    const auto* base = static_cast<const T*>(p_.in.x);
    int64_t offset = int64_t{first} * p_.in.stride + column;
    uint8_t* to = x + first * kRowBytes + piece * 16;
#pragma unroll
    for (int row = 0; row < kTokenTiles * 8; row += kRowsAtOnce) {
      if (kRowsAtOnce > kTokenTiles * 8 && first >= kTokenTiles * 8) break;
      const int bytes = first + row < p_.in.rows ? in_row : 0;
      CopyAsync16(to + row * kRowBytes, base + (bytes > 0 ? offset : 0), bytes);
      offset += kRowsAtOnce * p_.in.stride;
    }
    if (++x_record_ == p_.w.records) x_record_ = 0;
  }

 private:
  __device__ __forceinline__ void Seek() {
    const int tile = min(row_block_ * kTiles + static_cast<int>(threadIdx.x) / 32, p_.w.tiles - 1);
    source_ = static_cast<const uint8_t*>(p_.w.data) + threadIdx.x % 32 * 16 +
              (int64_t{tile} * p_.w.records + record_) * p_.w.record_bytes;
  }

  const MatMulParams& p_;
  const uint8_t* source_;
  int row_block_, record_, x_record_;
};

__device__ __forceinline__ void WaitForStage(int stages) {
  if (stages == 2) {
    WaitForCopies<0>();
  } else if (stages == 3) {
    WaitForCopies<1>();
  } else {
    WaitForCopies<2>();
  }
}

template <int kTokenTiles>
using Accumulators = float[2][kTokenTiles][4];

// One stage: this warp's two tiles, its half of the columns, all tokens.
template <typename T, QuantFormat kFormat, int kTokenTiles>
__device__ __forceinline__ void MultiplyStage(const WeightParams& w, const uint8_t* stage,
                                              const uint32_t* pair_table, int row_warp, int k_warp,
                                              Accumulators<kTokenTiles>& acc) {
  constexpr int kBlocks = RecordColumns(kFormat) / 32 / kKWarps;
  constexpr int kRowBytes = RecordColumns(kFormat) * 2 + 64;
  const int lane = threadIdx.x % 32;
  const uint8_t* records[2] = {stage + (2 * row_warp) * w.record_bytes,
                               stage + (2 * row_warp + 1) * w.record_bytes};
  Fragment<T, kFormat, /*kScaled=*/true> codes[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) codes[i].LoadHalf(records[i], lane, k_warp);
  const uint8_t* x = stage + kTiles * w.record_bytes + lane / 4 * kRowBytes + lane % 4 * 16 +
                     k_warp * kBlocks * 64;
  GranuleState state[2];
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    const int step = 2 * (k_warp * kBlocks + block);
    if (block == 0 || (step & (w.steps_per_granule - 1)) == 0) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        state[i] = LoadGranule<T, kFormat, /*kScaled=*/true>(
            records[i] + kRecordCodeBytes + step / w.steps_per_granule * GranuleBytes(kFormat),
            lane / 4);
      }
    }
    uint32_t a[2][2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      codes[i].Step(2 * block, state[i], pair_table, a[i][0]);
      codes[i].Step(2 * block + 1, state[i], pair_table, a[i][1]);
    }
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
      const uint4 b = *reinterpret_cast<const uint4*>(x + n * 8 * kRowBytes + block * 64);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        Mma<T>(acc[i][n], a[i][0], b.x, b.y);
        Mma<T>(acc[i][n], a[i][1], b.z, b.w);
      }
    }
  }
}

// Adds up the two halves of the columns: tile i's sums end in the warps of half i.
template <int kTokenTiles>
__device__ void JoinHalves(Accumulators<kTokenTiles>& acc, float* exchange, int row_warp,
                           int k_warp) {
  float* mine = exchange + row_warp * kTokenTiles * 4 * 32 + threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    __syncthreads();
    if (k_warp != i) {
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
        for (int j = 0; j < 4; ++j) mine[(n * 4 + j) * 32] = acc[i][n][j];
      }
    }
    __syncthreads();
    if (k_warp == i) {
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
        for (int j = 0; j < 4; ++j) acc[0][n][j] = acc[i][n][j] + mine[(n * 4 + j) * 32];
      }
    }
  }
}

// The sums of blocks of rows that more than one block of the grid works on: two slots a block, for
// its first and its last stretch of units.
template <int kTokenTiles>
constexpr int kSlotFloats = kRowWarps * 2 * kTokenTiles * 4 * 32;

template <int kTokenTiles>
__device__ float* SlotOf(float* partials, int block, bool first, int row_warp, int k_warp) {
  const int64_t slot = 2 * int64_t{block} + (first ? 0 : 1);
  return partials + slot * kSlotFloats<kTokenTiles> +
         (row_warp * 2 + k_warp) * kTokenTiles * 4 * 32 + threadIdx.x % 32;
}

// Sums of one tile, in the warps that JoinHalves left them in.
template <int kTokenTiles>
using TileSums = float[kTokenTiles][4];

// Leaves this block's sums and says whether all others have left theirs. Whole block.
template <int kTokenTiles>
__device__ bool LeavePartial(const TileSums<kTokenTiles>& sums, float* slot, unsigned* arrived,
                             unsigned contributors, unsigned* shared_ticket) {
#pragma unroll
  for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
    for (int j = 0; j < 4; ++j) slot[(n * 4 + j) * 32] = sums[n][j];
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    *shared_ticket = atomicAdd(arrived, 1u);
    __threadfence();
  }
  __syncthreads();
  if (*shared_ticket + 1 != contributors) return false;
  if (threadIdx.x == 0) *arrived = 0;  // For the next kernel
  return true;
}

// The epilogue of a block of rows whose sums are where JoinHalves left them. Through shared
// memory, so that one small loop of all threads does it. Whole block.
template <typename T, int kTokenTiles>
__device__ void Store(const MatMulParams& p, int row_block, int row_warp, int k_warp,
                      float* exchange, const TileSums<kTokenTiles>& sums) {
  constexpr int kWarpFloats = kTokenTiles * 4 * 32;
  float* mine = exchange + row_warp * kWarpFloats + threadIdx.x % 32;
  Epilogue<T> epilogue(p.out, p.w.order);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    __syncthreads();
    if (k_warp == i) {
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
        for (int j = 0; j < 4; ++j) mine[(n * 4 + j) * 32] = sums[n][j];
      }
    }
    __syncthreads();
    const int g = threadIdx.x % 8, warp = threadIdx.x / 8 % kRowWarps;
    const int tile = row_block * kTiles + 2 * warp + i;
    if (tile >= p.w.tiles) continue;
    epilogue.SetRows(p.w.order.LowRow(tile, g));
#pragma unroll 1
    for (int token = threadIdx.x / (8 * kRowWarps); token < p.in.rows;
         token += kThreads / (8 * kRowWarps)) {
      const float* low =
          exchange + warp * kWarpFloats + (token / 8 * 4 + token % 2) * 32 + g * 4 + token % 8 / 2;
      epilogue.SetToken(token);
      epilogue.Prefetch();
      epilogue.Store(low[0], low[2 * 32]);
    }
  }
}

// Ends a stretch of units [begin, end) of one block of rows.
template <typename T, int kTokenTiles>
__device__ void EndStretch(const MatMulParams& p, const Division& division, int row_block,
                           int64_t begin, int64_t end, float* partials, unsigned* arrived,
                           unsigned* shared_ticket, float* exchange,
                           Accumulators<kTokenTiles>& acc) {
  const int row_warp = threadIdx.x / 32 % kRowWarps, k_warp = threadIdx.x / 32 / kRowWarps;
  const int64_t first_unit = int64_t{row_block} * p.w.records;
  const int64_t last_unit = first_unit + p.w.records - 1;
  TileSums<kTokenTiles>& sums = acc[0];
  if (begin != first_unit || end != last_unit + 1) {
    const int first = division.BlockOf(first_unit), last = division.BlockOf(last_unit);
    const int block = static_cast<int>(blockIdx.x);
    float* slot =
        SlotOf<kTokenTiles>(partials, block, begin == division.Begin(block), row_warp, k_warp);
    if (!LeavePartial<kTokenTiles>(sums, slot, arrived + row_block,
                                   static_cast<unsigned>(last - first + 1), shared_ticket)) {
      return;
    }
#pragma unroll 1
    for (int other = first; other <= last; ++other) {
      const bool is_first = other > first || division.Begin(other) >= first_unit;
      const float* from = SlotOf<kTokenTiles>(partials, other, is_first, row_warp, k_warp);
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float sum = __ldcg(from + (n * 4 + j) * 32);
          sums[n][j] = other == first ? sum : sums[n][j] + sum;
        }
      }
    }
  }
  Store<T, kTokenTiles>(p, row_block, row_warp, k_warp, exchange, sums);
}

template <typename T, QuantFormat kFormat, int kTokenTiles>
__global__ void __launch_bounds__(kThreads, 2)
    BatchedKernel(const __grid_constant__ MatMulParams p, const Division division, int stages,
                  float* partials, unsigned* arrived) {
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ uint32_t pair_table[kFormat == QuantFormat::kTable4 ? 256 : 1];
  __shared__ unsigned ticket;
  const StageLayout layout = LayoutOf<kFormat, kTokenTiles>(p.w.record_bytes);
  auto* exchange = reinterpret_cast<float*>(shared);
  uint8_t* ring = shared + ExchangeBytes(kTokenTiles);
  const int row_warp = threadIdx.x / 32 % kRowWarps, k_warp = threadIdx.x / 32 / kRowWarps;
  const int64_t begin = division.Begin(static_cast<int>(blockIdx.x));
  const int64_t end = division.Begin(static_cast<int>(blockIdx.x) + 1);

  LetNextStart();
  int row_block = static_cast<int>(begin / p.w.records);
  int record = static_cast<int>(begin - int64_t{row_block} * p.w.records);
  const int units = static_cast<int>(end - begin);
  Producer<T, kFormat, kTokenTiles> producer(p, row_block, record);
  for (int i = 0; i < stages - 1 && i < units; ++i) producer.StartRecord(ring + i * layout.bytes);
  if constexpr (kFormat == QuantFormat::kTable4) FillPairTable<T>(p.w.table, pair_table);
  WaitForPrevious();
  for (int i = 0; i < stages - 1; ++i) {
    if (i < units) producer.StartX(ring + i * layout.bytes + layout.x_offset);
    CommitCopies();
  }

  Accumulators<kTokenTiles> acc = {};
  int64_t stretch = begin;
  int slot = 0;
  for (int unit = 0; unit < units; ++unit) {
    WaitForStage(stages);
    __syncthreads();
    if (unit + stages - 1 < units) {
      uint8_t* stage = ring + (slot == 0 ? stages - 1 : slot - 1) * layout.bytes;
      producer.StartRecord(stage);
      producer.StartX(stage + layout.x_offset);
    }
    CommitCopies();
    MultiplyStage<T, kFormat, kTokenTiles>(p.w, ring + slot * layout.bytes, pair_table, row_warp,
                                           k_warp, acc);
    slot = slot + 1 == stages ? 0 : slot + 1;
    if (++record == p.w.records || unit + 1 == units) {
      JoinHalves<kTokenTiles>(acc, exchange, row_warp, k_warp);
      const int64_t stretch_end = begin + unit + 1;
      EndStretch<T, kTokenTiles>(p, division, row_block, stretch, stretch_end, partials, arrived,
                                 &ticket, exchange, acc);
      stretch = stretch_end;
      ++row_block;
      record = 0;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
          for (int j = 0; j < 4; ++j) acc[i][n][j] = 0.0f;
        }
      }
    }
  }
}

template <typename T, QuantFormat kFormat, int kTokenTiles>
void LaunchBatched(const LaunchContext& context, const MatMulParams& params, void* scratch) {
  const auto kernel = BatchedKernel<T, kFormat, kTokenTiles>;
  static const bool allowed = [&] {
    SLUICE_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           context.max_shared_bytes - 2048));
    return true;
  }();
  const StageLayout layout = LayoutOf<kFormat, kTokenTiles>(params.w.record_bytes);
  const int exchange = ExchangeBytes(kTokenTiles);
  // Two blocks a multiprocessor when they fit with at least three stages each, else one.
  const int half = (context.max_shared_bytes + 1024) / 2 - 1024 - 2048;
  int stages = std::min(kMaxStages, (half - exchange) / layout.bytes);
  int per_sm = 2;
  if (stages < 3) {
    per_sm = 1;
    stages = std::min(kMaxStages, (context.max_shared_bytes - 2048 - exchange) / layout.bytes);
  }
  SLUICE_CHECK(allowed && stages >= 2) << layout.bytes << " bytes a stage";
  const int row_blocks = (params.w.tiles + kTiles - 1) / kTiles;
  SLUICE_CHECK(row_blocks <= kMaxRowBlocks) << row_blocks;
  Division division;
  division.units = int64_t{row_blocks} * params.w.records;
  // Few units a block would mean many sums to add up at the end of each block of rows.
  const int64_t blocks = std::min<int64_t>(
      context.num_sms * per_sm, std::max<int64_t>(row_blocks, division.units / kMinUnits));
  division.blocks = static_cast<int>(std::min(division.units, blocks));
  auto* arrived = static_cast<unsigned*>(scratch);
  auto* partials = reinterpret_cast<float*>(arrived + kMaxRowBlocks);
  Launch(context, kernel, dim3(division.blocks), dim3(kThreads), exchange + stages * layout.bytes,
         params, division, stages, partials, arrived);
}

template <typename T, QuantFormat kFormat>
void DispatchTokens(const LaunchContext& context, const MatMulParams& params, void* scratch) {
  if (params.in.rows <= 16) {
    LaunchBatched<T, kFormat, 2>(context, params, scratch);
  } else if (params.in.rows <= 32) {
    LaunchBatched<T, kFormat, 4>(context, params, scratch);
  } else {
    LaunchBatched<T, kFormat, 8>(context, params, scratch);
  }
}

template <typename T>
void DispatchFormat(const LaunchContext& context, QuantFormat format, const MatMulParams& params,
                    void* scratch) {
  switch (format) {
    case QuantFormat::kInt4Zero:
      return DispatchTokens<T, QuantFormat::kInt4Zero>(context, params, scratch);
    case QuantFormat::kInt4Offset:
      return DispatchTokens<T, QuantFormat::kInt4Offset>(context, params, scratch);
    case QuantFormat::kTable4:
      return DispatchTokens<T, QuantFormat::kTable4>(context, params, scratch);
    case QuantFormat::kInt8:
      return DispatchTokens<T, QuantFormat::kInt8>(context, params, scratch);
    case QuantFormat::kPlain:
      SLUICE_CHECK(false) << "a plain matrix goes to the library's product";
  }
}

}  // namespace

int64_t BatchScratchBytes(int num_sms) {
  return kMaxRowBlocks * int64_t{sizeof(unsigned)} +
         int64_t{2} * num_sms * 2 * kSlotFloats<kMaxTokenTiles> * int64_t{sizeof(float)};
}

void BatchedMatMul(const LaunchContext& context, DType dtype, QuantFormat format,
                   const MatMulParams& params, void* scratch) {
  SLUICE_CHECK(params.in.rows >= 1 && params.in.rows <= kBatchRows) << params.in.rows;
  SLUICE_CHECK(params.in.stride % 8 == 0 && reinterpret_cast<uintptr_t>(params.in.x) % 16 == 0)
      << params.in.stride;
  if (dtype == DType::kF16) {
    DispatchFormat<__half>(context, format, params, scratch);
  } else {
    DispatchFormat<__nv_bfloat16>(context, format, params, scratch);
  }
}

}  // namespace sluice
