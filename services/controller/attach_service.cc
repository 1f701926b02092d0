#include "services/controller/attach_service.h"

#include <mutex>
#include <utility>

#include "absl/strings/str_cat.h"
#include "services/rpc/grpc_status.h"

namespace sluice::controller {
namespace {

using internal::v1::AttachRequest;
using internal::v1::AttachResponse;
using internal::v1::TokensRequest;
using internal::v1::TokensResponse;
using AttachStream = grpc::ServerReaderWriter<AttachResponse, AttachRequest>;

// Frames between two acknowledgements: nobody waits for them.
constexpr uint64_t kFramesPerAck = 64;

// Writes orders while the stream lasts.
class StreamChannel final : public OrderChannel {
 public:
  StreamChannel(grpc::ServerContext* context, AttachStream* stream)
      : context_(context), stream_(stream) {}

  void Send(const AttachResponse& order) override {
    std::lock_guard<std::mutex> lock(mutex_);
    if (stream_ != nullptr) {
      stream_->Write(order);
    }
  }

  void Close() override {
    std::lock_guard<std::mutex> lock(mutex_);
    if (context_ != nullptr) {
      context_->TryCancel();
    }
  }

  // The handler returns: context and stream end.
  void Detach() {
    std::lock_guard<std::mutex> lock(mutex_);
    stream_ = nullptr;
    context_ = nullptr;
  }

 private:
  std::mutex mutex_;  // Guards both against the end of the handler
  grpc::ServerContext* context_;
  AttachStream* stream_;
};

}  // namespace

grpc::Status AttachService::Attach(grpc::ServerContext* context, AttachStream* stream) {
  AttachRequest event;
  if (!stream->Read(&event) || !event.has_hello()) {
    return rpc::ToGrpcStatus(
        absl::InvalidArgumentError("the first message of Attach must be a hello"));
  }
  const uint64_t attachment = next_attachment_++;
  auto channel = std::make_shared<StreamChannel>(context, stream);
  if (absl::Status status = listener_->OnHello(attachment, event.hello(), channel); !status.ok()) {
    channel->Detach();
    return rpc::ToGrpcStatus(status);
  }
  while (stream->Read(&event)) {
    listener_->OnWorkerEvent(attachment, std::move(event));
    event.Clear();
  }
  channel->Detach();
  listener_->OnDetached(attachment);
  return grpc::Status::OK;
}

grpc::Status AttachService::Tokens(
    grpc::ServerContext* context, grpc::ServerReaderWriter<TokensResponse, TokensRequest>* stream) {
  TokensRequest request;
  uint64_t epoch = 0;
  uint64_t frames = 0;
  while (stream->Read(&request)) {
    epoch = request.frame().epoch();
    const uint64_t current = listener_->current_epoch();
    if (epoch != current) {
      return rpc::ToGrpcStatus(absl::FailedPreconditionError(
          absl::StrCat("frame.epoch: ", epoch, " is not the current epoch ", current)));
    }
    const uint64_t step = request.frame().step();
    listener_->OnFrame(std::move(*request.mutable_frame()));
    if (++frames % kFramesPerAck == 0) {
      TokensResponse response;
      response.set_step(step);
      stream->Write(response);
    }
  }
  if (epoch != 0) {
    listener_->OnTokensBroken(epoch);
  }
  return grpc::Status::OK;
}

}  // namespace sluice::controller
