// Plain tensors of safetensors files: elements are served as they are, after a look that all are
// finite.
#include <memory>

#include "absl/strings/str_cat.h"
#include "kernels/core/status_macros.h"
#include "services/checkpoint/format.h"

namespace sluice::checkpoint {
namespace {

class PlainReader : public TensorReader {
 public:
  PlainReader(const QuantSpec& spec, const StoredTensor& tensor)
      : TensorReader(spec), tensor_(tensor) {}

  absl::StatusOr<QuantizedMatrix> Read() const override {
    QuantizedMatrix matrix(spec());
    SLUICE_RETURN_IF_ERROR(ReadPlain(0, tensor_.bytes, matrix.codes()));
    return matrix;
  }

  absl::Status ReadPlain(uint64_t offset, uint64_t size, uint8_t* out) const override {
    const uint64_t width = SizeOf(spec().plain_dtype);
    SLUICE_RETURN_IF_ERROR(ReadStoredAt(tensor_, offset, size, out));
    const uint64_t skip = (width - offset % width) % width;  // To the first whole element.
    if (size <= skip) return absl::OkStatus();
    return CheckFinitePlain(spec().plain_dtype, out + skip, size - skip, (offset + skip) / width);
  }

 private:
  const StoredTensor tensor_;
};

}  // namespace

TensorReaderOr MakePlainReader(const TensorRequest& request) {
  const ExpectedTensor& expected = request.expected;
  const StoredTensor* tensor = request.set->Find(request.base);
  if (tensor == nullptr) {
    return absl::InvalidArgumentError(
        absl::StrCat("tensor ", request.base, " is missing; config.json asks for it"));
  }
  const std::optional<DType> dtype = FloatDType(tensor->dtype);
  if (!dtype.has_value()) {
    return absl::UnimplementedError(absl::StrCat(
        tensor->file->name(), ": tensor ", tensor->name, " is ", tensor->dtype.name,
        ", which is not supported here; save the model as float16, bfloat16 or float32"));
  }
  const auto n = static_cast<uint64_t>(expected.n), k = static_cast<uint64_t>(expected.k);
  const Shape shape = expected.role == TensorRole::kVector ? Shape{k} : Shape{n, k};
  SLUICE_RETURN_IF_ERROR(CheckStored(*tensor, tensor->dtype.name, shape));
  QuantSpec spec;
  spec.plain_dtype = *dtype;
  spec.n = expected.n;
  spec.k = expected.k;
  SLUICE_RETURN_IF_ERROR(CheckSpec(spec));
  return std::make_unique<PlainReader>(spec, *tensor);
}

}  // namespace sluice::checkpoint
