#include "services/checkpoint/value_check.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace sluice::checkpoint {
namespace {

constexpr size_t kMaxErrors = 20;
constexpr uint64_t kSlabBytes = 16 << 20;
constexpr uint8_t kSymmetricZero = 8;
constexpr uint8_t kLargestZero = 16;  // v1 stores it as 15

class Checker {
 public:
  explicit Checker(const Checkpoint& checkpoint) : checkpoint_(checkpoint) {}

  void Check(int index) {
    const internal::v1::TensorSpec& tensor = checkpoint_.description().tensors(index);
    if (static_cast<QuantFormat>(tensor.format()) == QuantFormat::kPlain) {
      CheckPlain(index, tensor);
    } else {
      CheckQuantized(index, tensor);
    }
  }

  ValueReport Finish() {
    const internal::v1::QuantSummary& quant = checkpoint_.description().quant();
    if (quant.symmetric() && other_zeros_ > 0) {
      report_.warnings.push_back(absl::StrCat("the configuration says symmetric, but ",
                                              other_zeros_, " of ", zeros_,
                                              " zero points are not 8: the stored ones are used"));
    }
    if (!quant.symmetric() && zeros_ > 0 && other_zeros_ == 0) {
      report_.warnings.push_back(
          "the configuration says asymmetric, but every zero point is 8: as good as symmetric");
    }
    if (largest_zeros_ > 0) {
      report_.warnings.push_back(
          absl::StrCat(largest_zeros_,
                       " zero points are 16, stored as 15: readers that keep zero "
                       "points in 4 bits take them as 0, this one does not"));
    }
    return std::move(report_);
  }

 private:
  void Fail(const std::string& error) {
    if (report_.errors.size() < kMaxErrors) {
      report_.errors.push_back(error);
    } else {
      ++report_.more_errors;
    }
  }

  // Reading checks: a value that is not finite is an error that names tensor and element.
  void CheckPlain(int index, const internal::v1::TensorSpec& tensor) {
    for (uint64_t offset = 0; offset < tensor.bytes(); offset += kSlabBytes) {
      slab_.resize(std::min(kSlabBytes, tensor.bytes() - offset));
      const absl::Status status = checkpoint_.ReadPlain(index, offset, slab_.size(), slab_.data());
      if (!status.ok()) return Fail(std::string(status.message()));
    }
  }

  void CheckQuantized(int index, const internal::v1::TensorSpec& tensor) {
    const absl::StatusOr<QuantizedMatrix> matrix = checkpoint_.Read(index);
    if (!matrix.ok()) return Fail(std::string(matrix.status().message()));
    if (const absl::Status status = CheckValues(*matrix); !status.ok()) {
      return Fail(absl::StrCat("tensor ", tensor.name(), ": ", std::string(status.message())));
    }
    const uint64_t count = SizesOf(matrix->spec).zeros;
    const uint8_t* zeros = matrix->zeros();
    zeros_ += count;
    other_zeros_ += count - static_cast<uint64_t>(std::count(zeros, zeros + count, kSymmetricZero));
    largest_zeros_ += static_cast<uint64_t>(std::count(zeros, zeros + count, kLargestZero));
  }

  const Checkpoint& checkpoint_;
  ValueReport report_;
  std::vector<uint8_t> slab_;
  uint64_t zeros_ = 0, other_zeros_ = 0, largest_zeros_ = 0;
};

}  // namespace

ValueReport CheckAllValues(const Checkpoint& checkpoint,
                           const std::function<bool(int)>& on_tensor) {
  Checker checker(checkpoint);
  for (int i = 0; i < checkpoint.description().tensors_size(); ++i) {
    checker.Check(i);
    if (!on_tensor(i + 1)) break;
  }
  return checker.Finish();
}

}  // namespace sluice::checkpoint
