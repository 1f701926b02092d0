#include "worker/attach_client.h"

#include <grpcpp/client_context.h>

#include <algorithm>
#include <chrono>
#include <random>
#include <utility>

#include "kernels/core/fault_point.h"
#include "proto/sluice/internal/v1/controller.grpc.pb.h"
#include "services/rpc/channel.h"
#include "services/rpc/grpc_status.h"
#include "services/rpc/log.h"

namespace sluice::worker {
namespace {

using internal::v1::AttachRequest;
using internal::v1::AttachResponse;

constexpr int kFirstPauseMs = 100;
constexpr int kLastPauseMs = 2000;
constexpr int kStatsMs = 1000;

}  // namespace

struct AttachClient::Stub {
  std::unique_ptr<internal::v1::Controller::Stub> controller;
};

struct AttachClient::Stream {
  grpc::ClientContext context;
  std::unique_ptr<grpc::ClientReaderWriter<AttachRequest, AttachResponse>> call;
};

AttachClient::AttachClient(const std::string& controller_address, Callbacks callbacks)
    : address_(controller_address), callbacks_(std::move(callbacks)), stub_(new Stub) {
  stub_->controller = internal::v1::Controller::NewStub(
      rpc::MakeChannel(controller_address, rpc::ChannelKind::kControl));
  dialler_ = std::thread([this] { Dial(); });
  statistics_ = std::thread([this] { SendStats(); });
}

AttachClient::~AttachClient() {
  Stop();
  dialler_.join();
  statistics_.join();
}

void AttachClient::Stop() {
  std::lock_guard<std::mutex> lock(mutex_);
  stopped_ = true;
  if (stream_ != nullptr) {
    stream_->context.TryCancel();
  }
  changed_.notify_all();
}

bool AttachClient::Pause(int milliseconds) {
  std::unique_lock<std::mutex> lock(mutex_);
  return !changed_.wait_for(lock, std::chrono::milliseconds(milliseconds),
                            [this] { return stopped_; });
}

void AttachClient::Send(const AttachRequest& event) {
  std::lock_guard<std::mutex> write_lock(write_mutex_);
  if (stream_ != nullptr && stream_->call != nullptr) {
    stream_->call->Write(event);  // When it fails, the reader sees the end of the stream
  }
}

absl::Status AttachClient::Serve() {
  Stream stream;
  {
    std::lock_guard<std::mutex> write_lock(write_mutex_);
    std::lock_guard<std::mutex> lock(mutex_);
    if (stopped_) {
      return absl::CancelledError("stopped");
    }
    stream_ = &stream;
  }
  AttachRequest hello;
  *hello.mutable_hello() = callbacks_.make_hello();
  {
    std::lock_guard<std::mutex> write_lock(write_mutex_);  // Hello is the first message
    stream.call = stub_->controller->Attach(&stream.context);
    SLUICE_FAULT_POINT("worker.before_hello");
    stream.call->Write(hello);
  }
  SLUICE_FAULT_POINT("worker.after_hello");
  AttachResponse order;
  while (stream.call->Read(&order)) {
    callbacks_.on_order(std::move(order));
  }
  {
    std::lock_guard<std::mutex> write_lock(write_mutex_);
    std::lock_guard<std::mutex> lock(mutex_);
    stream_ = nullptr;
  }
  const absl::Status status = rpc::FromGrpcStatus(stream.call->Finish());
  return status.ok() ? absl::UnavailableError("the controller ended the stream") : status;
}

void AttachClient::Dial() {
  std::minstd_rand random(std::random_device{}());
  int pause_ms = kFirstPauseMs;
  std::string last_error;
  while (true) {
    const auto begin = std::chrono::steady_clock::now();
    rpc::LogDebug("attaching", {{"controller", address_}});
    const absl::Status status = Serve();
    callbacks_.on_detached(status);
    if (std::chrono::steady_clock::now() - begin > std::chrono::seconds(5)) {
      pause_ms = kFirstPauseMs;  // It was attached
      last_error.clear();
    }
    if (std::string error = status.ToString(); error != last_error) {
      rpc::LogWarning("detached", {{"controller", address_}, {"error", status}});
      last_error = std::move(error);
    }
    const int jitter = static_cast<int>(random() % (pause_ms / 2 + 1));
    if (!Pause(pause_ms / 2 + jitter)) {
      return;
    }
    pause_ms = std::min(2 * pause_ms, kLastPauseMs);
  }
}

void AttachClient::SendStats() {
  while (Pause(kStatsMs)) {
    AttachRequest event;
    *event.mutable_stats() = callbacks_.make_stats();
    SLUICE_FAULT_POINT("worker.heartbeat");
    Send(event);
  }
}

}  // namespace sluice::worker
