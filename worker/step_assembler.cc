#include "worker/step_assembler.h"

#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/core/status_macros.h"
#include "services/rpc/crc32c.h"

namespace sluice::worker {
namespace {

constexpr uint64_t kMaxPieceBytes = 1 << 20;

}  // namespace

absl::Status StepAssembler::Begin(internal::v1::StepFrame* frame) {
  if (!frame->has_header()) {
    return absl::InvalidArgumentError("StepFrame.header: the first piece of a step has none");
  }
  const auto& header = frame->header();
  if (header.epoch() != format_.epoch) {
    return absl::FailedPreconditionError(absl::StrCat("StepHeader.epoch: ", header.epoch(),
                                                      " is not the current epoch ", format_.epoch,
                                                      "; attach to the new plan"));
  }
  uint64_t rows = 0;
  for (const auto& sequence : header.sequences()) {
    rows += sequence.num_tokens();
  }
  if (rows > format_.max_tokens) {
    return absl::InvalidArgumentError(absl::StrCat("StepHeader.sequences: step ", header.step(),
                                                   " has ", rows, " rows, max_batch_tokens is ",
                                                   format_.max_tokens));
  }
  work_.header = std::move(*frame->mutable_header());
  work_.hidden_bytes = format_.has_hidden ? rows * format_.row_bytes : 0;
  work_.hidden_states = std::move(spare_);
  if (work_.hidden_states.size() < work_.hidden_bytes) {
    work_.hidden_states.resize(work_.hidden_bytes);
  }
  received_ = 0;
  begun_ = true;
  return absl::OkStatus();
}

absl::Status StepAssembler::AddBytes(const internal::v1::StepFrame& frame) {
  const std::string& bytes = frame.hidden_states();
  const auto where = [&] { return absl::StrCat("step ", work_.header.step(), ": "); };
  if (frame.offset() != received_) {
    return absl::InvalidArgumentError(absl::StrCat(where(), "StepFrame.offset is ", frame.offset(),
                                                   ", ", received_, " bytes have come"));
  }
  if (bytes.size() > kMaxPieceBytes || bytes.size() > work_.hidden_bytes - received_) {
    return absl::InvalidArgumentError(
        absl::StrCat(where(), "StepFrame.hidden_states has ", bytes.size(), " bytes, at most ",
                     std::min(kMaxPieceBytes, work_.hidden_bytes - received_), " may come here"));
  }
  if (!bytes.empty() && frame.dtype() != static_cast<uint32_t>(format_.dtype)) {
    return absl::InvalidArgumentError(absl::StrCat(where(), "StepFrame.dtype is ", frame.dtype(),
                                                   ", this stage computes in ",
                                                   NameOf(format_.dtype)));
  }
  if (!bytes.empty() && rpc::Crc32c(bytes.data(), bytes.size()) != frame.crc32c()) {
    return absl::DataLossError(absl::StrCat(where(), "StepFrame.crc32c does not match the ",
                                            bytes.size(), " bytes at ", received_));
  }
  if (!bytes.empty()) {
    std::memcpy(work_.hidden_states.data() + received_, bytes.data(), bytes.size());
  }
  received_ += bytes.size();
  return absl::OkStatus();
}

absl::StatusOr<bool> StepAssembler::Add(internal::v1::StepFrame* frame) {
  if (begun_ && frame->has_header()) {
    return absl::InvalidArgumentError(absl::StrCat("StepFrame.header: step ",
                                                   frame->header().step(), " begins before step ",
                                                   work_.header.step(), " is whole"));
  }
  if (!begun_) {
    SLUICE_RETURN_IF_ERROR(Begin(frame));
  }
  SLUICE_RETURN_IF_ERROR(AddBytes(*frame));
  if (!frame->last()) {
    return false;
  }
  if (received_ != work_.hidden_bytes) {
    return absl::InvalidArgumentError(absl::StrCat("step ", work_.header.step(), ": ", received_,
                                                   " bytes of hidden states have come, ",
                                                   work_.hidden_bytes, " are needed"));
  }
  return true;
}

StepWork StepAssembler::Take() {
  begun_ = false;
  return std::move(work_);
}

}  // namespace sluice::worker
