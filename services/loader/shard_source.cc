#include "services/loader/shard_source.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/core/fault_point.h"
#include "kernels/core/status_macros.h"
#include "services/rpc/crc32c.h"

namespace sluice::loader {
namespace {

using internal::v1::FetchRequest;
using internal::v1::FetchResponse;

constexpr char kHeadName[] = "lm_head.weight";
constexpr char kTableName[] = "embed_tokens.weight";

bool StartsWith(const std::string& text, const char* prefix) { return text.rfind(prefix, 0) == 0; }

bool IsWanted(const std::string& name, const FetchRequest& request) {
  if (StartsWith(name, "layers.")) {
    const auto layer = static_cast<uint32_t>(std::strtoul(name.c_str() + 7, nullptr, 10));
    return layer >= request.layers().begin() && layer < request.layers().end();
  }
  const bool embedding = StartsWith(name, "embed_") || StartsWith(name, "project_in.");
  return embedding ? request.embedding() : request.head();
}

}  // namespace

ShardSource::ShardSource(const checkpoint::Checkpoint& checkpoint, MemoryBudget* budget,
                         LoaderMetrics* metrics)
    : checkpoint_(checkpoint), budget_(budget), metrics_(metrics) {}

ShardSource::~ShardSource() { Stop(); }

absl::StatusOr<std::unique_ptr<ShardSource>> ShardSource::Open(
    const checkpoint::Checkpoint& checkpoint, MemoryBudget* budget, LoaderMetrics* metrics,
    const FetchRequest& request) {
  const auto& description = checkpoint.description();
  if (request.model_digest() != description.model_digest()) {
    return absl::FailedPreconditionError(
        absl::StrCat("model_digest is not that of the model served here (",
                     description.model_digest(), "); ask PlanShards again"));
  }
  const uint32_t begin = request.layers().begin(), end = request.layers().end();
  if (begin > end || end > description.config().num_layers()) {
    return absl::InvalidArgumentError(absl::StrCat("layers [", begin, ", ", end,
                                                   ") are not within the model's ",
                                                   description.config().num_layers()));
  }
  std::unique_ptr<ShardSource> source(new ShardSource(checkpoint, budget, metrics));
  SLUICE_FAULT_POINT("loader.source_opened");
  source->Select(request);
  SLUICE_RETURN_IF_ERROR(source->Resume(request));
  source->converter_ =
      std::jthread([self = source.get()](const std::stop_token& stop) { self->Convert(stop); });
  return source;
}

void ShardSource::Select(const FetchRequest& request) {
  const auto& description = checkpoint_.description();
  int table = -1;
  for (int i = 0; i < description.tensors_size(); ++i) {
    const std::string& name = description.tensors(i).name();
    if (name == kTableName) table = i;
    if (IsWanted(name, request)) units_.push_back({i, name});
  }
  const bool tied = description.config().tie_word_embeddings();
  if (request.head() && tied && table >= 0) units_.push_back({table, kHeadName});
}

absl::Status ShardSource::Resume(const FetchRequest& request) {
  if (request.resume_name().empty()) return absl::OkStatus();
  const auto it = std::find_if(units_.begin(), units_.end(), [&request](const Unit& unit) {
    return unit.name == request.resume_name();
  });
  if (it == units_.end()) {
    return absl::NotFoundError(
        absl::StrCat("resume_name ", request.resume_name(), " is not among the tensors asked for"));
  }
  const uint64_t parts = (BytesOf(*it) + kPartBytes - 1) / kPartBytes;
  if (request.resume_part() >= parts) {
    return absl::InvalidArgumentError(absl::StrCat("resume_part ", request.resume_part(), ": ",
                                                   it->name, " has ", parts, " parts"));
  }
  first_ = unit_ = static_cast<size_t>(it - units_.begin());
  part_ = request.resume_part();
  return absl::OkStatus();
}

bool ShardSource::IsPlain(const Unit& unit) const {
  return checkpoint_.description().tensors(unit.index).format() ==
         static_cast<uint32_t>(QuantFormat::kPlain);
}

uint64_t ShardSource::BytesOf(const Unit& unit) const {
  return checkpoint_.description().tensors(unit.index).bytes();
}

// Runs on converter_.
void ShardSource::Convert(const std::stop_token& stop) {
  for (size_t i = first_; i < units_.size(); ++i) {
    if (IsPlain(units_[i])) continue;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      if (!changed_.wait(lock, stop, [this] { return converted_.empty(); })) return;
    }
    MemoryBudget::Share share = budget_->Acquire(BytesOf(units_[i]), stop);
    if (!share) return;
    const auto begin = std::chrono::steady_clock::now();
    auto converted =
        std::make_unique<Converted>(Converted{checkpoint_.Read(units_[i].index), std::move(share)});
    SLUICE_FAULT_POINT("loader.converted");
    const bool ok = converted->matrix.ok();
    if (ok) {
      const std::chrono::duration<double> time = std::chrono::steady_clock::now() - begin;
      metrics_->conversion_seconds.Observe(time.count());
      metrics_->converted_bytes.Add(BytesOf(units_[i]));
    }
    std::lock_guard<std::mutex> lock(mutex_);
    converted_.push_back(std::move(converted));
    changed_.notify_all();
    if (!ok) return;
  }
}

absl::Status ShardSource::TakeConverted() {
  std::unique_lock<std::mutex> lock(mutex_);
  const bool ready =
      changed_.wait(lock, converter_.get_stop_token(), [this] { return !converted_.empty(); });
  if (!ready) return absl::CancelledError("the fetch was stopped");
  current_ = std::move(converted_.front());
  converted_.pop_front();
  changed_.notify_all();
  return current_->matrix.status();
}

absl::StatusOr<bool> ShardSource::Next(FetchResponse* part) {
  part->Clear();
  if (converter_.get_stop_token().stop_requested()) {
    return absl::CancelledError("the fetch was stopped");
  }
  if (unit_ == units_.size()) return false;
  const Unit& unit = units_[unit_];
  const uint64_t total = BytesOf(unit);
  const uint64_t offset = part_ * kPartBytes;
  const uint64_t size = std::min(kPartBytes, total - offset);
  std::string* data = part->mutable_data();
  if (IsPlain(unit)) {
    data->resize(size);
    SLUICE_RETURN_IF_ERROR(
        checkpoint_.ReadPlain(unit.index, offset, size, reinterpret_cast<uint8_t*>(data->data())));
  } else {
    if (current_ == nullptr) SLUICE_RETURN_IF_ERROR(TakeConverted());
    data->assign(reinterpret_cast<const char*>(current_->matrix->planes.data() + offset), size);
  }
  SLUICE_FAULT_POINT("loader.fetch_part");
  part->set_crc32c(rpc::Crc32c(data->data(), data->size()));
  part->set_name(unit.name);
  part->set_part(part_);
  part->set_offset(offset);
  part->set_last(offset + size == total);
  if (send_spec_) {
    *part->mutable_spec() = checkpoint_.description().tensors(unit.index);
    part->mutable_spec()->set_name(unit.name);
  }
  send_spec_ = part->last();
  ++part_;
  if (part->last()) {
    current_.reset();
    part_ = 0;
    ++unit_;
  }
  return true;
}

void ShardSource::Stop() { converter_.request_stop(); }

}  // namespace sluice::loader
