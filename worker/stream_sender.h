// StreamSender: the outgoing end of one long gRPC stream. A writer thread takes items from a
// bounded queue, so that sending overlaps with computing; a reader thread takes the
// acknowledgements and sees at once when the stream breaks.
#pragma once

#include <grpcpp/client_context.h>
#include <grpcpp/support/sync_stream.h>

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>

#include "absl/status/status.h"
#include "services/rpc/grpc_status.h"

namespace sluice::worker {

template <typename Item, typename Request, typename Response>
class StreamSender {
 public:
  using Stream = grpc::ClientReaderWriter<Request, Response>;
  // Writes one item as one or more messages; false when the stream is broken.
  using WriteItem = std::function<bool(Item* item, Stream* stream)>;

  // `open` starts the call. `on_break` is called once, on the reader thread, when the stream ends
  // before Stop(); it must not destroy the sender.
  StreamSender(const std::function<std::unique_ptr<Stream>(grpc::ClientContext*)>& open,
               WriteItem write, size_t capacity, std::function<void(absl::Status)> on_break)
      : write_(std::move(write)),
        capacity_(capacity),
        on_break_(std::move(on_break)),
        stream_(open(&context_)),
        writer_([this] { Write(); }),
        reader_([this] { Read(); }) {}

  ~StreamSender() {
    Stop();
    reader_.join();  // Has joined the writer
  }
  StreamSender(const StreamSender&) = delete;
  StreamSender& operator=(const StreamSender&) = delete;

  // Waits while the queue is full. False: stopped or broken, the item is lost.
  bool Push(Item item) {
    std::unique_lock<std::mutex> lock(mutex_);
    space_.wait(lock, [this] { return ended_ || queue_.size() < capacity_; });
    if (ended_) {
      return false;
    }
    queue_.push_back(std::move(item));
    work_.notify_one();
    return true;
  }

  // Cancels the stream; does not wait. Thread-safe.
  void Stop() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopped_ = true;
    }
    End();
    context_.TryCancel();
  }

 private:
  void End() {
    std::lock_guard<std::mutex> lock(mutex_);
    ended_ = true;
    work_.notify_all();
    space_.notify_all();
  }

  void Write() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      work_.wait(lock, [this] { return ended_ || !queue_.empty(); });
      if (ended_) {
        return;
      }
      Item item = std::move(queue_.front());
      queue_.pop_front();
      space_.notify_one();
      lock.unlock();
      if (!write_(&item, stream_.get())) {
        return;  // The reader sees the end of the stream
      }
      lock.lock();
    }
  }

  void Read() {
    Response response;
    while (stream_->Read(&response)) {
    }
    End();
    writer_.join();
    absl::Status status = rpc::FromGrpcStatus(stream_->Finish());
    bool stopped;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopped = stopped_;
    }
    if (!stopped) {
      on_break_(status.ok() ? absl::UnavailableError("the peer ended the stream") : status);
    }
  }

  const WriteItem write_;
  const size_t capacity_;
  const std::function<void(absl::Status)> on_break_;
  grpc::ClientContext context_;
  std::unique_ptr<Stream> stream_;

  std::mutex mutex_;               // Guards all below
  std::condition_variable work_;   // For the writer
  std::condition_variable space_;  // For those who push
  std::deque<Item> queue_;
  bool ended_ = false;    // Stopped or broken
  bool stopped_ = false;  // By Stop()

  std::thread writer_;
  std::thread reader_;
};

}  // namespace sluice::worker
