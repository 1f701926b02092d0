#include "services/loader/weights_service.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/core/fault_point.h"
#include "kernels/core/status_macros.h"
#include "services/loader/sending_stream.h"
#include "services/loader/shard_source.h"
#include "services/rpc/crc32c.h"

namespace sluice::loader {
namespace {

using internal::v1::FetchFileResponse;
using internal::v1::FetchResponse;

// Workers of one pipeline, some of them twice after a broken stream.
constexpr int kMaxStreams = 64;

// State of one Fetch: the source is opened on the stream's own thread.
struct FetchState {
  std::mutex mutex;  // Guards source's creation against Stop().
  std::unique_ptr<ShardSource> source;
  bool stopped = false;
};

// State of one FetchFile.
struct FileState {
  bool read = false;
  std::string content;
  uint64_t offset = 0;
};

absl::StatusOr<bool> NextOfFile(const checkpoint::Checkpoint& checkpoint,
                                const internal::v1::FetchFileRequest& request, FileState* state,
                                FetchFileResponse* response) {
  if (!state->read) {
    if (request.model_digest() != checkpoint.description().model_digest()) {
      return absl::FailedPreconditionError(
          "model_digest is not that of the model served here; ask PlanShards again");
    }
    SLUICE_ASSIGN_OR_RETURN(state->content, checkpoint.ReadFile(request.name()));
    state->read = true;
  } else if (state->offset == state->content.size()) {
    return false;
  }
  const uint64_t size = std::min<uint64_t>(kPartBytes, state->content.size() - state->offset);
  response->set_data(state->content.data() + state->offset, size);
  response->set_crc32c(rpc::Crc32c(response->data().data(), size));
  state->offset += size;
  return true;
}

}  // namespace

uint64_t BudgetFor(const checkpoint::Checkpoint& checkpoint) {
  uint64_t largest = 0;
  for (const auto& tensor : checkpoint.description().tensors()) {
    const bool plain = tensor.format() == static_cast<uint32_t>(QuantFormat::kPlain);
    if (!plain) largest = std::max(largest, tensor.bytes());
  }
  return std::max<uint64_t>(3 * largest, 64 << 20);
}

WeightsService::WeightsService(const checkpoint::Checkpoint& checkpoint)
    : checkpoint_(checkpoint), budget_(BudgetFor(checkpoint)) {}

grpc::ServerUnaryReactor* WeightsService::PlanShards(grpc::CallbackServerContext* context,
                                                     const internal::v1::PlanShardsRequest*,
                                                     internal::v1::PlanShardsResponse* response) {
  SLUICE_FAULT_POINT("loader.before_plan_answer");
  *response = checkpoint_.description();
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  reactor->Finish(grpc::Status::OK);
  SLUICE_FAULT_POINT("loader.after_plan_answer");
  return reactor;
}

grpc::ServerWriteReactor<FetchResponse>* WeightsService::Fetch(
    grpc::CallbackServerContext* context, const internal::v1::FetchRequest* request) {
  SLUICE_FAULT_POINT("loader.fetch_begun");
  auto state = std::make_shared<FetchState>();
  auto next = [this, state, wanted = *request](FetchResponse* part) -> absl::StatusOr<bool> {
    if (state->source == nullptr) {
      SLUICE_ASSIGN_OR_RETURN(auto source,
                              ShardSource::Open(checkpoint_, &budget_, &metrics_, wanted));
      std::lock_guard<std::mutex> lock(state->mutex);
      state->source = std::move(source);
      if (state->stopped) state->source->Stop();
    }
    auto more = state->source->Next(part);
    if (more.ok() && *more) metrics_.tensor_bytes.Add(part->data().size());
    return more;
  };
  auto stop = [state] {
    std::lock_guard<std::mutex> lock(state->mutex);
    state->stopped = true;
    if (state->source != nullptr) state->source->Stop();
  };
  return new SendingStream<FetchResponse>(context, &streams_, kMaxStreams, std::move(next),
                                          std::move(stop));
}

grpc::ServerWriteReactor<FetchFileResponse>* WeightsService::FetchFile(
    grpc::CallbackServerContext* context, const internal::v1::FetchFileRequest* request) {
  auto next = [this, state = std::make_shared<FileState>(),
               wanted = *request](FetchFileResponse* response) {
    SLUICE_FAULT_POINT("loader.file_part");
    auto more = NextOfFile(checkpoint_, wanted, state.get(), response);
    if (more.ok() && *more) metrics_.file_bytes.Add(response->data().size());
    return more;
  };
  return new SendingStream<FetchFileResponse>(context, &streams_, kMaxStreams, std::move(next),
                                              [] {});
}

void WeightsService::Collect(metrics::Page* page) const {
  metrics_.Collect(checkpoint_.description().model_name(), streams_, page);
}

}  // namespace sluice::loader
