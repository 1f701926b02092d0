#include "kernels/cuda/packed_matrix.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/core/status_macros.h"
#include "kernels/cuda/dequantize.h"
#include "kernels/cuda/fragment.cuh"

namespace sluice {
namespace {

constexpr int kThreads = 256;

// Canonical planes of the sources of one part, one above the other, on the device.
struct StackedPlanes {
  const uint8_t* codes = nullptr;
  const uint8_t* scales = nullptr;
  const uint8_t* zeros = nullptr;
  const uint8_t* offsets = nullptr;
  DType scale_dtype = DType::kF16;
  int64_t k = 0;
  int64_t group_size = 0;
  int64_t groups = 0;
};

__device__ float ReadFloat(DType dtype, const uint8_t* plane, int64_t index) {
  if (dtype == DType::kF32) return reinterpret_cast<const float*>(plane)[index];
  const uint16_t bits = reinterpret_cast<const uint16_t*>(plane)[index];
  if (dtype == DType::kF16) return __half2float(__ushort_as_half(bits));
  return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

__device__ uint32_t Code4(const StackedPlanes& planes, int64_t n, int64_t row, int64_t column) {
  if (row >= n || column >= planes.k) return 0;
  const uint8_t byte = planes.codes[row * ((planes.k + 1) / 2) + column / 2];
  return column % 2 == 0 ? byte & 15 : byte >> 4;
}
__device__ uint32_t Code8(const StackedPlanes& planes, int64_t n, int64_t row, int64_t column) {
  if (row >= n || column >= planes.k) return 0;
  return planes.codes[row * planes.k + column];
}

template <QuantFormat kFormat>
__device__ void PackCodes(const StackedPlanes& planes, int64_t n, int64_t low, int64_t high,
                          int64_t first_column, int lane, uint8_t* record) {
  constexpr int kSteps = RecordColumns(kFormat) / 16;
  for (int step = 0; step < kSteps; ++step) {
    const int64_t c = first_column + step / 2 * 32 + lane % 4 * 8 + step % 2 * 4;
    if constexpr (kFormat == QuantFormat::kInt8) {
      uint32_t words[2] = {};
      for (int i = 0; i < 4; ++i) {
        words[0] |= Code8(planes, n, low, c + i) << (8 * i);
        words[1] |= Code8(planes, n, high, c + i) << (8 * i);
      }
      auto* out = reinterpret_cast<uint32_t*>(record + step / 2 * 512 + lane * 16) + step % 2 * 2;
      out[0] = words[0];
      out[1] = words[1];
    } else {
      uint32_t word = 0;
      for (int i = 0; i < 4; ++i) {
        const uint32_t code_low = Code4(planes, n, low, c + i);
        const uint32_t code_high = Code4(planes, n, high, c + i);
        if constexpr (kFormat == QuantFormat::kTable4) {
          word |= code_low << (i / 2 * 16 + i % 2 * 4);
          word |= code_high << (i / 2 * 16 + 8 + i % 2 * 4);
        } else {  // Nibbles 0, 4, 2, 6 and 1, 5, 3, 7
          const int nibble = i / 2 * 2 + i % 2 * 4;
          word |= code_low << (4 * nibble);
          word |= code_high << (4 * (nibble + 1));
        }
      }
      reinterpret_cast<uint32_t*>(record + step / 4 * 512 + lane * 16)[step % 4] = word;
    }
  }
}

template <typename T>
__device__ T PackedScale(const StackedPlanes& planes, const uint8_t* plane, int64_t n, int64_t row,
                         int64_t column, float inverse_scale) {
  if (row >= n || column >= planes.k) return T(0.0f);
  const int64_t at = row * planes.groups + column / planes.group_size;
  return Numeric<T>::FromFloat(ReadFloat(planes.scale_dtype, plane, at) * inverse_scale);
}

// One warp a record.
template <typename T, QuantFormat kFormat>
__global__ void PackKernel(StackedPlanes planes, WeightParams w, float inverse_scale,
                           uint8_t* out) {
  const int64_t index = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / 32;
  const int lane = threadIdx.x % 32;
  if (index >= int64_t{w.tiles} * w.records) return;
  const int tile = static_cast<int>(index / w.records);
  const int64_t first_column = index % w.records * RecordColumns(kFormat);
  const int64_t low = w.order.LowRow(tile, lane / 4);
  const int64_t high = w.order.HighRow(static_cast<int>(low));
  const int64_t n = w.order.n;
  uint8_t* record = out + index * w.record_bytes;
  PackCodes<kFormat>(planes, n, low, high, first_column, lane, record);
  const int granules = RecordColumns(kFormat) / 16 / w.steps_per_granule;
  for (int i = lane % 4; i < granules; i += 4) {
    uint8_t* granule = record + kRecordCodeBytes + i * GranuleBytes(kFormat);
    const int64_t column = first_column + i * 16 * w.steps_per_granule;
    const int g = lane / 4;
    auto* scales = reinterpret_cast<T*>(granule) + 2 * g;
    scales[0] = PackedScale<T>(planes, planes.scales, n, low, column, inverse_scale);
    scales[1] = PackedScale<T>(planes, planes.scales, n, high, column, inverse_scale);
    if constexpr (kFormat == QuantFormat::kInt4Zero) {
      const int64_t group = column / planes.group_size;
      const bool inside = column < planes.k;
      granule[32 + 2 * g] = inside && low < n ? planes.zeros[low * planes.groups + group] : 0;
      granule[33 + 2 * g] = inside && high < n ? planes.zeros[high * planes.groups + group] : 0;
    } else if constexpr (kFormat == QuantFormat::kInt4Offset) {
      auto* offsets = reinterpret_cast<T*>(granule + 32) + 2 * g;
      offsets[0] = PackedScale<T>(planes, planes.offsets, n, low, column, inverse_scale);
      offsets[1] = PackedScale<T>(planes, planes.offsets, n, high, column, inverse_scale);
    }
  }
}

// One block a row; zeros behind column k.
template <typename T>
__global__ void PlainKernel(DType source_dtype, const uint8_t* source, int64_t k, T* out,
                            int64_t stride) {
  const int64_t row = blockIdx.x;
  for (int64_t i = threadIdx.x; i < stride; i += kThreads) {
    const float value = i < k ? ReadFloat(source_dtype, source, row * k + i) : 0.0f;
    out[row * stride + i] = Numeric<T>::FromFloat(value);
  }
}

template <typename T, QuantFormat kFormat>
__global__ void UnpackKernel(WeightParams w, float scale, int tile_begin, int tile_end, T* low,
                             T* high, int64_t stride) {
  __shared__ uint32_t pair_table[256];
  WaitForPrevious();
  LetNextStart();
  if constexpr (kFormat == QuantFormat::kTable4) {
    FillPairTable<T>(w.table, pair_table);
    __syncthreads();
  }
  const int64_t index = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / 32;
  const int lane = threadIdx.x % 32;
  if (index >= int64_t{tile_end - tile_begin} * w.records) return;
  const int tile = static_cast<int>(index / w.records);
  const int64_t record_index = index % w.records;
  const uint8_t* record =
      static_cast<const uint8_t*>(w.data) +
      ((tile_begin + tile) * int64_t{w.records} + record_index) * w.record_bytes;
  const int g = lane / 4;
  T* low_row = low + (tile * int64_t{8} + g) * stride;
  T* high_row = high + (tile * int64_t{8} + g) * stride;
  if (high == nullptr) {
    const int row = w.order.LowRow(tile_begin + tile, g);
    const int first = w.order.LowRow(tile_begin, 0);
    low_row = low + int64_t{row - first} * stride;
    high_row = low + int64_t{w.order.HighRow(row) - first} * stride;
  }
  const uint32_t factor = Numeric<T>::FromFloats(scale, scale);
  Fragment<T, kFormat, /*kScaled=*/true> codes;
  codes.Load(record, lane);
  GranuleState state{};
#pragma unroll
  for (int block = 0; block < codes.kSteps / 2; ++block) {
    if ((2 * block & (w.steps_per_granule - 1)) == 0) {
      const int granule = 2 * block / w.steps_per_granule;
      state = LoadGranule<T, kFormat, /*kScaled=*/true>(
          record + kRecordCodeBytes + granule * GranuleBytes(kFormat), lane / 4);
    }
    uint32_t a[2][4];
    codes.Step(2 * block, state, pair_table, a[0]);
    codes.Step(2 * block + 1, state, pair_table, a[1]);
    const int64_t column = record_index * RecordColumns(kFormat) + block * 32 + lane % 4 * 8;
    if (column >= stride) continue;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      a[0][i] = PairMul<T>(a[0][i], factor);
      a[1][i] = PairMul<T>(a[1][i], factor);
    }
    *reinterpret_cast<uint4*>(low_row + column) = make_uint4(a[0][0], a[0][2], a[1][0], a[1][2]);
    *reinterpret_cast<uint4*>(high_row + column) = make_uint4(a[0][1], a[0][3], a[1][1], a[1][3]);
  }
}

// One block a row of the step; the warps share the records of the tile that holds the row.
template <typename T, QuantFormat kFormat>
__global__ void EmbedKernel(WeightParams w, float scale, const uint32_t* ids, bool add, T* out,
                            int64_t stride) {
  __shared__ uint32_t pair_table[256];
  LetNextStart();
  WaitForPrevious();
  if constexpr (kFormat == QuantFormat::kTable4) {
    FillPairTable<T>(w.table, pair_table);
    __syncthreads();
  }
  const int lane = threadIdx.x % 32;
  const auto row = static_cast<int>(min(ids[blockIdx.x], static_cast<uint32_t>(w.order.n - 1)));
  const int tile = row / kTileRows, row_in_tile = row % kTileRows;
  const bool mine = lane / 4 == row_in_tile % 8;
  const int half = row_in_tile / 8;
  T* target = out + blockIdx.x * stride;
  for (int index = threadIdx.x / 32; index < w.records; index += kThreads / 32) {
    const uint8_t* record =
        static_cast<const uint8_t*>(w.data) + (int64_t{tile} * w.records + index) * w.record_bytes;
    Fragment<T, kFormat, /*kScaled=*/true> codes;
    codes.Load(record, lane);
#pragma unroll
    for (int step = 0; step < codes.kSteps; ++step) {
      const GranuleState state = LoadGranule<T, kFormat, /*kScaled=*/true>(
          record + kRecordCodeBytes + step / w.steps_per_granule * GranuleBytes(kFormat), lane / 4);
      uint32_t a[4];
      codes.Step(step, state, pair_table, a);
      const int column =
          index * RecordColumns(kFormat) + step / 2 * 32 + lane % 4 * 8 + step % 2 * 4;
      const float2 first = Numeric<T>::ToFloat2(half == 0 ? a[0] : a[1]);
      const float2 second = Numeric<T>::ToFloat2(half == 0 ? a[2] : a[3]);
      const float values[4] = {first.x, first.y, second.x, second.y};
      for (int i = 0; i < 4 && mine && column + i < w.k; ++i) {
        const float before = add ? Numeric<T>::ToFloat(target[column + i]) : 0.0f;
        target[column + i] = Numeric<T>::FromFloat(before + values[i] * scale);
      }
    }
  }
}

// --- Host ---

bool IsPacked(const QuantSpec& spec) {
  return spec.format != QuantFormat::kPlain && (spec.group_size % 32 == 0 || spec.groups() == 1);
}

bool SamePlane(const void* a, const void* b, uint64_t bytes) {
  return bytes == 0 || std::memcmp(a, b, bytes) == 0;
}

bool SharePart(const QuantizedMatrix& a, const QuantizedMatrix& b) {
  if (IsPacked(a.spec) != IsPacked(b.spec)) return false;
  if (!IsPacked(a.spec)) return true;  // Both become plain rows
  QuantSpec same = b.spec;
  same.n = a.spec.n;
  const PlaneSizes sizes = SizesOf(a.spec);
  return same == a.spec && SamePlane(a.table(), b.table(), sizes.table) &&
         SamePlane(a.perm(), b.perm(), sizes.perm);
}

absl::Status Check(absl::Span<const QuantizedMatrix* const> stacked) {
  if (stacked.empty()) return absl::InvalidArgumentError("no matrix to pack");
  for (const QuantizedMatrix* matrix : stacked) {
    SLUICE_RETURN_IF_ERROR(CheckSpec(matrix->spec));
    if (matrix->spec.k != stacked[0]->spec.k) {
      return absl::InvalidArgumentError(absl::StrCat(
          "matrices that share an input have k = ", stacked[0]->spec.k, " and ", matrix->spec.k));
    }
    if (matrix->planes.size() < SizesOf(matrix->spec).total()) {
      return absl::InvalidArgumentError("the planes of a matrix are shorter than its spec says");
    }
  }
  return absl::OkStatus();
}

// A power of two that brings the largest scale to [1/16, 1/8): scales then use float16's range
// well, and products of a code and a scale stay far from its ends.
float ScaleFactor(absl::Span<const QuantizedMatrix* const> sources) {
  float largest = 0.0f;
  std::vector<float> values;
  for (const QuantizedMatrix* source : sources) {
    const int64_t count = source->spec.n * source->spec.groups();
    values.resize(static_cast<size_t>(count));
    for (const uint8_t* plane : {source->scales(), source->offsets()}) {
      if (plane == source->offsets() && source->spec.format != QuantFormat::kInt4Offset) continue;
      ToFloat(source->spec.scale_dtype, plane, count, values.data());
      const float shrink = plane == source->offsets() ? 1.0f / 16.0f : 1.0f;
      for (const float value : values) largest = std::max(largest, std::abs(value) * shrink);
    }
  }
  if (largest == 0.0f) return 1.0f;
  int exponent = 0;
  std::frexp(largest, &exponent);  // largest in [2^(e-1), 2^e)
  return std::ldexp(1.0f, exponent + 3);
}

int StepsPerGranule(const QuantSpec& spec) {
  const int columns = RecordColumns(spec.format);
  int granule = columns;
  if (spec.groups() > 1) {
    while (spec.group_size % granule != 0) granule /= 2;
  }
  return granule / 16;
}

template <typename T>
void LaunchPack(const LaunchContext& context, QuantFormat format, const StackedPlanes& planes,
                const WeightParams& w, float inverse_scale, uint8_t* out) {
  const auto blocks =
      static_cast<unsigned>((int64_t{w.tiles} * w.records * 32 + kThreads - 1) / kThreads);
  const auto launch = [&](auto kernel) {
    kernel<<<blocks, kThreads, 0, context.stream>>>(planes, w, inverse_scale, out);
  };
  switch (format) {
    case QuantFormat::kInt4Zero:
      return launch(PackKernel<T, QuantFormat::kInt4Zero>);
    case QuantFormat::kInt4Offset:
      return launch(PackKernel<T, QuantFormat::kInt4Offset>);
    case QuantFormat::kTable4:
      return launch(PackKernel<T, QuantFormat::kTable4>);
    case QuantFormat::kInt8:
      return launch(PackKernel<T, QuantFormat::kInt8>);
    case QuantFormat::kPlain:
      SLUICE_CHECK(false) << "a plain matrix is not packed";
  }
}

// Copies one plane of every source, one after the other, behind *next.
absl::Status StagePlane(absl::Span<const QuantizedMatrix* const> sources,
                        const uint8_t* (*plane)(const QuantizedMatrix&), uint64_t PlaneSizes::*size,
                        const LaunchContext& context, uint8_t** next, const uint8_t** staged) {
  *staged = *next;
  for (const QuantizedMatrix* source : sources) {
    const uint64_t bytes = SizesOf(source->spec).*size;
    SLUICE_RETURN_IF_ERROR(CudaStatus(
        cudaMemcpyAsync(*next, plane(*source), bytes, cudaMemcpyHostToDevice, context.stream),
        "copying a weight to the card"));
    *next += bytes;
  }
  *next += -reinterpret_cast<uintptr_t>(*next) % 16;
  return absl::OkStatus();
}

absl::Status PackQuantized(const LaunchContext& context,
                           absl::Span<const QuantizedMatrix* const> sources, DType dtype,
                           CudaPackedMatrix::Part* part) {
  const QuantSpec& spec = sources[0]->spec;
  WeightParams& w = part->weight;
  w.records =
      static_cast<int32_t>((spec.k + RecordColumns(spec.format) - 1) / RecordColumns(spec.format));
  w.steps_per_granule = StepsPerGranule(spec);
  w.record_bytes = kRecordCodeBytes + RecordColumns(spec.format) / 16 / w.steps_per_granule *
                                          GranuleBytes(spec.format);
  if (spec.format == QuantFormat::kTable4) std::copy_n(sources[0]->table(), 16, w.table);
  part->scale = ScaleFactor(sources);
  SLUICE_ASSIGN_OR_RETURN(part->memory,
                          DeviceMemory::Allocate(int64_t{w.tiles} * w.records * w.record_bytes));
  w.data = part->memory.data();
  uint64_t bytes = 0;
  for (const QuantizedMatrix* source : sources) bytes += SizesOf(source->spec).total();
  SLUICE_ASSIGN_OR_RETURN(DeviceMemory staging,
                          DeviceMemory::Allocate(static_cast<int64_t>(bytes) + 64));
  auto* next = static_cast<uint8_t*>(staging.data());
  StackedPlanes planes;
  planes.scale_dtype = spec.scale_dtype;
  planes.k = spec.k;
  planes.group_size = spec.group_size;
  planes.groups = spec.groups();
  using Matrix = const QuantizedMatrix&;
  SLUICE_RETURN_IF_ERROR(StagePlane(
      sources, [](Matrix m) { return m.codes(); }, &PlaneSizes::codes, context, &next,
      &planes.codes));
  SLUICE_RETURN_IF_ERROR(StagePlane(
      sources, [](Matrix m) { return m.scales(); }, &PlaneSizes::scales, context, &next,
      &planes.scales));
  SLUICE_RETURN_IF_ERROR(StagePlane(
      sources, [](Matrix m) { return m.zeros(); }, &PlaneSizes::zeros, context, &next,
      &planes.zeros));
  SLUICE_RETURN_IF_ERROR(StagePlane(
      sources, [](Matrix m) { return m.offsets(); }, &PlaneSizes::offsets, context, &next,
      &planes.offsets));
  auto* out = static_cast<uint8_t*>(part->memory.data());
  if (dtype == DType::kF16) {
    LaunchPack<__half>(context, spec.format, planes, w, 1.0f / part->scale, out);
  } else {
    LaunchPack<__nv_bfloat16>(context, spec.format, planes, w, 1.0f / part->scale, out);
  }
  if (spec.has_perm) {
    const int64_t perm_bytes = spec.k * int64_t{sizeof(int32_t)};
    SLUICE_ASSIGN_OR_RETURN(part->perm_memory, DeviceMemory::Allocate(perm_bytes));
    SLUICE_RETURN_IF_ERROR(CudaStatus(
        cudaMemcpyAsync(part->perm_memory.data(), sources[0]->perm(),
                        static_cast<size_t>(perm_bytes), cudaMemcpyHostToDevice, context.stream),
        "copying a permutation to the card"));
    part->perm = static_cast<const int32_t*>(part->perm_memory.data());
  }
  SLUICE_RETURN_IF_ERROR(CudaStatus(cudaGetLastError(), "packing a weight"));
  return CudaStatus(cudaStreamSynchronize(context.stream), "packing a weight");
}

void LaunchPlain(const LaunchContext& context, DType dtype, DType source_dtype, const void* source,
                 const QuantSpec& spec, void* out, int64_t stride) {
  const auto rows = static_cast<unsigned>(spec.n);
  const auto* bytes = static_cast<const uint8_t*>(source);
  if (dtype == DType::kF16) {
    PlainKernel<<<rows, kThreads, 0, context.stream>>>(source_dtype, bytes, spec.k,
                                                       static_cast<__half*>(out), stride);
  } else {
    PlainKernel<<<rows, kThreads, 0, context.stream>>>(source_dtype, bytes, spec.k,
                                                       static_cast<__nv_bfloat16*>(out), stride);
  }
}

absl::Status PackPlain(const LaunchContext& context,
                       absl::Span<const QuantizedMatrix* const> sources, DType dtype,
                       CudaPackedMatrix::Part* part) {
  WeightParams& w = part->weight;
  w.plain_stride = PlainStride(w.k);
  w.records = static_cast<int32_t>((w.k + 31) / 32);
  SLUICE_ASSIGN_OR_RETURN(part->memory, DeviceMemory::Allocate(w.order.n * w.plain_stride * 2));
  w.data = part->memory.data();
  auto* out = static_cast<uint8_t*>(part->memory.data());
  for (const QuantizedMatrix* source : sources) {
    const QuantSpec& spec = source->spec;
    const PlaneSizes sizes = SizesOf(spec);
    SLUICE_ASSIGN_OR_RETURN(DeviceMemory staging,
                            DeviceMemory::Allocate(static_cast<int64_t>(sizes.total())));
    SLUICE_RETURN_IF_ERROR(
        CudaStatus(cudaMemcpyAsync(staging.data(), source->planes.data(), sizes.total(),
                                   cudaMemcpyHostToDevice, context.stream),
                   "copying a weight to the card"));
    DeviceMemory halves;
    const bool plain = spec.format == QuantFormat::kPlain;
    if (!plain) {
      SLUICE_ASSIGN_OR_RETURN(halves, DeviceMemory::Allocate(spec.n * spec.k * 2 + 16));
      SLUICE_RETURN_IF_ERROR(DequantizeOnDevice(
          spec, staging.data(), static_cast<__half*>(halves.data()), context.stream));
    }
    LaunchPlain(context, dtype, plain ? spec.plain_dtype : DType::kF16,
                plain ? staging.data() : halves.data(), spec, out, w.plain_stride);
    SLUICE_RETURN_IF_ERROR(CudaStatus(cudaGetLastError(), "packing a weight"));
    SLUICE_RETURN_IF_ERROR(CudaStatus(cudaStreamSynchronize(context.stream), "packing a weight"));
    out += spec.n * w.plain_stride * 2;
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<CudaPackedMatrix>> PackOnDevice(
    const LaunchContext& context, absl::Span<const QuantizedMatrix* const> stacked,
    int64_t pair_distance, DType dtype) {
  SLUICE_RETURN_IF_ERROR(Check(stacked));
  std::vector<CudaPackedMatrix::Part> parts;
  int64_t row = 0, bytes = 0;
  for (size_t begin = 0; begin < stacked.size();) {
    size_t end = begin + 1;
    while (end < stacked.size() && SharePart(*stacked[begin], *stacked[end])) ++end;
    const auto sources = stacked.subspan(begin, end - begin);
    CudaPackedMatrix::Part part;
    part.format = IsPacked(sources[0]->spec) ? sources[0]->spec.format : QuantFormat::kPlain;
    part.row_begin = row;
    RowOrder& order = part.weight.order;
    for (const QuantizedMatrix* source : sources) order.n += static_cast<int32_t>(source->spec.n);
    const bool whole = begin == 0 && end == stacked.size();
    if (whole && pair_distance > 0 && pair_distance % 8 == 0 &&
        order.n % (2 * pair_distance) == 0) {
      order.pair_distance = static_cast<int32_t>(pair_distance);
    }
    part.weight.k = static_cast<int32_t>(stacked[0]->spec.k);
    part.weight.tiles = (order.n + kTileRows - 1) / kTileRows;
    SLUICE_RETURN_IF_ERROR(part.format == QuantFormat::kPlain
                               ? PackPlain(context, sources, dtype, &part)
                               : PackQuantized(context, sources, dtype, &part));
    row += order.n;
    bytes += part.memory.bytes() + part.perm_memory.bytes();
    parts.push_back(std::move(part));
    begin = end;
  }
  return std::make_unique<CudaPackedMatrix>(row, stacked[0]->spec.k, bytes, std::move(parts));
}

namespace {
template <typename T>
void LaunchUnpack(const LaunchContext& context, const CudaPackedMatrix::Part& part, int tile_begin,
                  int tile_end, void* low, void* high, int64_t stride) {
  const WeightParams& w = part.weight;
  const int64_t warps = int64_t{tile_end - tile_begin} * w.records;
  const dim3 blocks(static_cast<unsigned>((warps * 32 + kThreads - 1) / kThreads));
  const auto launch = [&](auto kernel) {
    Launch(context, kernel, blocks, dim3(kThreads), 0, w, part.scale, tile_begin, tile_end,
           static_cast<T*>(low), static_cast<T*>(high), stride);
  };
  switch (part.format) {
    case QuantFormat::kInt4Zero:
      return launch(UnpackKernel<T, QuantFormat::kInt4Zero>);
    case QuantFormat::kInt4Offset:
      return launch(UnpackKernel<T, QuantFormat::kInt4Offset>);
    case QuantFormat::kTable4:
      return launch(UnpackKernel<T, QuantFormat::kTable4>);
    case QuantFormat::kInt8:
      return launch(UnpackKernel<T, QuantFormat::kInt8>);
    case QuantFormat::kPlain:
      SLUICE_CHECK(false) << "a plain matrix is not packed";
  }
}
}  // namespace

void UnpackTiles(const LaunchContext& context, DType dtype, const CudaPackedMatrix::Part& part,
                 int tile_begin, int tile_end, void* low, void* high, int64_t stride) {
  if (dtype == DType::kF16) {
    LaunchUnpack<__half>(context, part, tile_begin, tile_end, low, high, stride);
  } else {
    LaunchUnpack<__nv_bfloat16>(context, part, tile_begin, tile_end, low, high, stride);
  }
}

namespace {
template <typename T>
void LaunchEmbed(const LaunchContext& context, const CudaPackedMatrix::Part& part,
                 const uint32_t* ids, int rows, bool add, void* out, int64_t stride) {
  const auto launch = [&](auto kernel) {
    Launch(context, kernel, dim3(rows), dim3(kThreads), 0, part.weight, part.scale, ids, add,
           static_cast<T*>(out), stride);
  };
  switch (part.format) {
    case QuantFormat::kInt4Zero:
      return launch(EmbedKernel<T, QuantFormat::kInt4Zero>);
    case QuantFormat::kInt4Offset:
      return launch(EmbedKernel<T, QuantFormat::kInt4Offset>);
    case QuantFormat::kTable4:
      return launch(EmbedKernel<T, QuantFormat::kTable4>);
    case QuantFormat::kInt8:
      return launch(EmbedKernel<T, QuantFormat::kInt8>);
    case QuantFormat::kPlain:
      SLUICE_CHECK(false) << "a plain table is not packed";
  }
}
}  // namespace

void EmbedPacked(const LaunchContext& context, DType dtype, const CudaPackedMatrix::Part& part,
                 const uint32_t* ids, int rows, bool add, void* out, int64_t stride) {
  SLUICE_CHECK(part.weight.order.pair_distance == 0 && part.perm == nullptr);
  if (dtype == DType::kF16) {
    LaunchEmbed<__half>(context, part, ids, rows, add, out, stride);
  } else {
    LaunchEmbed<__nv_bfloat16>(context, part, ids, rows, add, out, stride);
  }
}

}  // namespace sluice
