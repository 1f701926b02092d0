// Worker: the process between its parts. Carries out the controller's orders one after another on
// the thread that calls Run(): loads a shard, opens an epoch, halts it. Holds the engine over
// epochs and over a lost controller.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <variant>
#include <vector>

#include "absl/status/statusor.h"
#include "services/rpc/server_runner.h"
#include "worker/attach_client.h"
#include "worker/cancellation.h"
#include "worker/engine/stage_engine.h"
#include "worker/stage_link.h"
#include "worker/stage_service.h"
#include "worker/step_loop.h"
#include "worker/worker_metrics.h"

namespace sluice::worker {

struct WorkerOptions {
  std::string controller_address;      // "host:port" of the internal listener
  std::string worker_id;               // [a-z0-9._-]{1,64}
  std::string listen = "127.0.0.1:0";  // Of the Stage service
  std::string advertise_host;          // What others dial; "" = the host of `listen`
  std::string unix_socket;             // "" = none
  std::string device_kind = "cpu";     // "cpu" or "cuda"
  std::string device_name;
  int device_index = 0;
  uint64_t memory_bytes = 0;
};

class Worker {
 public:
  // StageEngine::NewLoader with the backend bound; tests give their own.
  using LoaderFactory = std::function<absl::StatusOr<std::unique_ptr<StageEngine::Loader>>(
      const internal::v1::ShardAssignment&)>;

  // Listens and starts dialling the controller. INVALID_ARGUMENT (worker id, socket path),
  // UNAVAILABLE (cannot listen).
  static absl::StatusOr<std::unique_ptr<Worker>> Start(const WorkerOptions& options,
                                                       LoaderFactory make_loader);
  ~Worker();

  // Carries out orders until a ReleaseOrder or Stop(). Then everything has ended but the object.
  void Run();
  // Thread-safe; does not wait.
  void Stop();

  // Adds what this worker has done. Thread-safe.
  void Collect(metrics::Page* page) const { metrics_.Collect(service_.promised(), page); }

  // gRPC addresses of the Stage service, best first.
  const std::vector<std::string>& addresses() const { return addresses_; }

 private:
  // One epoch in which steps run. Members are destroyed from the last to the first.
  struct Session {
    uint64_t epoch = 0;
    std::unique_ptr<StageLink> link;
    std::unique_ptr<StepLoop> loop;
  };
  struct Fault {
    uint64_t epoch;
    absl::Status status;
  };
  struct Detached {};
  struct Stopped {};
  using Event = std::variant<internal::v1::ConfigureOrder, internal::v1::HaltOrder,
                             internal::v1::ReleaseOrder, Fault, Detached, Stopped>;

  Worker(const WorkerOptions& options, LoaderFactory make_loader);

  void Attach();
  internal::v1::WorkerHello Hello();
  internal::v1::WorkerStats Stats();
  void TakeOrder(internal::v1::AttachResponse order);
  // Queues an event and cancels the load that it makes useless.
  void Post(Event event);
  bool Supersedes(const Event& event) const;  // Called with the lock held
  Event NextEvent();

  void Configure(const internal::v1::ConfigureOrder& order);
  absl::Status Load(const internal::v1::ConfigureOrder& order);
  absl::Status Fetch(const internal::v1::ConfigureOrder& order);
  absl::Status OpenSession(const internal::v1::ConfigureOrder& order);
  void CloseSession();
  void SendReady(uint64_t epoch);
  void SendFault(uint64_t epoch, const absl::Status& status);

  const WorkerOptions options_;
  const LoaderFactory make_loader_;
  std::vector<std::string> addresses_;
  WorkerMetrics metrics_;
  StageService service_;
  std::unique_ptr<rpc::ServerRunner> server_;

  std::unique_ptr<StageEngine>
      engine_;  // Run()'s thread; the loop's thread while a session is open

  std::mutex mutex_;  // Guards all below
  std::condition_variable posted_;
  std::deque<Event> events_;
  uint64_t loading_epoch_ = 0;                  // 0: nothing is being loaded
  std::unique_ptr<Cancellation> cancellation_;  // Of the load
  internal::v1::ShardAssignment held_;          // Copy for Hello(); no model_digest: nothing held
  std::unique_ptr<Session> session_;            // Changed by Run()'s thread only

  std::unique_ptr<AttachClient> attach_;
};

// Equal weights: the shard that is held serves the assignment without a new load.
bool HoldsSameWeights(const internal::v1::ShardAssignment& held,
                      const internal::v1::ShardAssignment& wanted);

}  // namespace sluice::worker
