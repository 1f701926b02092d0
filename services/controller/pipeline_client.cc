#include "services/controller/pipeline_client.h"

#include <grpcpp/client_context.h>

#include <atomic>
#include <chrono>
#include <mutex>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "proto/sluice/internal/v1/stage.grpc.pb.h"
#include "services/rpc/channel.h"
#include "services/rpc/grpc_status.h"

namespace sluice::controller {
namespace {

using internal::v1::Stage;
using internal::v1::StepHeader;
using internal::v1::StepRequest;
using internal::v1::StepResponse;

constexpr std::chrono::milliseconds kConnectSlice{50};
constexpr int kConnectSlices = 60;  // 3 s an address

}  // namespace

// One stream and its thread. Destroying it cancels the call and waits for the thread.
class PipelineClient::Connection {
 public:
  Connection(uint64_t epoch, std::vector<std::string> addresses, PipelineListener* listener)
      : epoch_(epoch), addresses_(std::move(addresses)), listener_(listener) {
    thread_ = std::thread([this] { Run(); });
  }

  ~Connection() {
    closed_ = true;
    context_.TryCancel();
    thread_.join();
  }

  void Send(const StepHeader& step) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (stream_ != nullptr) {
      request_.mutable_frame()->mutable_header()->CopyFrom(step);
      request_.mutable_frame()->set_last(true);
      stream_->Write(request_);  // A failed write means that the reader sees the end too
    }
  }

 private:
  void Run() {
    std::shared_ptr<grpc::Channel> channel = Connect();
    if (channel == nullptr) {
      Break(absl::UnavailableError(
          absl::StrCat("cannot connect to the first stage at ", absl::StrJoin(addresses_, ", "))));
      return;
    }
    stub_ = Stage::NewStub(channel);
    auto stream = stub_->Step(&context_);
    auto* reader = stream.get();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stream_ = std::move(stream);
    }
    if (!closed_) {
      listener_->OnPipelineOpen(epoch_);
    }
    StepResponse response;
    while (reader->Read(&response)) {
    }
    std::lock_guard<std::mutex> lock(mutex_);
    const absl::Status status = rpc::FromGrpcStatus(stream_->Finish());
    stream_.reset();
    Break(absl::Status(status.ok() ? absl::StatusCode::kUnavailable : status.code(),
                       absl::StrCat("the step stream ended: ", std::string(status.message()))));
  }

  std::shared_ptr<grpc::Channel> Connect() {
    for (const std::string& address : addresses_) {
      auto channel = rpc::MakeChannel(address, rpc::ChannelKind::kLink);
      for (int i = 0; i < kConnectSlices && !closed_; ++i) {
        if (channel->WaitForConnected(std::chrono::system_clock::now() + kConnectSlice)) {
          return channel;
        }
      }
    }
    return nullptr;
  }

  void Break(const absl::Status& status) {
    if (!closed_) {
      listener_->OnPipelineBroken(epoch_, status);
    }
  }

  const uint64_t epoch_;
  const std::vector<std::string> addresses_;
  PipelineListener* const listener_;
  std::atomic<bool> closed_{false};
  grpc::ClientContext context_;
  std::unique_ptr<Stage::Stub> stub_;
  std::mutex mutex_;  // Guards stream_ against being finished during a Write
  std::unique_ptr<grpc::ClientReaderWriter<StepRequest, StepResponse>> stream_;
  StepRequest request_;
  std::thread thread_;
};

PipelineClient::PipelineClient() = default;
PipelineClient::~PipelineClient() = default;

void PipelineClient::Open(uint64_t epoch, const std::vector<std::string>& addresses,
                          PipelineListener* listener) {
  Close();
  connection_ = std::make_unique<Connection>(epoch, addresses, listener);
}

void PipelineClient::Send(const StepHeader& step) {
  if (connection_ != nullptr) {
    connection_->Send(step);
  }
}

void PipelineClient::Close() { connection_.reset(); }

}  // namespace sluice::controller
