// Packed codes to float vectors, for one SIMD target at a time (Highway): included by matmul.cc
// within its foreach_target. kernels/cpu/pack.h draws the layout. Every weight has the same bits as
// DequantizeRow gives, except kInt4Offset with scales that need more than float16's bits: one fused
// rounding instead of two.
#if defined(SLUICE_KERNELS_CPU_DEQUANTIZE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SLUICE_KERNELS_CPU_DEQUANTIZE_INL_H_
#undef SLUICE_KERNELS_CPU_DEQUANTIZE_INL_H_
#else
#define SLUICE_KERNELS_CPU_DEQUANTIZE_INL_H_
#endif

#include "hwy/highway.h"
#include "kernels/cpu/pack.h"

HWY_BEFORE_NAMESPACE();
namespace sluice {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// At most 16 lanes; a tile of 16 rows is kVecs vectors.
using DF = hn::CappedTag<float, kTileRows>;
using DI = hn::Rebind<int32_t, DF>;
using DU = hn::Rebind<uint32_t, DF>;
using VF = hn::Vec<DF>;
using VU = hn::Vec<DU>;
constexpr int kLanes = static_cast<int>(hn::MaxLanes(DF()));
constexpr int kVecs = static_cast<int>(kTileRows) / kLanes;

enum class Coding { kZero, kOffset, kTable, kInt8, kF16, kBF16, kF32 };

// Header values 16 * `plane` + vector `v`.
HWY_INLINE VF LoadParams(const PackedPart& part, const uint8_t* header, int plane, int v) {
  const DF df;
  const int64_t index = plane * kTileRows + v * kLanes;
  if (part.half_params) {
    const hn::Rebind<hwy::float16_t, DF> dh;
    return hn::PromoteTo(df,
                         hn::LoadU(dh, reinterpret_cast<const hwy::float16_t*>(header) + index));
  }
  return hn::LoadU(df, reinterpret_cast<const float*>(header) + index);
}

// The float of the 4-bit code in the low bits of each lane; the other bits may hold anything.
struct CodeTable {
#if HWY_TARGET <= HWY_AVX3
  explicit CodeTable(const float* table) : values(hn::Load(DF(), table)) {}
  HWY_INLINE VF Get(VU words) const {
#if HWY_IS_DEBUG_BUILD
    // The instruction looks at 4 bits only; Highway's debug check does not know.
    words = hn::And(words, hn::Set(DU(), 15));
#endif
    return hn::TableLookupLanes(values, hn::IndicesFromVec(DF(), words));
  }
  VF values;
#elif HWY_TARGET == HWY_AVX2
  explicit CodeTable(const float* table)
      : low(hn::Load(DF(), table)), high(hn::Load(DF(), table + 8)) {}
  HWY_INLINE VF Get(VU words) const {
    const auto index = hn::IndicesFromVec(DF(), hn::And(words, hn::Set(DU(), 7)));
    const auto is_high = hn::MaskFromVec(hn::BitCast(DF(), hn::ShiftLeft<28>(words)));
    return hn::IfThenElse(is_high, hn::TableLookupLanes(high, index),
                          hn::TableLookupLanes(low, index));
  }
  VF low, high;
#else
  explicit CodeTable(const float* t) : table(t) {}
  HWY_INLINE VF Get(VU words) const {
    return hn::GatherIndex(DF(), table, hn::BitCast(DI(), hn::And(words, hn::Set(DU(), 15))));
  }
  const float* table;
#endif
};

// One tile in one group. Use: Decoder(part); per group SetGroup(block); per step Load(step), then
// kStep times Weights(), the kVecs vectors of a column, and Advance() to the next.
template <Coding kCoding>
struct Decoder {
  static constexpr bool kFourBit =
      kCoding == Coding::kZero || kCoding == Coding::kOffset || kCoding == Coding::kTable;
  static constexpr int kStep = kFourBit ? 8 : 4;  // Columns
  static constexpr int64_t kColumnBytes =
      kCoding == Coding::kInt8
          ? kTileRows
          : (kCoding == Coding::kF32 ? 4 : 2) * kTileRows;  // Not for 4-bit codes
  static constexpr int64_t kStepBytes = kFourBit ? kTileRows * 4 : kStep * kColumnBytes;

