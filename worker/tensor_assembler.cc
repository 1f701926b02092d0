#include "worker/tensor_assembler.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/core/status_macros.h"
#include "services/rpc/crc32c.h"

namespace sluice::worker {
namespace {

constexpr uint64_t kMaxDimension = std::numeric_limits<int64_t>::max();

absl::Status Annotated(const std::string& name, const absl::Status& status) {
  return absl::Status(status.code(),
                      absl::StrCat("tensor ", name, ": ", std::string(status.message())));
}

}  // namespace

absl::StatusOr<QuantSpec> SpecFromProto(const internal::v1::TensorSpec& spec) {
  const auto bad = [&](const char* field, uint64_t value) {
    return absl::InvalidArgumentError(absl::StrCat("tensor ", spec.name(), ": TensorSpec.", field,
                                                   " = ", value,
                                                   " is unknown; are loader and worker of one "
                                                   "version?"));
  };
  if (spec.format() > static_cast<uint32_t>(QuantFormat::kInt8)) {
    return bad("format", spec.format());
  }
  if (spec.plain_dtype() > static_cast<uint32_t>(DType::kU8)) {
    return bad("plain_dtype", spec.plain_dtype());
  }
  if (spec.scale_dtype() > static_cast<uint32_t>(DType::kU8)) {
    return bad("scale_dtype", spec.scale_dtype());
  }
  if (spec.n() > kMaxDimension || spec.k() > kMaxDimension || spec.group_size() > kMaxDimension) {
    return bad("n, k or group_size", std::max({spec.n(), spec.k(), spec.group_size()}));
  }
  QuantSpec result;
  result.format = static_cast<QuantFormat>(spec.format());
  result.plain_dtype = static_cast<DType>(spec.plain_dtype());
  result.scale_dtype = static_cast<DType>(spec.scale_dtype());
  result.n = static_cast<int64_t>(spec.n());
  result.k = static_cast<int64_t>(spec.k());
  result.group_size = static_cast<int64_t>(spec.group_size());
  result.has_perm = spec.has_perm();
  if (absl::Status status = CheckSpec(result); !status.ok()) {
    return Annotated(spec.name(), status);
  }
  const uint64_t bytes = SizesOf(result).total();
  if (bytes != spec.bytes()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "tensor ", spec.name(), ": TensorSpec.bytes = ", spec.bytes(), ", its form takes ", bytes));
  }
  return result;
}

TensorAssembler::TensorAssembler(uint64_t max_tensor_bytes, Deliver deliver)
    : max_tensor_bytes_(max_tensor_bytes), deliver_(std::move(deliver)) {}

absl::Status TensorAssembler::Begin(const internal::v1::FetchResponse& part) {
  if (!part.has_spec() || part.spec().name() != part.name()) {
    return absl::InvalidArgumentError(
        absl::StrCat("tensor ", part.name(), ": part 0 comes without its TensorSpec"));
  }
  SLUICE_ASSIGN_OR_RETURN(const QuantSpec spec, SpecFromProto(part.spec()));
  if (part.spec().bytes() > max_tensor_bytes_) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "tensor ", part.name(), " takes ", part.spec().bytes(), " bytes, this worker may use ",
        max_tensor_bytes_, "; give it more with --memory"));
  }
  tensor_ = QuantizedMatrix(spec);
  name_ = part.name();
  whole_ = false;
  next_part_ = 0;
  received_ = 0;
  return absl::OkStatus();
}

absl::Status TensorAssembler::Add(const internal::v1::FetchResponse& part) {
  if (whole_ && part.name() == name_ && part.part() + 1 == next_part_) {
    return absl::OkStatus();  // Comes again after a resume between two tensors
  }
  if (name_.empty() || whole_) {
    if (part.part() != 0) {
      return absl::DataLossError(
          absl::StrCat("tensor ", part.name(), " begins with part ", part.part()));
    }
    SLUICE_RETURN_IF_ERROR(Begin(part));
  }
  const std::string& data = part.data();
  if (part.name() != name_ || part.part() != next_part_ || part.offset() != received_ ||
      data.size() > tensor_.planes.size() - received_) {
    return absl::DataLossError(absl::StrCat("tensor ", part.name(), " part ", part.part(), " at ",
                                            part.offset(), " came where ", name_, " part ",
                                            next_part_, " at ", received_, " was due"));
  }
  if (rpc::Crc32c(data.data(), data.size()) != part.crc32c()) {
    return absl::DataLossError(
        absl::StrCat("tensor ", name_, " part ", next_part_, ": crc32c does not match"));
  }
  if (!data.empty()) {
    std::memcpy(tensor_.planes.data() + received_, data.data(), data.size());
  }
  received_ += data.size();
  bytes_done_ += data.size();
  ++next_part_;
  if (!part.last()) {
    return absl::OkStatus();
  }
  if (received_ != tensor_.planes.size()) {
    return absl::InvalidArgumentError(absl::StrCat("tensor ", name_, " ends after ", received_,
                                                   " of ", tensor_.planes.size(), " bytes"));
  }
  whole_ = true;
  QuantizedMatrix tensor = std::move(tensor_);
  tensor_ = QuantizedMatrix();
  if (absl::Status status = CheckValues(tensor); !status.ok()) {
    return Annotated(name_, status);
  }
  return deliver_(name_, std::move(tensor));
}

absl::Status TensorAssembler::Finish() const {
  if (!name_.empty() && !whole_) {
    return absl::DataLossError(
        absl::StrCat("the stream ended within tensor ", name_, " before part ", next_part_));
  }
  return absl::OkStatus();
}

}  // namespace sluice::worker
