#include "worker/stage_link.h"

#include <algorithm>
#include <chrono>
#include <deque>
#include <mutex>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/core/fault_point.h"
#include "kernels/core/status_macros.h"
#include "proto/sluice/internal/v1/controller.grpc.pb.h"
#include "proto/sluice/internal/v1/stage.grpc.pb.h"
#include "services/rpc/channel.h"
#include "services/rpc/crc32c.h"
#include "worker/stream_sender.h"

namespace sluice::worker {
namespace {

using internal::v1::LinkRequest;
using internal::v1::LinkResponse;
using internal::v1::RingRequest;
using internal::v1::RingResponse;
using internal::v1::TokenFrame;
using internal::v1::TokensRequest;
using internal::v1::TokensResponse;
using std::chrono::milliseconds;

// Results that may wait for the writer: enough to overlap, little memory.
constexpr size_t kQueuedSteps = 4;
constexpr size_t kQueuedFrames = 64;
// A Unix socket answers at once or not at all; a host may be starting.
constexpr milliseconds kUnixPatience(1000);
constexpr milliseconds kTcpPatience(10000);

bool IsUnix(const std::string& address) { return absl::StartsWith(address, "unix:"); }

// True when connected; false after `patience` or when cancelled.
bool Connect(grpc::Channel* channel, milliseconds patience, Cancellation* cancellation) {
  const auto end = std::chrono::system_clock::now() + patience;
  while (!cancellation->cancelled() && std::chrono::system_clock::now() < end) {
    if (channel->WaitForConnected(std::chrono::system_clock::now() + milliseconds(100))) {
      return true;
    }
  }
  return false;
}

// A stage that was reached, and how.
struct Peer {
  std::shared_ptr<grpc::Channel> channel;
  std::string address;
};

absl::StatusOr<Peer> ConnectFirst(const std::vector<std::string>& addresses,
                                  Cancellation* cancellation) {
  for (const std::string& address : addresses) {
    auto channel = rpc::MakeChannel(address, rpc::ChannelKind::kLink);
    if (Connect(channel.get(), IsUnix(address) ? kUnixPatience : kTcpPatience, cancellation)) {
      return Peer{std::move(channel), address};
    }
    if (cancellation->cancelled()) {
      return absl::CancelledError("opening the link was cancelled");
    }
  }
  return absl::UnavailableError(absl::StrCat("cannot reach the next stage at ",
                                             absl::StrJoin(addresses, ", "),
                                             "; is that worker up and its port reachable?"));
}

absl::Status Prefixed(const std::string& prefix, const absl::Status& status) {
  return absl::Status(status.code(), absl::StrCat(prefix, ": ", std::string(status.message())));
}

// Stages before the last.
class HiddenLink final : public StageLink {
 public:
  HiddenLink(Peer peer, DType dtype, StageMetrics* metrics,
             std::function<void(absl::Status)> on_break)
      : peer_(std::move(peer)),
        dtype_(dtype),
        metrics_(metrics),
        stub_(internal::v1::Stage::NewStub(peer_.channel)),
        sender_([this](grpc::ClientContext* context) { return stub_->Link(context); },
                [this](FinishedStep* step, auto* stream) { return Write(step, stream); },
                kQueuedSteps,
                [this, on_break = std::move(on_break)](const absl::Status& status) {
                  on_break(Prefixed("link to " + peer_.address, status));
                }) {}

  bool Send(FinishedStep step) override { return sender_.Push(std::move(step)); }

  std::vector<uint8_t> SpareBuffer() override {
    std::lock_guard<std::mutex> lock(mutex_);
    if (spare_.empty()) {
      return {};
    }
    std::vector<uint8_t> buffer = std::move(spare_.back());
    spare_.pop_back();
    return buffer;
  }

  void Stop() override { sender_.Stop(); }
  std::string transport() const override { return IsUnix(peer_.address) ? "unix" : "tcp"; }

 private:
  // The writer thread: one message, used again and again.
  bool Write(FinishedStep* step, grpc::ClientReaderWriter<LinkRequest, LinkResponse>* stream) {
    const std::vector<uint8_t>& bytes = step->hidden_states;
    const auto begin = std::chrono::steady_clock::now();
    size_t offset = 0;
    bool first = true;
    do {
      const size_t size = std::min<size_t>(bytes.size() - offset, rpc::kMaxPieceBytes);
      auto* frame = request_.mutable_frame();
      frame->clear_header();
      if (first) {
        frame->mutable_header()->Swap(&step->header);
      }
      frame->mutable_hidden_states()->assign(reinterpret_cast<const char*>(bytes.data()) + offset,
                                             size);
      frame->set_offset(offset);
      frame->set_dtype(static_cast<uint32_t>(dtype_));
      frame->set_crc32c(rpc::Crc32c(bytes.data() + offset, size));
      offset += size;
      frame->set_last(offset == bytes.size());
      first = false;
      SLUICE_FAULT_POINT("worker.link_write");
      if (!stream->Write(request_)) {
        return false;
      }
    } while (offset < bytes.size());
    if (metrics_ != nullptr) {
      const std::chrono::duration<double> time = std::chrono::steady_clock::now() - begin;
      metrics_->link_seconds.Observe(time.count());
      metrics_->activation_bytes.Add(bytes.size());
    }
    std::lock_guard<std::mutex> lock(mutex_);
    if (spare_.size() < kQueuedSteps) {
      spare_.push_back(std::move(step->hidden_states));
    }
    return true;
  }

