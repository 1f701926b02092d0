#include "services/checkpoint/format.h"

#include <cmath>
#include <cstring>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/core/status_macros.h"

namespace sluice::checkpoint {

absl::Status TensorReader::ReadPlain(uint64_t, uint64_t, uint8_t*) const {
  return absl::InvalidArgumentError("the tensor is quantized and can only be read in one piece");
}

absl::Status CheckStored(const StoredTensor& tensor, const std::string& dtype, const Shape& shape) {
  if (tensor.dtype.name == dtype && tensor.shape == shape) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(tensor.file->name(), ": tensor ", tensor.name, " is ", tensor.dtype.name, " ",
                   ShapeText(tensor.shape), ", the configuration asks for ", dtype, " ",
                   ShapeText(shape), "; config.json and weights do not belong together"));
}

absl::Status ReadStored(const StoredTensor& tensor, void* out) {
  return tensor.file->ReadAt(tensor.offset, tensor.bytes, out);
}

absl::Status ReadStoredAt(const StoredTensor& tensor, uint64_t offset, uint64_t size, void* out) {
  if (offset > tensor.bytes || size > tensor.bytes - offset) {
    return absl::InvalidArgumentError(
        absl::StrCat(tensor.name, ": bytes ", offset, " + ", size, " of ", tensor.bytes));
  }
  return tensor.file->ReadAt(tensor.offset + offset, size, out);
}

absl::Status CheckFinitePlain(DType dtype, const uint8_t* data, uint64_t bytes, uint64_t index) {
  const uint64_t count = bytes / SizeOf(dtype);
  bool finite = true;  // All exponent bits set: NaN or infinity. No early exit, so that the loop is
                       // vectorized.
  if (dtype == DType::kF32) {
    for (uint64_t i = 0; i < count; ++i) {
      uint32_t bits;
      std::memcpy(&bits, data + 4 * i, sizeof(bits));
      finite &= (bits & 0x7F800000U) != 0x7F800000U;
    }
  } else {
    const uint16_t exponent = dtype == DType::kF16 ? 0x7C00 : 0x7F80;
    for (uint64_t i = 0; i < count; ++i) {
      uint16_t bits;
      std::memcpy(&bits, data + 2 * i, sizeof(bits));
      finite &= (bits & exponent) != exponent;
    }
  }
  if (finite) return absl::OkStatus();
  for (uint64_t i = 0; i < count; ++i) {
    float value;
    ToFloat(dtype, data + i * SizeOf(dtype), 1, &value);
    if (!std::isfinite(value)) {
      return absl::InvalidArgumentError(
          absl::StrCat("element ", index + i, " is not finite; the weights are damaged"));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<StoredTensor> FindPart(const TensorRequest& request, const char* part) {
  const StoredTensor* found = request.set->Find(request.base + part);
  if (found != nullptr) return *found;
  return absl::InvalidArgumentError(absl::StrCat(
      "tensor ", request.base, part, " is missing; quantize or download the model again"));
}

absl::Status CheckUnusedBias(const StoredTensor* bias) {
  if (bias == nullptr) return absl::OkStatus();
  std::vector<uint8_t> bytes(bias->bytes);
  SLUICE_RETURN_IF_ERROR(ReadStored(*bias, bytes.data()));
  const size_t width = bias->dtype.block_bytes;
  for (size_t i = 0; i < bytes.size(); ++i) {
    // The last byte of a float holds its sign: -0 is a zero, too.
    if ((i % width == width - 1 ? bytes[i] & 0x7F : bytes[i]) == 0) continue;
    return absl::InvalidArgumentError(
        absl::StrCat(bias->file->name(), ": tensor ", bias->name,
                     " holds a bias that the architecture has not; set attention_bias or mlp_bias "
                     "in config.json if it belongs to the model"));
  }
  return absl::OkStatus();
}

}  // namespace sluice::checkpoint
