// Pieces of steps: what makes a whole one, and what ends the stream.
#include "worker/step_assembler.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "services/rpc/crc32c.h"
#include "tests/worker/fake_engine.h"

namespace sluice::worker {
namespace {

using internal::v1::StepFrame;
using ::testing::HasSubstr;

constexpr uint64_t kEpoch = 5;

StepFormat LinkFormat() {
  StepFormat format;
  format.epoch = kEpoch;
  format.has_hidden = true;
  format.row_bytes = 8;
  format.dtype = DType::kF32;
  format.max_tokens = 4;
  return format;
}

StepFrame Piece(const std::string& bytes, uint64_t offset, bool last) {
  StepFrame frame;
  frame.set_hidden_states(bytes);
  frame.set_offset(offset);
  frame.set_dtype(static_cast<uint32_t>(DType::kF32));
  frame.set_crc32c(rpc::Crc32c(bytes.data(), bytes.size()));
  frame.set_last(last);
  return frame;
}

StepFrame FirstPiece(const std::string& bytes, bool last) {
  StepFrame frame = Piece(bytes, 0, last);
  *frame.mutable_header() = OneSequenceStep(kEpoch, 1, {7, 8});  // 2 rows = 16 bytes
  return frame;
}

// Adds a good first piece of 10 bytes, then `frame`.
absl::Status AddSecond(StepFrame frame) {
  StepAssembler assembler(LinkFormat());
  StepFrame first = FirstPiece("0123456789", false);
  EXPECT_EQ(*assembler.Add(&first), false);
  return assembler.Add(&frame).status();
}

void ExpectError(const absl::Status& status, absl::StatusCode code, const char* text) {
  EXPECT_EQ(status.code(), code) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr(text));
}

TEST(StepAssembler, JoinsPieces) {
  StepAssembler assembler(LinkFormat());
  StepFrame first = FirstPiece("0123456789", false);
  StepFrame second = Piece("abcdef", 10, true);
  EXPECT_EQ(*assembler.Add(&first), false);
  EXPECT_EQ(*assembler.Add(&second), true);
  const StepWork work = assembler.Take();
  EXPECT_EQ(work.header.step(), 1u);
  EXPECT_EQ(std::string(work.hidden_states.begin(), work.hidden_states.end()), "0123456789abcdef");
  EXPECT_EQ(work.hidden_bytes, 16u);
}

TEST(StepAssembler, ReusesALongerBuffer) {
  StepAssembler assembler(LinkFormat());
  assembler.Recycle(std::vector<uint8_t>(100, 'z'));
  StepFrame whole = FirstPiece("0123456789abcdef", true);
  EXPECT_EQ(*assembler.Add(&whole), true);
  const StepWork work = assembler.Take();
  EXPECT_EQ(work.hidden_bytes, 16u);
  EXPECT_EQ(std::string(work.hidden_states.begin(), work.hidden_states.begin() + 16),
            "0123456789abcdef");
}

TEST(StepAssembler, StepsOfTheControllerHaveNoBytes) {
  StepFormat format = LinkFormat();
  format.has_hidden = false;
  StepAssembler assembler(format);
  StepFrame frame;
  *frame.mutable_header() = OneSequenceStep(kEpoch, 1, {7});
  frame.set_last(true);
  EXPECT_EQ(*assembler.Add(&frame), true);
  assembler.Take();
  StepFrame with_bytes = FirstPiece("01234567", true);
  ExpectError(assembler.Add(&with_bytes).status(), absl::StatusCode::kInvalidArgument, "8 bytes");
}

TEST(StepAssembler, ChecksTheHeader) {
  StepAssembler assembler(LinkFormat());
  StepFrame none = Piece("0123456789abcdef", 0, true);
  ExpectError(assembler.Add(&none).status(), absl::StatusCode::kInvalidArgument, "header");
  StepFrame old = FirstPiece("0123456789abcdef", true);
  old.mutable_header()->set_epoch(kEpoch - 1);
  ExpectError(assembler.Add(&old).status(), absl::StatusCode::kFailedPrecondition, "epoch");
  StepFrame large = FirstPiece("", true);
  large.mutable_header()->mutable_sequences(0)->set_num_tokens(0xFFFFFFFF);
  ExpectError(assembler.Add(&large).status(), absl::StatusCode::kInvalidArgument,
              "max_batch_tokens");
  ExpectError(AddSecond(FirstPiece("abcdef", true)), absl::StatusCode::kInvalidArgument,
              "before step 1 is whole");
}

TEST(StepAssembler, ChecksEachPiece) {
  ExpectError(AddSecond(Piece("abcdef", 9, true)), absl::StatusCode::kInvalidArgument, "offset");
  ExpectError(AddSecond(Piece("abcdef", 11, true)), absl::StatusCode::kInvalidArgument, "offset");
  ExpectError(AddSecond(Piece("abcde", 10, true)), absl::StatusCode::kInvalidArgument, "15 bytes");
  ExpectError(AddSecond(Piece("abcdefg", 10, true)), absl::StatusCode::kInvalidArgument,
              "at most 6");
  StepFrame dtype = Piece("abcdef", 10, true);
  dtype.set_dtype(static_cast<uint32_t>(DType::kF16));
  ExpectError(AddSecond(dtype), absl::StatusCode::kInvalidArgument, "float32");
  StepFrame damaged = Piece("abcdef", 10, true);
  (*damaged.mutable_hidden_states())[3] ^= 1;
  ExpectError(AddSecond(damaged), absl::StatusCode::kDataLoss, "crc32c");
}

}  // namespace
}  // namespace sluice::worker