  HWY_INLINE void SetGroup(const PackedPart& part, const uint8_t* block) {
    codes = block + part.header_bytes;
    for (int v = 0; v < kVecs; ++v) {
      if constexpr (kFourBit || kCoding == Coding::kInt8) scale[v] = LoadParams(part, block, 0, v);
      if constexpr (kCoding == Coding::kZero || kCoding == Coding::kOffset) {
        second[v] = LoadParams(part, block, 1, v);
      }
    }
  }

  HWY_INLINE void Load(int64_t step) {
    column = codes + step * kStepBytes;
    if constexpr (kFourBit) {
      for (int v = 0; v < kVecs; ++v) {
        words[v] = hn::LoadU(DU(), reinterpret_cast<const uint32_t*>(column) + v * kLanes);
      }
    }
  }

  HWY_INLINE VF Weights(const CodeTable& table, int v) const {
    const DF df;
    if constexpr (kCoding == Coding::kZero) {
      return hn::Mul(hn::Sub(table.Get(words[v]), second[v]), scale[v]);
    } else if constexpr (kCoding == Coding::kOffset) {
      return hn::MulAdd(table.Get(words[v]), scale[v], second[v]);
    } else if constexpr (kCoding == Coding::kTable) {
      return hn::Mul(table.Get(words[v]), scale[v]);
    } else if constexpr (kCoding == Coding::kInt8) {
      const hn::Rebind<int8_t, DF> d8;
      const auto bytes = hn::LoadU(d8, reinterpret_cast<const int8_t*>(column) + v * kLanes);
      return hn::Mul(hn::ConvertTo(df, hn::PromoteTo(DI(), bytes)), scale[v]);
    } else if constexpr (kCoding == Coding::kF16) {
      const hn::Rebind<hwy::float16_t, DF> dh;
      return hn::PromoteTo(
          df, hn::LoadU(dh, reinterpret_cast<const hwy::float16_t*>(column) + v * kLanes));
    } else if constexpr (kCoding == Coding::kBF16) {
      const hn::Rebind<uint16_t, DF> du16;
      const auto bits = hn::LoadU(du16, reinterpret_cast<const uint16_t*>(column) + v * kLanes);
      return hn::BitCast(df, hn::ShiftLeft<16>(hn::PromoteTo(DU(), bits)));
    } else {
      return hn::LoadU(df, reinterpret_cast<const float*>(column) + v * kLanes);
    }
  }

  HWY_INLINE void Advance() {
    if constexpr (kFourBit) {
      for (int v = 0; v < kVecs; ++v) words[v] = hn::ShiftRight<4>(words[v]);
    } else {
      column += kColumnBytes;
    }
  }

  VF scale[kVecs], second[kVecs];  // second: zero or offset
  VU words[kVecs];
  const uint8_t* codes = nullptr;
  const uint8_t* column = nullptr;
};

// Calls function.template operator()<Coding>() for the coding of the part.
template <class Function>
HWY_INLINE void WithCoding(const PackedPart& part, const Function& function) {
  switch (part.format) {
    case QuantFormat::kInt4Zero:
      return function.template operator()<Coding::kZero>();
    case QuantFormat::kInt4Offset:
      return function.template operator()<Coding::kOffset>();
    case QuantFormat::kTable4:
      return function.template operator()<Coding::kTable>();
    case QuantFormat::kInt8:
      return function.template operator()<Coding::kInt8>();
    case QuantFormat::kPlain:
      break;
  }
  if (part.plain_dtype == DType::kF16) return function.template operator()<Coding::kF16>();
  if (part.plain_dtype == DType::kBF16) return function.template operator()<Coding::kBF16>();
  function.template operator()<Coding::kF32>();
}

}  // namespace HWY_NAMESPACE
}  // namespace sluice
HWY_AFTER_NAMESPACE();
#endif
