// The stream of a link between workers: frames with hidden states, put together to steps, checked
// and applied to the table of sequences. Input: frames, each after 2 bytes of length; the first byte
// of all says whether checksums are made right, so that mutations get past them.
#include <google/protobuf/stubs/logging.h>

#include "kernels/core/check.h"
#include "services/rpc/crc32c.h"
#include "tests/fuzz/fuzz_target.h"
#include "worker/engine/step_checker.h"
#include "worker/step_assembler.h"

namespace sluice::fuzz {
namespace {

using internal::v1::StepFrame;

constexpr uint64_t kRowBytes = 16;

internal::v1::ShardAssignment Assignment() {
  internal::v1::ShardAssignment assignment;
  assignment.mutable_config()->set_vocab_size(100);
  assignment.set_num_blocks(8);
  assignment.set_block_size(4);
  assignment.set_max_model_len(16);
  assignment.set_max_batch_size(4);
  assignment.set_max_batch_tokens(16);
  assignment.set_has_head(true);
  assignment.set_stage(1);
  assignment.set_stages(2);
  return assignment;
}

void AddFrame(const StepFrame& frame, std::string* out) {
  const std::string bytes = frame.SerializeAsString();
  out->push_back(static_cast<char>(bytes.size() & 0xFF));
  out->push_back(static_cast<char>(bytes.size() >> 8));
  *out += bytes;
}

// A step of one new sequence of two tokens, cut into `pieces`.
std::string Step(uint64_t step, int pieces) {
  StepFrame frame;
  frame.mutable_header()->set_epoch(1);
  frame.mutable_header()->set_step(step);
  auto* slice = frame.mutable_header()->add_sequences();
  slice->set_seq_id(step);
  slice->set_num_tokens(2);
  slice->set_prompt_len(2);
  slice->set_sample(true);
  slice->add_token_ids(5);
  slice->add_token_ids(6);
  slice->add_new_block_ids(static_cast<uint32_t>(step));
  slice->mutable_sampling()->set_top_p(1);
  slice->mutable_sampling()->set_repetition_penalty(1);
  std::string out;
  const uint64_t piece = 2 * kRowBytes / static_cast<uint64_t>(pieces);
  for (int i = 0; i < pieces; ++i) {
    if (i > 0) frame.clear_header();
    frame.set_hidden_states(std::string(piece, static_cast<char>(i + 1)));
    frame.set_offset(piece * static_cast<uint64_t>(i));
    frame.set_dtype(static_cast<uint32_t>(DType::kF32));
    frame.set_crc32c(rpc::Crc32c(frame.hidden_states().data(), frame.hidden_states().size()));
    frame.set_last(i + 1 == pieces);
    AddFrame(frame, &out);
  }
  return out;
}

class Stage {
 public:
  Stage()
      : assembler_({1, true, kRowBytes, DType::kF32, assignment_.max_batch_tokens()}),
        checker_(assignment_, kRowBytes),
        table_({assignment_.num_blocks(), assignment_.block_size(), assignment_.max_model_len(),
                assignment_.has_head()}) {}

  // False ends the stream.
  bool Add(StepFrame* frame) {
    const absl::StatusOr<bool> whole = assembler_.Add(frame);
    if (!whole.ok()) return false;
    if (!*whole) return true;
    worker::StepWork work = assembler_.Take();
    SLUICE_CHECK(work.hidden_states.size() >= work.hidden_bytes);
    if (!checker_.HasInputs(work.header, table_)) return false;
    if (!checker_.Check(work.header, work.hidden_bytes, last_step_, table_).ok()) return false;
    for (const uint64_t id : work.header.released_seq_ids()) table_.Release(id);
    for (const auto& slice : work.header.sequences()) {
      table_.Apply(work.header.step(), slice);
      if (slice.sample()) table_.AddSampled(work.header.step(), slice.seq_id(), 7);
    }
    last_step_ = work.header.step();
    SLUICE_CHECK(table_.free_blocks() <= assignment_.num_blocks());
    assembler_.Recycle(std::move(work.hidden_states));
    return true;
  }

 private:
  const internal::v1::ShardAssignment assignment_ = Assignment();
  worker::StepAssembler assembler_;
  worker::StepChecker checker_;
  worker::SequenceTable table_;
  uint64_t last_step_ = 0;
};

}  // namespace

std::vector<std::string> Seeds() {
  return {'\0' + Step(1, 1), '\1' + Step(1, 2) + Step(2, 1), '\1' + Step(3, 4)};
}

}  // namespace sluice::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace sluice;  // NOLINT(google-build-using-namespace)
  // protobuf would print a line for each string that is no UTF-8.
  [[maybe_unused]] static auto* const before = google::protobuf::SetLogHandler(nullptr);
  if (size == 0) return 0;
  const bool repair = data[0] % 2 == 1;
  fuzz::Stage stage;
  for (size_t at = 1; size - at >= 2;) {
    const size_t length = data[at] | size_t{data[at + 1]} << 8;
    at += 2;
    if (length > size - at) return 0;
    internal::v1::StepFrame frame;
    if (!frame.ParseFromArray(data + at, static_cast<int>(length))) return 0;
    at += length;
    const std::string& bytes = frame.hidden_states();
    if (repair) frame.set_crc32c(rpc::Crc32c(bytes.data(), bytes.size()));
    if (!stage.Add(&frame)) return 0;
  }
  return 0;
}
