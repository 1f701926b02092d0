// AttachClient: the worker's side of Controller.Attach. Dials the controller for as long as the
// process lives: hello, then events up and orders down; statistics each second.
#pragma once

#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "absl/status/status.h"
#include "proto/sluice/internal/v1/controller.pb.h"

namespace sluice::worker {

class AttachClient {
 public:
  // Called on the client's own thread; quick, and must not destroy the client.
  struct Callbacks {
    std::function<internal::v1::WorkerHello()> make_hello;
    std::function<internal::v1::WorkerStats()> make_stats;  // On the statistics' thread
    std::function<void(internal::v1::AttachResponse)> on_order;
    std::function<void(const absl::Status&)>
        on_detached;  // A stream has ended or none could be opened
  };

  // Starts dialling.
  AttachClient(const std::string& controller_address, Callbacks callbacks);
  ~AttachClient();
  AttachClient(const AttachClient&) = delete;
  AttachClient& operator=(const AttachClient&) = delete;

  // Sends an event; lost when not attached. Thread-safe.
  void Send(const internal::v1::AttachRequest& event);

  // Ends the stream and the dialling; does not wait. Thread-safe.
  void Stop();

 private:
  struct Stream;

  void Dial();
  void SendStats();
  // One stream from hello to its end.
  absl::Status Serve();
  // Sleeps; false when stopped.
  bool Pause(int milliseconds);

  const std::string address_;
  const Callbacks callbacks_;
  struct Stub;
  std::unique_ptr<Stub> stub_;

  std::mutex write_mutex_;  // Held while writing and while stream_ changes; taken before mutex_
  std::mutex mutex_;        // Guards all below
  std::condition_variable changed_;
  bool stopped_ = false;
  Stream* stream_ = nullptr;  // While a call lives

  std::thread dialler_;
  std::thread statistics_;
};

}  // namespace sluice::worker
