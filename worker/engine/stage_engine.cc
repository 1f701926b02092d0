#include "worker/engine/stage_engine.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/core/check.h"
#include "kernels/core/fault_point.h"
#include "kernels/core/status_macros.h"
#include "worker/engine/assignment_check.h"
#include "worker/engine/decoder_layer.h"
#include "worker/engine/kv_cache.h"
#include "worker/engine/rope.h"
#include "worker/engine/sampler.h"
#include "worker/engine/sequence_table.h"
#include "worker/engine/shard.h"
#include "worker/engine/step_checker.h"
#include "worker/engine/workspace.h"

namespace sluice::worker {
namespace {

using internal::v1::ModelConfig;
using internal::v1::SequenceSlice;
using internal::v1::ShardAssignment;
using internal::v1::StepHeader;
using internal::v1::TokenFrame;

Activation ToActivation(internal::v1::MlpActivation activation) {
  switch (activation) {
    case internal::v1::MLP_ACTIVATION_RELU:
      return Activation::kRelu;
    case internal::v1::MLP_ACTIVATION_SILU:
      return Activation::kSilu;
    case internal::v1::MLP_ACTIVATION_GELU:
      return Activation::kGelu;
    case internal::v1::MLP_ACTIVATION_GELU_TANH:
      return Activation::kGeluTanh;
    default:
      SLUICE_CHECK(false) << "activation was not checked";
      return Activation::kNone;
  }
}

bool IsOpt(const ModelConfig& config) {
  return config.architecture() == internal::v1::ARCHITECTURE_OPT;
}

class Engine final : public StageEngine {
 public:
  static absl::StatusOr<std::unique_ptr<StageEngine>> Create(const ShardAssignment& assignment,
                                                             std::unique_ptr<Shard> shard,
                                                             Backend* backend);

  absl::Status Reconfigure(const ShardAssignment& assignment) override;
  int64_t hidden_row_bytes() const override {
    return int64_t{assignment_.config().hidden_size()} *
           static_cast<int64_t>(SizeOf(hidden_dtype()));
  }
  DType hidden_dtype() const override { return backend_->activation_dtype(); }
  void AddSampled(const TokenFrame& frame) override;
  bool HasInputs(const StepHeader& header) const override {
    return checker_ == nullptr || checker_->HasInputs(header, *table_);
  }
  absl::Status Step(const StepInput& input, StepOutput* output) override;
  StageMemory memory() const override;
  const ShardAssignment& assignment() const override { return assignment_; }
  std::vector<float> LogitsForTest() override;

 private:
  Engine(const ShardAssignment& assignment, std::unique_ptr<Shard> shard, Backend* backend,
         std::optional<RopeFrequencies> rope);

  // Allocates all that depends on the numbers of assignment_.
  absl::Status Configure();
  // Takes the slices into the table and fills the rows' ids, positions and lengths.
  void ApplyStep(const StepHeader& header);
  void AppendRows(const SequenceSlice& slice, const Sequence& sequence,
                  std::optional<uint32_t> ahead_id);
  LayerContext MakeContext();
  void RunLayers(const StepInput& input);
  void Finish(const StepHeader& header, StepOutput* output);

  ShardAssignment assignment_;
  const std::unique_ptr<Shard> shard_;
  Backend* const backend_;
  const std::optional<RopeFrequencies> rope_;  // Llama
  const LayerFunction layer_;
  const EmbedFunction embed_;
  const Activation activation_;
  const float attention_scale_;

  // Depends on the assignment's numbers; checker_ is null when they could not be allocated.
  std::unique_ptr<KvCache> kv_;
  std::unique_ptr<SequenceTable> table_;
  std::unique_ptr<StepChecker> checker_;
  std::unique_ptr<Sampler> sampler_;  // Last stage
  std::unique_ptr<Workspace> workspace_;