  const Peer peer_;
  const DType dtype_;
  StageMetrics* const metrics_;
  std::unique_ptr<internal::v1::Stage::Stub> stub_;
  LinkRequest request_;
  std::mutex mutex_;  // Guards spare_
  std::vector<std::vector<uint8_t>> spare_;
  StreamSender<FinishedStep, LinkRequest, LinkResponse> sender_;
};

// The last stage. Without a ring when it is also the first one.
class TokenLink final : public StageLink {
 public:
  TokenLink(const std::shared_ptr<grpc::Channel>& controller, absl::optional<Peer> ring,
            const std::function<void(absl::Status)>& on_break)
      : ring_peer_(std::move(ring)),
        controller_stub_(internal::v1::Controller::NewStub(controller)),
        tokens_([this](grpc::ClientContext* context) { return controller_stub_->Tokens(context); },
                WriteFrame<TokensRequest, TokensResponse>, kQueuedFrames,
                [on_break](const absl::Status& status) {
                  on_break(Prefixed("tokens to the controller", status));
                }) {
    if (ring_peer_.has_value()) {
      ring_stub_ = internal::v1::Stage::NewStub(ring_peer_->channel);
      ring_ = std::make_unique<StreamSender<TokenFrame, RingRequest, RingResponse>>(
          [this](grpc::ClientContext* context) { return ring_stub_->Ring(context); },
          WriteFrame<RingRequest, RingResponse>, kQueuedFrames,
          [on_break, address = ring_peer_->address](const absl::Status& status) {
            on_break(Prefixed("ring to " + address, status));
          });
    }
  }

  // The ring first: stage 0 may be waiting for these ids.
  bool Send(FinishedStep step) override {
    if (ring_ != nullptr) {
      TokenFrame frame = step.tokens;
      frame.clear_prompt_scores();
      if (!ring_->Push(std::move(frame))) {
        return false;
      }
    }
    return tokens_.Push(std::move(step.tokens));
  }

  void Stop() override {
    tokens_.Stop();
    if (ring_ != nullptr) {
      ring_->Stop();
    }
  }

  std::string transport() const override {
    if (!ring_peer_.has_value()) {
      return "";
    }
    return IsUnix(ring_peer_->address) ? "unix" : "tcp";
  }

 private:
  template <typename Request, typename Response>
  static bool WriteFrame(TokenFrame* frame, grpc::ClientReaderWriter<Request, Response>* stream) {
    Request request;
    SLUICE_FAULT_POINT("worker.tokens_write");
    request.mutable_frame()->Swap(frame);
    return stream->Write(request);
  }

  const absl::optional<Peer> ring_peer_;
  std::unique_ptr<internal::v1::Controller::Stub> controller_stub_;
  std::unique_ptr<internal::v1::Stage::Stub> ring_stub_;
  StreamSender<TokenFrame, TokensRequest, TokensResponse> tokens_;
  std::unique_ptr<StreamSender<TokenFrame, RingRequest, RingResponse>> ring_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<StageLink>> StageLink::Open(
    const Options& options, Cancellation* cancellation,
    std::function<void(absl::Status)> on_break) {
  const auto& assignment = options.assignment;
  absl::optional<Peer> next;
  if (assignment.stages() > 1) {
    SLUICE_ASSIGN_OR_RETURN(
        next, ConnectFirst({assignment.next_addresses().begin(), assignment.next_addresses().end()},
                           cancellation));
  }
  if (assignment.stage() + 1 < assignment.stages()) {
    return std::unique_ptr<StageLink>(new HiddenLink(*std::move(next), options.hidden_dtype,
                                                     options.metrics, std::move(on_break)));
  }
  const std::string& address = assignment.controller_address().empty()
                                   ? options.controller_address
                                   : assignment.controller_address();
  auto controller = rpc::MakeChannel(address, rpc::ChannelKind::kControl);
  if (!Connect(controller.get(), kTcpPatience, cancellation)) {
    return absl::UnavailableError("cannot reach the controller at " + address);
  }
  return std::unique_ptr<StageLink>(new TokenLink(controller, std::move(next), on_break));
}

}  // namespace sluice::worker
