#include "kernels/cuda/dequantize.h"

#include <cuda_bf16.h>

#include <string>

#include "kernels/core/check.h"

namespace sluice {
namespace {

// 256 threads read 2 KiB of float16 output a pass: enough loads in flight for a card's bandwidth,
// and small enough that rows of 576 columns (72 threads' work) waste no more than a few warps.
constexpr int kThreads = 256;
constexpr int kColumnsPerThread = 8;  // One 4-byte load of 4-bit codes, one 16-byte store

// The planes of one matrix in device memory; a plane that the format has not is null.
struct DevicePlanes {
  const uint8_t* codes;
  const uint8_t* scales;
  const uint8_t* zeros;
  const uint8_t* offsets;
  const uint8_t* table;  // 16 floats at any alignment
  const uint8_t* perm;   // k int32 at any alignment
  DType scale_dtype;
  int64_t k;
  int64_t group_size;
  int64_t groups;
};

// Element `index` of a plane of `dtype`. The planes follow each other without padding, so one may
// begin at any byte.
__device__ float LoadFloat(DType dtype, const uint8_t* plane, int64_t index) {
  if (dtype == DType::kF32) {
    const uint8_t* p = plane + 4 * index;
    return __uint_as_float(p[0] | p[1] << 8 | p[2] << 16 | static_cast<uint32_t>(p[3]) << 24);
  }
  const uint8_t* p = plane + 2 * index;
  const auto bits = static_cast<unsigned short>(p[0] | p[1] << 8);
  return dtype == DType::kF16 ? __half2float(__ushort_as_half(bits))
                              : __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

__device__ int32_t LoadInt(const uint8_t* plane, int64_t index) {
  const uint8_t* p = plane + 4 * index;
  return p[0] | p[1] << 8 | p[2] << 16 | p[3] << 24;
}

// Scale and offset of one group; what a code needs besides itself.
template <QuantFormat kFormat>
struct Group {
  float scale;
  float offset = 0.0f;
  int zero = 0;

  __device__ Group(const DevicePlanes& planes, int64_t index)
      : scale(LoadFloat(planes.scale_dtype, planes.scales, index)) {
    if constexpr (kFormat == QuantFormat::kInt4Zero) zero = planes.zeros[index];
    if constexpr (kFormat == QuantFormat::kInt4Offset) {
      offset = LoadFloat(planes.scale_dtype, planes.offsets, index);
    }
  }
};

// The formula of kernels/quant.h. The _rn intrinsics keep the compiler from fusing into an FMA: the
// host rounds twice.
template <QuantFormat kFormat>
__device__ __half Weight(int code, const Group<kFormat>& group, const float* table) {
  float value;
  if constexpr (kFormat == QuantFormat::kTable4) {
    value = __fmul_rn(table[code], group.scale);
  } else {
    value = __fmul_rn(group.scale, static_cast<float>(code - group.zero));
    if constexpr (kFormat == QuantFormat::kInt4Offset) value = __fadd_rn(value, group.offset);
  }
  return __float2half_rn(value);
}

// Code `column` of a row that begins at `row_codes`.
template <QuantFormat kFormat>
__device__ int LoadCode(const uint8_t* row_codes, int64_t column) {
  if constexpr (kFormat == QuantFormat::kInt8) return static_cast<int8_t>(row_codes[column]);
  const int byte = row_codes[column / 2];
  return column % 2 == 0 ? byte & 15 : byte >> 4;
}

// Any shape: one column at a time, scattered by perm.
template <QuantFormat kFormat>
__device__ void DequantizeRowPlain(const DevicePlanes& planes, const uint8_t* row_codes,
                                   const float* table, __half* out) {
  const int64_t row = blockIdx.x;
  for (int64_t column = threadIdx.x; column < planes.k; column += kThreads) {
    const Group<kFormat> group(planes, row * planes.groups + column / planes.group_size);
    const int64_t target = planes.perm == nullptr ? column : LoadInt(planes.perm, column);
    out[target] = Weight<kFormat>(LoadCode<kFormat>(row_codes, column), group, table);
  }
}

// k and group_size are multiples of 8 and there is no perm: a thread takes 8 columns of one group.
template <QuantFormat kFormat>
__device__ void DequantizeRowWide(const DevicePlanes& planes, const uint8_t* row_codes,
                                  const float* table, __half* out) {
  const int64_t row = blockIdx.x;
  for (int64_t column = threadIdx.x * kColumnsPerThread; column < planes.k;
       column += kThreads * kColumnsPerThread) {
    const Group<kFormat> group(planes, row * planes.groups + column / planes.group_size);
    alignas(16) __half values[kColumnsPerThread];
    if constexpr (kFormat == QuantFormat::kInt8) {
      const auto codes = *reinterpret_cast<const int2*>(row_codes + column);
      for (int i = 0; i < kColumnsPerThread; ++i) {
        const int word = i < 4 ? codes.x : codes.y;
        values[i] = Weight<kFormat>(static_cast<int8_t>(word >> (8 * (i % 4))), group, table);
      }
    } else {
      const auto codes = *reinterpret_cast<const uint32_t*>(row_codes + column / 2);
      for (int i = 0; i < kColumnsPerThread; ++i) {
        values[i] = Weight<kFormat>((codes >> (4 * i)) & 15, group, table);
      }
    }
    *reinterpret_cast<uint4*>(out + column) = *reinterpret_cast<const uint4*>(values);
  }
}

// One block a row.
template <QuantFormat kFormat, bool kWide>
__global__ void DequantizeKernel(const DevicePlanes planes, __half* out) {
  __shared__ float table[16];
  if constexpr (kFormat == QuantFormat::kTable4) {
    if (threadIdx.x < 16) table[threadIdx.x] = LoadFloat(DType::kF32, planes.table, threadIdx.x);
    __syncthreads();
  }
  const int64_t row = blockIdx.x;
  const int64_t row_bytes = kFormat == QuantFormat::kInt8 ? planes.k : (planes.k + 1) / 2;
  const uint8_t* row_codes = planes.codes + row * row_bytes;
  __half* row_out = out + row * planes.k;
  if constexpr (kWide) {
    DequantizeRowWide<kFormat>(planes, row_codes, table, row_out);
  } else {
    DequantizeRowPlain<kFormat>(planes, row_codes, table, row_out);
  }
}

DevicePlanes PlanesAt(const QuantSpec& spec, const void* base) {
  const PlaneSizes sizes = SizesOf(spec);
  const auto* next = static_cast<const uint8_t*>(base);
  const auto take = [&next](uint64_t size) {
    const uint8_t* plane = size > 0 ? next : nullptr;
    next += size;
    return plane;
  };
  DevicePlanes planes{};
  planes.codes = take(sizes.codes);
  planes.scales = take(sizes.scales);
  planes.zeros = take(sizes.zeros);
  planes.offsets = take(sizes.offsets);
  planes.table = take(sizes.table);
  planes.perm = take(sizes.perm);
  planes.scale_dtype = spec.scale_dtype;
  planes.k = spec.k;
  planes.group_size = spec.group_size;
  planes.groups = spec.groups();
  return planes;
}

template <QuantFormat kFormat>
void Launch(const QuantSpec& spec, const void* base, __half* out, cudaStream_t stream) {
  const DevicePlanes planes = PlanesAt(spec, base);
  const bool one_group = spec.group_size % kColumnsPerThread == 0 || spec.groups() == 1;
  const auto rows = static_cast<unsigned>(spec.n);
  if (!spec.has_perm && spec.k % kColumnsPerThread == 0 && one_group) {
    DequantizeKernel<kFormat, /*kWide=*/true><<<rows, kThreads, 0, stream>>>(planes, out);
  } else {
    DequantizeKernel<kFormat, /*kWide=*/false><<<rows, kThreads, 0, stream>>>(planes, out);
  }
}

}  // namespace

absl::Status DequantizeOnDevice(const QuantSpec& spec, const void* planes, __half* out,
                                cudaStream_t stream) {
  switch (spec.format) {
    case QuantFormat::kInt4Zero:
      Launch<QuantFormat::kInt4Zero>(spec, planes, out, stream);
      break;
    case QuantFormat::kInt4Offset:
      Launch<QuantFormat::kInt4Offset>(spec, planes, out, stream);
      break;
    case QuantFormat::kTable4:
      Launch<QuantFormat::kTable4>(spec, planes, out, stream);
      break;
    case QuantFormat::kInt8:
      Launch<QuantFormat::kInt8>(spec, planes, out, stream);
      break;
    case QuantFormat::kPlain:
      SLUICE_CHECK(false) << "a plain matrix has nothing to dequantize";
  }
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return absl::OkStatus();
  return absl::InternalError(std::string("CUDA refused to launch Dequantize: ") +
                             cudaGetErrorString(error));
}

}  // namespace sluice
