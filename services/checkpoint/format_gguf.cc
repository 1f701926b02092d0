// Tensors of GGUF files. Quantized types come in blocks of 32 along a row:
//
//   Q4_0  18 bytes  fp16 d, 16 bytes of codes        w = d * (q - 8)
//   Q4_1  20 bytes  fp16 d, fp16 m, 16 bytes         w = d * q + m
//   Q8_0  34 bytes  fp16 d, 32 int8                  w = d * q
//
// Code byte j holds element j in its low nibble and element j + 16 in its high one.
// For architecture llama the rows of q and k are stored [head, pair, half] for rope on adjacent
// pairs; Hugging Face's order is [head, half, pair].
#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/core/status_macros.h"
#include "services/checkpoint/format.h"

namespace sluice::checkpoint {
namespace {

constexpr int64_t kBlock = 32;

// The row of the file that holds row `row` of the canonical tensor.
int64_t SourceRow(int64_t row, int64_t rows_per_head) {
  if (rows_per_head == 0) return row;
  const int64_t pairs = rows_per_head / 2;
  const int64_t head = row / rows_per_head, half = row % rows_per_head / pairs, pair = row % pairs;
  return head * rows_per_head + pair * 2 + half;
}

// The inverse of SourceRow.
int64_t CanonicalRow(int64_t row, int64_t rows_per_head) {
  if (rows_per_head == 0) return row;
  const int64_t pairs = rows_per_head / 2;
  const int64_t head = row / rows_per_head, pair = row % rows_per_head / 2, half = row % 2;
  return head * rows_per_head + half * pairs + pair;
}

// 16 code bytes of a block, halves apart, to 16 canonical bytes, neighbours together.
void ReorderNibbles(const uint8_t* from, uint8_t* to) {
  for (int i = 0; i < 8; ++i) {
    to[i] = static_cast<uint8_t>((from[2 * i] & 15) | (from[2 * i + 1] & 15) << 4);
    to[i + 8] = static_cast<uint8_t>(from[2 * i] >> 4 | (from[2 * i + 1] & 0xF0));
  }
}

class GgufPlainReader : public TensorReader {
 public:
  GgufPlainReader(const QuantSpec& spec, const File& file, uint64_t offset, int64_t rows_per_head)
      : TensorReader(spec), file_(file), offset_(offset), rows_per_head_(rows_per_head) {}

  absl::StatusOr<QuantizedMatrix> Read() const override {
    QuantizedMatrix matrix(spec());
    SLUICE_RETURN_IF_ERROR(ReadPlain(0, matrix.planes.size(), matrix.codes()));
    return matrix;
  }

  absl::Status ReadPlain(uint64_t offset, uint64_t size, uint8_t* out) const override {
    const uint64_t total = SizesOf(spec()).total();
    if (offset > total || size > total - offset) {
      return absl::InvalidArgumentError(absl::StrCat("bytes ", offset, " + ", size, " of ", total));
    }
    // A vector (a bias of q or k) is permuted by element, a matrix by row.
    const bool vector = spec().n == 1;
    const uint64_t row_bytes = total / static_cast<uint64_t>(vector ? spec().k : spec().n);
    const uint64_t step = rows_per_head_ == 0 ? std::max<uint64_t>(size, 1) : row_bytes;
    for (uint64_t done = 0; done < size;) {
      const uint64_t at = offset + done;
      const uint64_t inside = rows_per_head_ == 0 ? 0 : at % row_bytes;
      const uint64_t part = std::min(step - inside, size - done);
      uint64_t from = at;
      if (rows_per_head_ != 0) {
        const auto row = static_cast<int64_t>(at / row_bytes);
        from = static_cast<uint64_t>(SourceRow(row, rows_per_head_)) * row_bytes + inside;
      }
      SLUICE_RETURN_IF_ERROR(file_.ReadAt(offset_ + from, part, out + done));
      done += part;
    }
    const uint64_t width = SizeOf(spec().plain_dtype);
    const uint64_t skip = (width - offset % width) % width;
    if (size <= skip) return absl::OkStatus();
    return CheckFinitePlain(spec().plain_dtype, out + skip, size - skip, (offset + skip) / width);
  }

 private:
  const File& file_;
  const uint64_t offset_;
  const int64_t rows_per_head_;  // 0: rows are in order.
};

class GgufBlockReader : public TensorReader {
 public:
  GgufBlockReader(const QuantSpec& spec, const File& file, const GgufTensor& tensor,
                  int64_t rows_per_head)
      : TensorReader(spec),
        file_(file),
        offset_(tensor.offset),
        block_bytes_(tensor.dtype.block_bytes),
        rows_per_head_(rows_per_head) {}

