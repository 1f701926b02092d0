#include "kernels/cpu/pack.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/core/check.h"
#include "kernels/core/status_macros.h"

namespace sluice {
namespace {

constexpr int64_t kAlignment = 64;
constexpr int64_t kCodesPerWord = 8;
constexpr int64_t kWordBytes = kTileRows * 4;

int64_t RoundUp(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

bool IsFourBit(QuantFormat format) {
  return format == QuantFormat::kInt4Zero || format == QuantFormat::kInt4Offset ||
         format == QuantFormat::kTable4;
}

// Floats of the header per row.
int64_t ParamsPerRow(QuantFormat format) {
  switch (format) {
    case QuantFormat::kPlain:
      return 0;
    case QuantFormat::kTable4:
    case QuantFormat::kInt8:
      return 1;
    case QuantFormat::kInt4Zero:
    case QuantFormat::kInt4Offset:
      return 2;
  }
  return 0;
}

int64_t CodeBytes(const PackedPart& part, int64_t columns) {
  if (IsFourBit(part.format)) return RoundUp(columns, kCodesPerWord) / kCodesPerWord * kWordBytes;
  const auto element =
      part.format == QuantFormat::kInt8 ? 1 : static_cast<int64_t>(SizeOf(part.plain_dtype));
  return columns * element * kTileRows;
}

bool IsExactInHalf(DType dtype, const uint8_t* values, int64_t count) {
  if (dtype == DType::kF16) return true;
  for (int64_t i = 0; i < count; ++i) {
    float value;
    ToFloat(dtype, values + i * static_cast<int64_t>(SizeOf(dtype)), 1, &value);
    if (HalfToFloat(FloatToHalf(value)) != value) return false;
  }
  return true;
}

// Everything of a part but its place in memory.
PackedPart Layout(const QuantizedMatrix& source, int64_t n_begin) {
  const QuantSpec& spec = source.spec;
  PackedPart part;
  part.format = spec.format;
  part.plain_dtype = spec.plain_dtype;
  part.n_begin = n_begin;
  part.n = spec.n;
  part.k = spec.k;
  const bool plain = spec.format == QuantFormat::kPlain;
  part.group_size = plain ? spec.k : spec.group_size;
  part.groups = plain ? 1 : spec.groups();
  part.tiles = RoundUp(spec.n, kTileRows) / kTileRows;
  const int64_t scaled = spec.n * part.groups;
  part.half_params = !plain && IsExactInHalf(spec.scale_dtype, source.scales(), scaled) &&
                     (spec.format != QuantFormat::kInt4Offset ||
                      IsExactInHalf(spec.scale_dtype, source.offsets(), scaled));
  const int64_t param_bytes = part.half_params ? 2 : 4;
  part.header_bytes = RoundUp(ParamsPerRow(spec.format) * kTileRows * param_bytes, kAlignment);
  part.block_bytes = RoundUp(part.header_bytes + CodeBytes(part, part.group_size), kAlignment);
  const int64_t last = part.Columns(part.groups - 1);
  part.tile_bytes = (part.groups - 1) * part.block_bytes +
                    RoundUp(part.header_bytes + CodeBytes(part, last), kAlignment);
  for (int i = 0; i < 16; ++i) part.table[i] = static_cast<float>(i);
  if (spec.format == QuantFormat::kTable4) std::memcpy(part.table.data(), source.table(), 64);
  return part;
}

void WriteParam(const PackedPart& part, uint8_t* params, int64_t index, float value) {
  if (part.half_params) {
    const uint16_t half = FloatToHalf(value);
    std::memcpy(params + 2 * index, &half, sizeof(half));
  } else {
    std::memcpy(params + 4 * index, &value, sizeof(value));
  }
}

float ReadParam(const PackedPart& part, const uint8_t* params, int64_t index) {
  float value;
  ToFloat(part.half_params ? DType::kF16 : DType::kF32, params + index * (part.half_params ? 2 : 4),
          1, &value);
  return value;
}

// Scale, and zero or offset, of row `row` of the source into lane `lane` of a header.
void PackParams(const QuantizedMatrix& source, const PackedPart& part, int64_t row, int64_t group,
                uint8_t* header) {
  const DType dtype = source.spec.scale_dtype;
  const int64_t index = row * part.groups + group;
  const int64_t lane = row % kTileRows;
  float value;
  ToFloat(dtype, source.scales() + index * static_cast<int64_t>(SizeOf(dtype)), 1, &value);
  WriteParam(part, header, lane, value);
  if (part.format == QuantFormat::kInt4Zero) {
    WriteParam(part, header, kTileRows + lane, source.zeros()[index]);
  } else if (part.format == QuantFormat::kInt4Offset) {
    ToFloat(dtype, source.offsets() + index * static_cast<int64_t>(SizeOf(dtype)), 1, &value);
    WriteParam(part, header, kTileRows + lane, value);
  }
}

// Up to 8 codes of a canonical row from column `begin`, the first in the lowest bits.
uint32_t ReadWord(const uint8_t* row, int64_t begin, int64_t count) {
  uint32_t word = 0;
  if (begin % 2 == 0 && count == kCodesPerWord) {
    std::memcpy(&word, row + begin / 2,
                sizeof(word));  // The canonical order of nibbles, little-endian
    return word;
  }
  for (int64_t j = 0; j < count; ++j) {
    const uint8_t byte = row[(begin + j) / 2];
    word |= static_cast<uint32_t>((begin + j) % 2 == 0 ? byte & 15 : byte >> 4) << (4 * j);
  }
  return word;
}

void PackCodes(const QuantizedMatrix& source, const PackedPart& part, int64_t row, int64_t group,
               uint8_t* codes) {
  const int64_t begin = group * part.group_size;
  const int64_t columns = part.Columns(group);
  const int64_t lane = row % kTileRows;
  if (IsFourBit(part.format)) {
    const uint8_t* source_row = source.codes() + row * ((part.k + 1) / 2);
    for (int64_t i = 0; i < columns; i += kCodesPerWord) {
      const uint32_t word = ReadWord(source_row, begin + i, std::min(kCodesPerWord, columns - i));
      std::memcpy(codes + i / kCodesPerWord * kWordBytes + lane * 4, &word, sizeof(word));
    }
    return;
  }
  const int64_t element =
      part.format == QuantFormat::kInt8 ? 1 : static_cast<int64_t>(SizeOf(part.plain_dtype));
  const uint8_t* source_row = source.codes() + (row * part.k + begin) * element;
  for (int64_t i = 0; i < columns; ++i) {
    std::memcpy(codes + (i * kTileRows + lane) * element, source_row + i * element, element);
  }
}

void PackPart(const QuantizedMatrix& source, const PackedPart& part, uint8_t* data) {
  for (int64_t row = 0; row < part.n; ++row) {
    for (int64_t group = 0; group < part.groups; ++group) {
      uint8_t* block = data + row / kTileRows * part.tile_bytes + group * part.block_bytes;
      if (part.format != QuantFormat::kPlain) PackParams(source, part, row, group, block);
      PackCodes(source, part, row, group, block + part.header_bytes);
    }
  }
}

absl::Status CheckStack(absl::Span<const QuantizedMatrix* const> stacked) {
  if (stacked.empty()) return absl::InvalidArgumentError("no matrix to upload");
  for (const QuantizedMatrix* matrix : stacked) {
    SLUICE_RETURN_IF_ERROR(CheckSpec(matrix->spec));
    if (matrix->planes.size() < SizesOf(matrix->spec).total()) {
      return absl::InvalidArgumentError(absl::StrCat("planes of ", matrix->planes.size(),
                                                     " bytes; their spec needs ",
                                                     SizesOf(matrix->spec).total()));
    }
    if (matrix->spec.k != stacked[0]->spec.k) {
      return absl::InvalidArgumentError(absl::StrCat("matrices with ", stacked[0]->spec.k, " and ",
                                                     matrix->spec.k,
                                                     " input features cannot share one input"));
    }
  }
  return absl::OkStatus();
}

// Part i > 0 with the perm of part i - 1 shares its copy, so that both work on one gathered input.
bool SharesPerm(absl::Span<const QuantizedMatrix* const> stacked, size_t i) {
  return i > 0 && stacked[i - 1]->spec.has_perm &&
         std::memcmp(stacked[i - 1]->perm(), stacked[i]->perm(),
                     stacked[i]->spec.k * sizeof(int32_t)) == 0;
}

}  // namespace

absl::StatusOr<std::unique_ptr<CpuPackedMatrix>> Pack(
    absl::Span<const QuantizedMatrix* const> stacked) {
  SLUICE_RETURN_IF_ERROR(CheckStack(stacked));
  std::vector<PackedPart> parts;
  int64_t n = 0;
  int64_t bytes = 0;
  for (const QuantizedMatrix* matrix : stacked) {
    parts.push_back(Layout(*matrix, n));
    n += matrix->spec.n;
    bytes += parts.back().tiles * parts.back().tile_bytes;
    if (matrix->spec.has_perm) bytes += RoundUp(matrix->spec.k * sizeof(int32_t), kAlignment);
  }
  SLUICE_ASSIGN_OR_RETURN(HostMemory memory, HostMemory::Allocate(bytes));
  uint8_t* next = memory.data();
  for (size_t i = 0; i < parts.size(); ++i) {
    PackPart(*stacked[i], parts[i], next);
    parts[i].data = next;
    next += parts[i].tiles * parts[i].tile_bytes;
    if (!stacked[i]->spec.has_perm) continue;
    if (SharesPerm(stacked, i)) {
      parts[i].perm = parts[i - 1].perm;
      continue;
    }
    std::memcpy(next, stacked[i]->perm(), parts[i].k * sizeof(int32_t));
    parts[i].perm = reinterpret_cast<const int32_t*>(next);
    next += RoundUp(parts[i].k * sizeof(int32_t), kAlignment);
  }
  return std::make_unique<CpuPackedMatrix>(n, stacked[0]->spec.k, std::move(parts),
                                           std::move(memory));
}

namespace {

// Element of row `lane` of a block at column `column` of its group.
float UnpackOne(const PackedPart& part, const uint8_t* block, int64_t lane, int64_t column) {
  const uint8_t* codes = block + part.header_bytes;
  if (part.format == QuantFormat::kPlain) {
    float value;
    ToFloat(part.plain_dtype,
            codes + (column * kTileRows + lane) * static_cast<int64_t>(SizeOf(part.plain_dtype)), 1,
            &value);
    return value;
  }
  const float scale = ReadParam(part, block, lane);
  if (part.format == QuantFormat::kInt8) {
    return scale * static_cast<float>(static_cast<int8_t>(codes[column * kTileRows + lane]));
  }
  uint32_t word;
  std::memcpy(&word, codes + column / kCodesPerWord * kWordBytes + lane * 4, sizeof(word));
  const float code = part.table[(word >> (4 * (column % kCodesPerWord))) & 15];
  if (part.format == QuantFormat::kInt4Zero)
    return scale * (code - ReadParam(part, block, kTileRows + lane));
  if (part.format == QuantFormat::kInt4Offset)
    return scale * code + ReadParam(part, block, kTileRows + lane);
  return code * scale;
}

}  // namespace

void UnpackRow(const CpuPackedMatrix& matrix, int64_t row, float* out) {
  SLUICE_CHECK(row >= 0 && row < matrix.n()) << row;
  size_t i = 0;
  while (row >= matrix.parts()[i].n_begin + matrix.parts()[i].n) ++i;
  const PackedPart& part = matrix.parts()[i];
  const int64_t in_part = row - part.n_begin;
  for (int64_t column = 0; column < part.k; ++column) {
    const int64_t group = column / part.group_size;
    const uint8_t* block = part.Block(in_part / kTileRows, group);
    const float value =
        UnpackOne(part, block, in_part % kTileRows, column - group * part.group_size);
    out[part.perm == nullptr ? column : part.perm[column]] = value;
  }
}

}  // namespace sluice
