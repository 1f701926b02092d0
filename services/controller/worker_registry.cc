#include "services/controller/worker_registry.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"

namespace sluice::controller {
namespace {

constexpr uint32_t kProtocolVersion = 1;

bool IsName(const std::string& name) {
  return !name.empty() && name.size() <= 64 &&
         name.find_first_not_of("abcdefghijklmnopqrstuvwxyz0123456789._-") == std::string::npos;
}

absl::Status CheckHello(const internal::v1::WorkerHello& hello) {
  if (hello.protocol_version() != kProtocolVersion) {
    return absl::FailedPreconditionError(
        absl::StrCat("the worker speaks protocol version ", hello.protocol_version(),
                     ", the controller ", kProtocolVersion, ": run both of one release"));
  }
  if (!IsName(hello.worker_id())) {
    return absl::InvalidArgumentError("worker_id must be [a-z0-9._-]{1,64}");
  }
  if (hello.device_index() < -1 || hello.device_index() > 1023) {
    return absl::InvalidArgumentError("device_index must be -1 (\"cpu\") to 1023");
  }
  if (hello.addresses().empty()) {
    return absl::InvalidArgumentError("addresses must name where the worker's Stage service is");
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status WorkerRegistry::Add(uint64_t attachment, const internal::v1::WorkerHello& hello,
                                 std::shared_ptr<OrderChannel> channel) {
  if (absl::Status status = CheckHello(hello); !status.ok()) {
    return status;
  }
  const std::string device = hello.device_index() < 0 ? "cpu" : absl::StrCat(hello.device_index());
  for (const auto& [number, other] : workers_) {
    if (other.hello.worker_id() == hello.worker_id()) {
      return absl::AlreadyExistsError(
          absl::StrCat("a live worker is called ", hello.worker_id(), " already"));
    }
    if (other.device == device) {
      return absl::AlreadyExistsError(absl::StrCat("worker ", other.hello.worker_id(),
                                                   " is device ", device,
                                                   " already: give another --device-index"));
    }
  }
  AttachedWorker worker;
  worker.attachment = attachment;
  worker.device = device;
  worker.hello = hello;
  worker.channel = std::move(channel);
  workers_[attachment] = std::move(worker);
  return absl::OkStatus();
}

void WorkerRegistry::Remove(uint64_t attachment) { workers_.erase(attachment); }

AttachedWorker* WorkerRegistry::Find(uint64_t attachment) {
  const auto it = workers_.find(attachment);
  return it == workers_.end() ? nullptr : &it->second;
}

const AttachedWorker* WorkerRegistry::FindDevice(const std::string& device) const {
  for (const auto& [number, worker] : workers_) {
    if (worker.device == device) {
      return &worker;
    }
  }
  return nullptr;
}

std::vector<const AttachedWorker*> WorkerRegistry::All() const {
  std::vector<const AttachedWorker*> all;
  for (const auto& [number, worker] : workers_) {
    all.push_back(&worker);
  }
  std::sort(all.begin(), all.end(), [](const AttachedWorker* a, const AttachedWorker* b) {
    const auto rank = [](const AttachedWorker* w) {
      return w->hello.device_index() < 0 ? INT32_MAX : w->hello.device_index();
    };
    return rank(a) < rank(b);
  });
  return all;
}

}  // namespace sluice::controller