  absl::StatusOr<QuantizedMatrix> Read() const override {
    QuantizedMatrix matrix(spec());
    const auto rows = static_cast<uint64_t>(spec().n);
    const uint64_t row_bytes = static_cast<uint64_t>(spec().k / kBlock) * block_bytes_;
    const uint64_t slab = std::clamp<uint64_t>(kSlabBytes / row_bytes, 1, rows);
    std::vector<uint8_t> source(slab * row_bytes);
    for (uint64_t first = 0; first < rows; first += slab) {
      const uint64_t count = std::min(slab, rows - first);
      SLUICE_RETURN_IF_ERROR(
          file_.ReadAt(offset_ + first * row_bytes, count * row_bytes, source.data()));
      for (uint64_t i = 0; i < count; ++i) {
        const int64_t row = CanonicalRow(static_cast<int64_t>(first + i), rows_per_head_);
        ConvertRow(source.data() + i * row_bytes, row, &matrix);
      }
    }
    SLUICE_RETURN_IF_ERROR(CheckValues(matrix));
    return matrix;
  }

 private:
  void ConvertRow(const uint8_t* source, int64_t row, QuantizedMatrix* matrix) const {
    const int64_t blocks = spec().k / kBlock;
    const bool eight_bit = spec().format == QuantFormat::kInt8;
    const bool offsets = spec().format == QuantFormat::kInt4Offset;
    const int64_t code_bytes = eight_bit ? kBlock : kBlock / 2;
    for (int64_t b = 0; b < blocks; ++b, source += block_bytes_) {
      const int64_t group = row * blocks + b;
      std::memcpy(matrix->scales() + 2 * group, source, 2);
      if (offsets) std::memcpy(matrix->offsets() + 2 * group, source + 2, 2);
      if (spec().format == QuantFormat::kInt4Zero) matrix->zeros()[group] = 8;
      const uint8_t* codes = source + (offsets ? 4 : 2);
      uint8_t* to = matrix->codes() + group * code_bytes;
      eight_bit ? static_cast<void>(std::memcpy(to, codes, kBlock)) : ReorderNibbles(codes, to);
    }
  }

  const File& file_;
  const uint64_t offset_;
  const uint64_t block_bytes_;
  const int64_t rows_per_head_;
};

QuantFormat FormatOf(const SourceDType& dtype) {
  if (dtype.name == "Q4_0") return QuantFormat::kInt4Zero;
  if (dtype.name == "Q4_1") return QuantFormat::kInt4Offset;
  return QuantFormat::kInt8;
}

}  // namespace

TensorReaderOr MakeGgufReader(const GgufFile& gguf, const GgufTensor& tensor,
                              const ExpectedTensor& expected, uint32_t heads) {
  const auto n = static_cast<uint64_t>(expected.n), k = static_cast<uint64_t>(expected.k);
  const bool vector = expected.role == TensorRole::kVector;
  const Shape shape = vector ? Shape{k} : Shape{n, k};
  if (tensor.shape != shape) {
    return absl::InvalidArgumentError(absl::StrCat(
        gguf.file().name(), ": tensor ", tensor.name, " is ", ShapeText(tensor.shape),
        ", the file's own keys ask for ", ShapeText(shape), "; convert the model again"));
  }
  QuantSpec spec;
  spec.n = expected.n;
  spec.k = expected.k;
  const int64_t rows_per_head = heads == 0 ? 0 : (vector ? expected.k : expected.n) / heads;
  const std::optional<DType> dtype = FloatDType(tensor.dtype);
  if (dtype.has_value()) {
    spec.plain_dtype = *dtype;
    SLUICE_RETURN_IF_ERROR(CheckSpec(spec));
    return std::make_unique<GgufPlainReader>(spec, gguf.file(), tensor.offset, rows_per_head);
  }
  if (vector) {
    return absl::UnimplementedError(absl::StrCat(gguf.file().name(), ": tensor ", tensor.name,
                                                 " is a vector of ", tensor.dtype.name,
                                                 ", which is not supported; keep it in F32"));
  }
  spec.format = FormatOf(tensor.dtype);
  spec.scale_dtype = DType::kF16;
  spec.group_size = kBlock;
  SLUICE_RETURN_IF_ERROR(CheckSpec(spec));
  return std::make_unique<GgufBlockReader>(spec, gguf.file(), tensor, rows_per_head);
}

}  // namespace sluice::checkpoint
