#include "services/controller/client_calls.h"

#include <google/protobuf/io/coded_stream.h>
#include <google/protobuf/wire_format_lite.h>
#include <grpcpp/support/proto_buffer_reader.h>

#include <utility>

#include "absl/strings/str_cat.h"
#include "services/rpc/error_details.h"
#include "services/rpc/grpc_status.h"

namespace sluice::controller {
namespace {

using google::protobuf::internal::WireFormatLite;
using google::protobuf::io::CodedInputStream;

constexpr std::chrono::milliseconds kWatchEvery{500};
constexpr size_t kSmallAnswerBytes = 16 << 10;

// Counts the fields of a message, and of the messages in its field `nested`. False: no message, or
// more than `most`.
bool CountFields(CodedInputStream* in, int nested, uint32_t most, uint32_t* count) {
  while (const uint32_t tag = in->ReadTag()) {
    if (++*count > most) {
      return false;
    }
    const int field = WireFormatLite::GetTagFieldNumber(tag);
    const bool inside =
        nested != 0 && field == nested &&
        WireFormatLite::GetTagWireType(tag) == WireFormatLite::WIRETYPE_LENGTH_DELIMITED;
    if (!inside) {
      if (!WireFormatLite::SkipField(in, tag)) {
        return false;
      }
      continue;
    }
    uint32_t length = 0;
    if (!in->ReadVarint32(&length)) {
      return false;
    }
    const auto limit = in->PushLimit(static_cast<int>(length));
    if (!CountFields(in, 0, most, count)) {
      return false;
    }
    in->PopLimit(limit);
  }
  return in->ConsumedEntireMessage();
}

}  // namespace

grpc::Status FinishStatus(grpc::CallbackServerContext* context, const absl::Status& status) {
  if (const auto retry = rpc::GetDetail<google::rpc::RetryInfo>(status); retry.has_value()) {
    const int64_t ms =
        retry->retry_delay().seconds() * 1000 + retry->retry_delay().nanos() / 1000000;
    context->AddTrailingMetadata("grpc-retry-pushback-ms", absl::StrCat(ms));
  }
  return rpc::ToGrpcStatus(status);
}

absl::Status ParseRequest(const grpc::ByteBuffer& bytes, int nested,
                          google::protobuf::MessageLite* request) {
  const auto malformed = [] {
    return rpc::FieldError("request",
                           "is no valid message of this method: each string must be UTF-8");
  };
  grpc::ByteBuffer same = bytes;  // Shares the bytes; reading needs it to be ours
  {
    grpc::ProtoBufferReader reader(&same);
    CodedInputStream in(&reader);
    uint32_t count = 0;
    if (!CountFields(&in, nested, kMaxRequestFields, &count)) {
      return count <= kMaxRequestFields
                 ? malformed()
                 : rpc::FieldError("request", absl::StrCat("must have at most ", kMaxRequestFields,
                                                           " fields and messages"));
    }
  }
  grpc::ProtoBufferReader reader(&same);
  return request->ParseFromZeroCopyStream(&reader) ? absl::OkStatus() : malformed();
}

grpc::ByteBuffer ToBytes(const google::protobuf::MessageLite& message) {
  const grpc::Slice slice(message.ByteSizeLong());
  message.SerializeWithCachedSizesToArray(const_cast<uint8_t*>(slice.begin()));
  return grpc::ByteBuffer(&slice, 1);
}

ClientCall::ClientCall(ClientCalls* calls, grpc::CallbackServerContext* context,
                       rpc::PeerLimits::Ticket ticket)
    : context_(context), calls_(calls), ticket_(std::move(ticket)) {
  std::lock_guard<std::mutex> lock(calls_->mutex_);
  calls_->open_.insert(this);
}

void ClientCall::CancelIfStalled(TimePoint before) {
  if (write_began_.load() < before.time_since_epoch()) {
    context_->TryCancel();
  }
}

void ClientCall::Finishing(size_t bytes) {
  WriteBegan();
  if (bytes <= kSmallAnswerBytes) {
    ticket_ = rpc::PeerLimits::Ticket();
  }
}

void ClientCall::Gone() {
  {
    std::lock_guard<std::mutex> lock(calls_->mutex_);
    calls_->open_.erase(this);
  }
  ticket_ = rpc::PeerLimits::Ticket();
}

ClientCalls::ClientCalls(const ClientLimits& limits)
    : limits_(limits), peers_(limits.peer), watcher_([this] { Watch(); }) {}

ClientCalls::~ClientCalls() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  wake_.notify_one();
  watcher_.join();
}

absl::StatusOr<rpc::PeerLimits::Ticket> ClientCalls::Admit(
    const grpc::CallbackServerContext& context, const grpc::ByteBuffer& request) {
  if (context.IsCancelled()) {
    return absl::CancelledError("the client has gone");
  }
  return peers_.Enter(rpc::PeerLimits::PeerOf(context.peer()), request.Length());
}

void ClientCalls::Watch() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (!wake_.wait_for(lock, kWatchEvery, [this] { return stop_; })) {
    const TimePoint before = std::chrono::steady_clock::now() - limits_.stalled_write;
    for (ClientCall* call : open_) {
      call->CancelIfStalled(before);
    }
  }
}

void ReplyReactor::Reply(const absl::Status& status, const google::protobuf::MessageLite& message) {
  if (status.ok()) {
    *response_ = ToBytes(message);
  }
  Finishing(response_->Length());
  Finish(FinishStatus(context_, status));
}

void ReplyReactor::OnDone() {
  Gone();
  delete this;
}

grpc::ServerUnaryReactor* Refuse(grpc::CallbackServerContext* context, const absl::Status& status) {
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  reactor->Finish(FinishStatus(context, status));
  return reactor;
}

}  // namespace sluice::controller
