// WorkerRegistry: the workers that are attached now, and what they said last. Owned by the
// controller's loop; one thread.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "proto/sluice/internal/v1/controller.pb.h"
#include "proto/sluice/v1/admin.pb.h"

namespace sluice::controller {

// The way to one worker. Thread-safe.
class OrderChannel {
 public:
  virtual ~OrderChannel() = default;
  // Ignored when the worker has gone: its detachment follows.
  virtual void Send(const internal::v1::AttachResponse& order) = 0;
  // Ends the Attach stream; the detachment follows.
  virtual void Close() = 0;
};

struct AttachedWorker {
  uint64_t attachment = 0;  // Number of its Attach stream
  std::string device;       // "0", "1", ... or "cpu"
  internal::v1::WorkerHello hello;
  std::shared_ptr<OrderChannel> channel;
  v1::WorkerState state = v1::WORKER_STATE_ATTACHED;
  internal::v1::LoadProgress progress;
  internal::v1::WorkerReady ready;
  internal::v1::WorkerStats stats;
  std::string fault;
};

class WorkerRegistry {
 public:
  // ALREADY_EXISTS: a live worker has this id or this device. FAILED_PRECONDITION: another protocol
  // version. INVALID_ARGUMENT: a field of the hello is out of its range.
  absl::Status Add(uint64_t attachment, const internal::v1::WorkerHello& hello,
                   std::shared_ptr<OrderChannel> channel);
  void Remove(uint64_t attachment);

  // nullptr: not here. Valid until the next Add or Remove.
  AttachedWorker* Find(uint64_t attachment);
  const AttachedWorker* FindDevice(const std::string& device) const;

  // By device: numbers ascending, then "cpu".
  std::vector<const AttachedWorker*> All() const;
  size_t size() const { return workers_.size(); }

 private:
  std::map<uint64_t, AttachedWorker> workers_;  // By attachment
};

}  // namespace sluice::controller