  // Of the current step; reserved for max_batch_tokens and max_batch_size.
  uint64_t last_step_ = 0;
  int64_t num_rows_ = 0;
  std::vector<Sequence*> sequences_;
  std::vector<SequenceRows> slices_;
  std::vector<uint32_t> token_ids_;      // Stage 0
  std::vector<uint32_t> positions_;      // Position, or row of OPT's table
  std::vector<const float*> inv_freq_;   // Llama
  std::vector<int64_t> logit_rows_;      // Last stage: rows that are sampled
  std::vector<float> inv_freq_scratch_;  // Dynamic scaling: [max_batch_tokens, half_dim]
};

Engine::Engine(const ShardAssignment& assignment, std::unique_ptr<Shard> shard, Backend* backend,
               std::optional<RopeFrequencies> rope)
    : assignment_(assignment),
      shard_(std::move(shard)),
      backend_(backend),
      rope_(std::move(rope)),
      layer_(IsOpt(assignment.config()) ? OptLayer : LlamaLayer),
      embed_(IsOpt(assignment.config()) ? OptEmbed : LlamaEmbed),
      activation_(ToActivation(assignment.config().activation())),
      attention_scale_(1.0f / std::sqrt(static_cast<float>(assignment.config().head_dim()))) {}

absl::StatusOr<std::unique_ptr<StageEngine>> Engine::Create(const ShardAssignment& assignment,
                                                            std::unique_ptr<Shard> shard,
                                                            Backend* backend) {
  std::optional<RopeFrequencies> rope;
  if (!IsOpt(assignment.config())) {
    SLUICE_ASSIGN_OR_RETURN(rope, RopeFrequencies::Create(assignment.config()));
  }
  std::unique_ptr<Engine> engine(
      new Engine(assignment, std::move(shard), backend, std::move(rope)));
  SLUICE_RETURN_IF_ERROR(engine->Configure());
  return engine;
}

absl::Status Engine::Reconfigure(const ShardAssignment& assignment) {
  SLUICE_RETURN_IF_ERROR(CheckAssignment(assignment));
  const ShardAssignment& held = assignment_;
  if (assignment.model_digest() != held.model_digest() ||
      assignment.config().SerializeAsString() != held.config().SerializeAsString() ||
      assignment.layers().begin() != held.layers().begin() ||
      assignment.layers().end() != held.layers().end()) {
    return absl::FailedPreconditionError(absl::StrCat(
        "this stage holds layers [", held.layers().begin(), ", ", held.layers().end(),
        ") of model ", held.model_digest(), "; another model or range needs a new engine"));
  }
  const bool same_numbers = assignment.num_blocks() == held.num_blocks() &&
                            assignment.block_size() == held.block_size() &&
                            assignment.max_batch_tokens() == held.max_batch_tokens() &&
                            assignment.max_batch_size() == held.max_batch_size() &&
                            assignment.max_model_len() == held.max_model_len();
  const bool configured = checker_ != nullptr;
  assignment_ = assignment;
  if (!same_numbers || !configured) return Configure();
  table_->ReleaseAll();
  last_step_ = 0;
  num_rows_ = 0;
  return absl::OkStatus();
}

absl::Status Engine::Configure() {
  const ModelConfig& config = assignment_.config();
  // Before the new ones: there may be no room for both.
  checker_.reset();
  kv_.reset();
  sampler_.reset();
  workspace_.reset();
  last_step_ = 0;
  num_rows_ = 0;

  SLUICE_ASSIGN_OR_RETURN(
      kv_, KvCache::Create({.num_layers = static_cast<int64_t>(shard_->layers.size()),
                            .num_blocks = assignment_.num_blocks(),
                            .block_size = assignment_.block_size(),
                            .num_kv_heads = config.num_kv_heads(),
                            .head_dim = config.head_dim()},
                           backend_));
  const int64_t extra = assignment_.has_head() ? Sampler::ExtraRows(assignment_) : 0;
  SLUICE_ASSIGN_OR_RETURN(workspace_, Workspace::Create(assignment_, extra, backend_));
  if (assignment_.has_head()) {
    SLUICE_ASSIGN_OR_RETURN(sampler_, Sampler::Create(assignment_, shard_.get(), backend_));
  }
  const int64_t rows = assignment_.max_batch_tokens();
  sequences_.reserve(assignment_.max_batch_size());
  slices_.reserve(assignment_.max_batch_size());
  token_ids_.reserve(rows);
  positions_.reserve(rows);
  inv_freq_.reserve(rows);
  logit_rows_.reserve(assignment_.max_batch_size());
  if (rope_ && rope_->depends_on_length()) inv_freq_scratch_.resize(rows * rope_->half_dim());
  table_ = std::make_unique<SequenceTable>(
      SequenceTable::Options{.num_blocks = assignment_.num_blocks(),
                             .block_size = assignment_.block_size(),
                             .max_model_len = assignment_.max_model_len(),
                             .keep_history = assignment_.has_head()});
  checker_ = std::make_unique<StepChecker>(assignment_, static_cast<uint64_t>(hidden_row_bytes()));
  return absl::OkStatus();
}

void Engine::AddSampled(const TokenFrame& frame) {
  if (checker_ == nullptr) return;
  for (const auto& token : frame.tokens()) {
    table_->AddSampled(frame.step(), token.seq_id(), token.token_id());
  }
}

void Engine::AppendRows(const SequenceSlice& slice, const Sequence& sequence,
                        std::optional<uint32_t> ahead_id) {
  slices_.push_back({.row_begin = num_rows_,
                     .num_rows = slice.num_tokens(),
                     .start_pos = slice.start_pos(),
                     .block_table = sequence.block_table.data()});
  if (assignment_.has_embedding()) {
    if (slice.sampled_by_step() != SequenceTable::kNoStep) {
      token_ids_.push_back(*ahead_id);
    } else {
      token_ids_.insert(token_ids_.end(), slice.token_ids().begin(), slice.token_ids().end());
    }
  }
  const uint32_t first_row = rope_ ? 0 : kOptFirstPositionRow;
  uint32_t last_length = 0;
  for (uint32_t i = 0; i < slice.num_tokens(); ++i) {
    const uint32_t position = slice.start_pos() + i;
    positions_.push_back(position + first_row);
    if (!rope_) continue;
    const uint32_t length = std::max(sequence.prompt_len, position + 1);
    if (length != last_length) {
      float* scratch = inv_freq_scratch_.data();
      if (rope_->depends_on_length()) scratch += (num_rows_ + i) * rope_->half_dim();
      inv_freq_.push_back(rope_->ForLength(length, scratch));
    } else {
      inv_freq_.push_back(inv_freq_.back());
    }
    last_length = length;
  }
  num_rows_ += slice.num_tokens();
}

void Engine::ApplyStep(const StepHeader& header) {
  last_step_ = header.step();
  num_rows_ = 0;
  sequences_.clear();
  slices_.clear();
  token_ids_.clear();
  positions_.clear();
  inv_freq_.clear();
  logit_rows_.clear();
  for (const uint64_t seq_id : header.released_seq_ids()) {
    SLUICE_FAULT_POINT("worker.release");
    table_->Release(seq_id);
  }
  for (const SequenceSlice& slice : header.sequences()) {
    const Sequence* before = table_->Find(slice.seq_id());
    const std::optional<uint32_t> ahead_id = before == nullptr ? std::nullopt : before->sampled_id;
    sequences_.push_back(table_->Apply(header.step(), slice));
    AppendRows(slice, *sequences_.back(), ahead_id);
    if (slice.sample() && assignment_.has_head()) logit_rows_.push_back(num_rows_ - 1);
  }
}

LayerContext Engine::MakeContext() {
  LayerContext context;
  context.backend = backend_;
  context.sequences = slices_;
  context.attention_scale = attention_scale_;
  context.activation = activation_;
  context.norm_before = assignment_.config().norm_before();
  context.a = workspace_->Rows(num_rows_);
  if (rope_) {
    context.rope = backend_->RopeTable(positions_, inv_freq_, rope_->half_dim(), /*scale=*/1.0f);
  }
  return context;
}

void Engine::RunLayers(const StepInput& input) {
  backend_->BeginStep({.num_rows = num_rows_,
                       .token_ids = token_ids_,
                       .table_rows = positions_,
                       .sequences = slices_,
                       .inv_freq = inv_freq_,
                       .half_dim = rope_ ? rope_->half_dim() : 0,
                       .logit_rows = logit_rows_});
  if (!assignment_.has_embedding()) {
    backend_->CopyFromHost(input.hidden_states, workspace_->hidden().Rows(0, num_rows_));
  }
  backend_->Run(StepPart::kLayers, [this] {
    const LayerContext context = MakeContext();
    if (assignment_.has_embedding()) embed_(*shard_, token_ids_, positions_, context);
    for (size_t i = 0; i < shard_->layers.size(); ++i) {
      layer_(shard_->layers[i], kv_->layer(i), context);
    }
  });
}

void Engine::Finish(const StepHeader& header, StepOutput* output) {
  if (!assignment_.has_head()) {
    output->hidden_states.resize(static_cast<size_t>(num_rows_ * hidden_row_bytes()));
    backend_->CopyToHost(workspace_->hidden().Rows(0, num_rows_), output->hidden_states.data());
    return;
  }
  SLUICE_FAULT_POINT("worker.before_sampling");
  sampler_->Run(header, sequences_, logit_rows_, workspace_->hidden(), num_rows_, &output->tokens);
  SLUICE_FAULT_POINT("worker.after_sampling");
  AddSampled(output->tokens);
}

absl::Status Engine::Step(const StepInput& input, StepOutput* output) {
  if (checker_ == nullptr) {
    return absl::FailedPreconditionError("the stage has no KV cache: its last Reconfigure failed");
  }
  const StepHeader& header = *input.header;
  SLUICE_RETURN_IF_ERROR(checker_->Check(header, input.hidden_bytes, last_step_, *table_));
  ApplyStep(header);
  output->hidden_states.clear();
  output->tokens.Clear();
  output->tokens.set_epoch(header.epoch());
  output->tokens.set_step(header.step());
  output->tokens.set_slot(header.slot());
  if (num_rows_ == 0) return absl::OkStatus();
  RunLayers(input);
  Finish(header, output);
  return absl::OkStatus();
}

StageMemory Engine::memory() const {
  StageMemory memory{.weight_bytes = shard_->bytes};
  if (checker_ == nullptr) return memory;
  memory.kv_bytes = kv_->bytes();
  memory.workspace_bytes = workspace_->bytes() + (sampler_ == nullptr ? 0 : sampler_->bytes());
  return memory;
}

std::vector<float> Engine::LogitsForTest() {
  SLUICE_CHECK(sampler_ != nullptr) << "only the last stage has logits";
  return sampler_->LogitsForTest(workspace_->hidden(), num_rows_);
}

class EngineLoader final : public StageEngine::Loader {
 public:
  EngineLoader(const ShardAssignment& assignment, Backend* backend)
      : assignment_(assignment), backend_(backend), builder_(assignment, backend) {}

  absl::Status Add(const std::string& name, QuantizedMatrix tensor) override {
    return builder_.Add(name, std::move(tensor));
  }
  absl::StatusOr<std::unique_ptr<StageEngine>> Finish() override {
    SLUICE_ASSIGN_OR_RETURN(std::unique_ptr<Shard> shard, builder_.Finish());
    return Engine::Create(assignment_, std::move(shard), backend_);
  }

 private:
  const ShardAssignment assignment_;
  Backend* const backend_;
  ShardBuilder builder_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<StageEngine::Loader>> StageEngine::NewLoader(
    const ShardAssignment& assignment, Backend* backend) {
  SLUICE_RETURN_IF_ERROR(CheckAssignment(assignment));
  if (!IsOpt(assignment.config())) {
    // A frequency that cannot be computed should not cost a whole download.
    SLUICE_RETURN_IF_ERROR(RopeFrequencies::Create(assignment.config()).status());
  }
  return std::make_unique<EngineLoader>(assignment, backend);
}

}  // namespace sluice::worker
