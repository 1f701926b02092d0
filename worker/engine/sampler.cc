#include "worker/engine/sampler.h"

#include <algorithm>

#include "kernels/core/check.h"
#include "kernels/core/status_macros.h"

namespace sluice::worker {
namespace {

using internal::v1::SequenceSlice;
using internal::v1::ShardAssignment;
using internal::v1::StepHeader;
using internal::v1::TokenFrame;

// Fills all but seq_id, token_index and token_id.
void FillScores(const SampledToken& source, int32_t num_logprobs, internal::v1::SampledToken* out) {
  out->set_not_finite(!source.finite);
  if (num_logprobs < 0 || !source.finite) return;
  out->set_logprob(source.logprob);
  for (const TokenLogprob& candidate : source.top) {
    auto* top = out->add_top();
    top->set_token_id(candidate.token_id);
    top->set_logprob(candidate.logprob);
  }
}

// The sequence's tokens up to the sampled row are there: the last token_index of them were sampled
// before.
SamplingRow MakeSamplingRow(int64_t row, const SequenceSlice& slice, const Sequence& sequence) {
  const internal::v1::SamplingParams& params = sequence.sampling;
  const absl::Span<const uint32_t> tokens(sequence.tokens);
  const size_t num_outputs = slice.token_index();
  SamplingRow result;
  result.row = row;
  result.temperature = params.temperature();
  result.top_k = static_cast<int32_t>(params.top_k());
  result.top_p = params.top_p();
  result.min_p = params.min_p();
  result.repetition_penalty = params.repetition_penalty();
  result.presence_penalty = params.presence_penalty();
  result.frequency_penalty = params.frequency_penalty();
  result.seed = params.seed();
  result.choice = params.choice();
  result.token_index = slice.token_index();
  result.num_logprobs = params.num_logprobs();
  result.prompt_ids = tokens.subspan(0, tokens.size() - num_outputs);
  result.output_ids = tokens.subspan(tokens.size() - num_outputs);
  if (slice.token_index() < params.min_tokens()) {
    result.banned_ids = absl::Span<const uint32_t>(
        params.banned_until_min().data(), static_cast<size_t>(params.banned_until_min_size()));
  }
  return result;
}

}  // namespace

Sampler::Sampler(const ShardAssignment& assignment, const Shard* shard, Backend* backend)
    : shard_(shard), backend_(backend), max_logit_rows_(assignment.max_batch_size()) {
  sampling_.reserve(assignment.max_batch_size());
  sampled_.resize(assignment.max_batch_size());
  scored_.reserve(assignment.max_batch_tokens() + ExtraRows(assignment));
  scored_rows_.reserve(assignment.max_batch_size());
}

absl::StatusOr<std::unique_ptr<Sampler>> Sampler::Create(const ShardAssignment& assignment,
                                                         const Shard* shard, Backend* backend) {
  std::unique_ptr<Sampler> sampler(new Sampler(assignment, shard, backend));
  const int64_t vocab = assignment.config().vocab_size();
  const int64_t logits_bytes = sampler->max_logit_rows_ * vocab * int64_t{sizeof(float)};
  SLUICE_ASSIGN_OR_RETURN(sampler->logits_buffer_, backend->Allocate(logits_bytes));
  sampler->logits_ = {.data = sampler->logits_buffer_->data(),
                      .dtype = DType::kF32,
                      .rows = sampler->max_logit_rows_,
                      .cols = vocab,
                      .stride = vocab};
  sampler->bytes_ = static_cast<uint64_t>(logits_bytes);
  if (shard->project_out.weight == nullptr) return sampler;
  const DType dtype = backend->activation_dtype();
  const int64_t rows = assignment.max_batch_tokens() + ExtraRows(assignment);
  const int64_t width = shard->project_out.weight->n();
  const int64_t bytes = rows * width * static_cast<int64_t>(SizeOf(dtype));
  SLUICE_ASSIGN_OR_RETURN(sampler->projected_buffer_, backend->Allocate(bytes));
  sampler->projected_ = {.data = sampler->projected_buffer_->data(),
                         .dtype = dtype,
                         .rows = rows,
                         .cols = width,
                         .stride = width};
  sampler->bytes_ += static_cast<uint64_t>(bytes);
  return sampler;
}

void Sampler::Project(TensorView hidden, int64_t num_rows) {
  if (shard_->project_out.weight == nullptr || num_rows == 0) return;
  backend_->NormMatMul(shard_->final_norm, hidden.Rows(0, num_rows), shard_->project_out,
                       Activation::kNone, projected_.Rows(0, num_rows));
}

void Sampler::ComputeLogits(TensorView hidden, absl::Span<const int64_t> rows) {
  const bool projects = shard_->project_out.weight != nullptr;
  backend_->LmHead(projects ? Norm() : shard_->final_norm, projects ? projected_ : hidden, rows,
                   shard_->head, logits_.Rows(0, static_cast<int64_t>(rows.size())));
}

void Sampler::Run(const StepHeader& header, absl::Span<Sequence* const> sequences,
                  absl::Span<const int64_t> sampled_rows, TensorView hidden, int64_t num_rows,
                  TokenFrame* frame) {
  sampled_rows_ = sampled_rows;
  CollectRows(header, sequences, hidden, num_rows, frame);
  if (sampled_rows_.empty() && scored_.empty()) return;
  const auto head = [&] {
    Project(hidden, used_rows_);
    if (!sampled_rows_.empty()) ComputeLogits(hidden, sampled_rows_);
  };
  if (scored_.empty()) {
    backend_->Run(StepPart::kHead, head);
  } else {
    head();
  }
  if (!sampled_rows_.empty()) SampleRows(header, sequences, frame);
  if (!scored_.empty()) ScoreRows(hidden);
}

void Sampler::CollectRows(const StepHeader& header, absl::Span<Sequence* const> sequences,
                          TensorView hidden, int64_t num_rows, TokenFrame* frame) {
  sampling_.clear();
  scored_.clear();
  used_rows_ = num_rows;
  int64_t row = 0;
  for (int i = 0; i < header.sequences_size(); ++i) {
    const SequenceSlice& slice = header.sequences(i);
    if (sequences[i]->sampling.num_prompt_logprobs() >= 0) {
      CollectScores(slice, row, sequences[i], hidden, frame);
    }
    row += slice.num_tokens();
    if (!slice.sample()) continue;
    const auto index = static_cast<int64_t>(sampling_.size());
    SLUICE_CHECK(sampled_rows_[index] == row - 1) << row;
    sampling_.push_back(MakeSamplingRow(index, slice, *sequences[i]));
  }
}

void Sampler::CollectScores(const SequenceSlice& slice, int64_t first_row, Sequence* sequence,
                            TensorView hidden, TokenFrame* frame) {
  const uint32_t begin = slice.start_pos();
  const uint32_t end = begin + slice.num_tokens();
  const uint32_t scored_end =
      std::min(end, sequence->prompt_len);  // Tokens known and of the prompt
  const uint32_t scored_begin = begin == 0 ? 1 : begin;
  if (scored_begin < scored_end) {
    internal::v1::PromptScores* scores = frame->add_prompt_scores();
    scores->set_seq_id(slice.seq_id());
    scores->set_first_pos(scored_begin);
    for (uint32_t pos = scored_begin; pos < scored_end; ++pos) {
      int64_t row = first_row + pos - 1 - begin;
      if (pos == begin) {
        SLUICE_CHECK(!sequence->held_row.empty()) << "no row held for position " << pos;
        row = used_rows_++;
        backend_->CopyFromHost(sequence->held_row.data(), hidden.Rows(row, 1));
      }
      scored_.push_back({.row = row,
                         .token_id = sequence->tokens[pos],
                         .num_logprobs = sequence->sampling.num_prompt_logprobs(),
                         .scores = scores});
    }
  }
  sequence->held_row.clear();
  if (end < sequence->prompt_len) {
    sequence->held_row.resize(static_cast<size_t>(hidden.cols) * SizeOf(hidden.dtype));
    backend_->CopyToHost(hidden.Rows(first_row + slice.num_tokens() - 1, 1),
                         sequence->held_row.data());
  }
}

void Sampler::SampleRows(const StepHeader& header, absl::Span<Sequence* const> sequences,
                         TokenFrame* frame) {
  const absl::Span<SampledToken> results = absl::MakeSpan(sampled_).subspan(0, sampling_.size());
  for (SampledToken& result : results) result = SampledToken();
  backend_->Sample(logits_.Rows(0, static_cast<int64_t>(sampled_rows_.size())), sampling_, results);
  size_t next = 0;
  for (int i = 0; i < header.sequences_size(); ++i) {
    const SequenceSlice& slice = header.sequences(i);
    if (!slice.sample()) continue;
    const SampledToken& result = results[next++];
    internal::v1::SampledToken* token = frame->add_tokens();
    token->set_seq_id(slice.seq_id());
    token->set_token_index(slice.token_index());
    // A valid id even so: steps that run ahead may have been sent and must pass.
    token->set_token_id(result.finite ? result.token_id : 0);
    FillScores(result, sequences[i]->sampling.num_logprobs(), token);
  }
}

void Sampler::ScoreRows(TensorView hidden) {
  const auto limit = static_cast<size_t>(max_logit_rows_);
  for (size_t begin = 0; begin < scored_.size(); begin += limit) {
    const size_t count = std::min(limit, scored_.size() - begin);
    scored_rows_.clear();
    for (size_t i = 0; i < count; ++i) scored_rows_.push_back(scored_[begin + i].row);
    ComputeLogits(hidden, scored_rows_);
    for (size_t i = 0; i < count; ++i) {
      const ScoredRow& scored = scored_[begin + i];
      const SampledToken result =
          backend_->Score(logits_.Rows(0, static_cast<int64_t>(count)), static_cast<int64_t>(i),
                          scored.token_id, scored.num_logprobs);
      internal::v1::SampledToken* token = scored.scores->add_tokens();
      token->set_seq_id(scored.scores->seq_id());
      token->set_token_id(scored.token_id);
      FillScores(result, scored.num_logprobs, token);
    }
  }
}

std::vector<float> Sampler::LogitsForTest(TensorView hidden, int64_t num_rows) {
  std::vector<float> result(static_cast<size_t>(num_rows * logits_.cols));
  Project(hidden, num_rows);
  for (int64_t begin = 0; begin < num_rows; begin += max_logit_rows_) {
    std::vector<int64_t> rows;
    const int64_t end = std::min(num_rows, begin + max_logit_rows_);
    for (int64_t row = begin; row < end; ++row) rows.push_back(row);
    ComputeLogits(hidden, rows);
    backend_->CopyToHost(logits_.Rows(0, end - begin), result.data() + begin * logits_.cols);
  }
  return result;
}

}  // namespace sluice::worker
