// ControllerServer: everything of the controller process in the order it starts and ends: loop,
// listeners, catalog.
#pragma once

#include <chrono>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "services/controller/admin_service.h"
#include "services/controller/attach_service.h"
#include "services/controller/controller_loop.h"
#include "services/controller/generation_service.h"
#include "services/controller/model_catalog.h"
#include "services/controller/model_service.h"
#include "services/controller/pipeline_client.h"
#include "services/metrics/metrics_server.h"
#include "services/rpc/server_runner.h"

namespace sluice::controller {

struct ControllerOptions {
  LoopOptions loop;  // controller_address and host_id are filled in at the start
  GenerationOptions generation;
  ClientLimits clients;
  bool http2_guard = true;                // rpc::FrameGuard in front of the public listener
  std::string model_name;                 // Empty: from the loader
  std::string listen = "127.0.0.1:7500";  // Public: GenerationService, ModelService
  std::string internal_listen = "127.0.0.1:7501";  // Workers
  std::string admin_listen = "127.0.0.1:7502";     // AdminService, ModelService
  std::string metrics_listen;                      // Prometheus; empty: nobody
  std::string internal_advertise;  // host:port that workers dial; empty: internal_listen (a
                                   // wildcard: this host's name)
  // JSON {"public", "internal", "admin", "metrics"} is written here; empty: nowhere. "metrics" is
  // left out without metrics_listen.
  std::string address_file;
};

class ControllerServer {
 public:
  // UNAVAILABLE: a listener could not be bound.
  static absl::StatusOr<std::unique_ptr<ControllerServer>> Start(ControllerOptions options);

  // Drains (at most `drain`), then ends all listeners and threads.
  void Stop(std::chrono::milliseconds drain);
  ~ControllerServer();

  const std::string& public_address() const { return public_address_; }
  const std::string& internal_address() const { return internal_address_; }
  const std::string& admin_address() const { return admin_address_; }

 private:
  ControllerServer() = default;
  absl::Status StartListeners(const ControllerOptions& options);
  absl::Status WriteAddressFile(const std::string& path) const;
  void SetReady(bool ready);

  PipelineClient pipeline_;
  std::unique_ptr<ControllerLoop> loop_;
  std::unique_ptr<ClientCalls> calls_;
  std::unique_ptr<AttachService> attach_;
  std::unique_ptr<GenerationService> generation_;
  std::unique_ptr<ModelService> model_;
  std::unique_ptr<AdminService> admin_;
  std::unique_ptr<rpc::ServerRunner> internal_server_;
  std::unique_ptr<rpc::ServerRunner> public_server_;
  std::unique_ptr<rpc::ServerRunner> admin_server_;
  std::unique_ptr<metrics::MetricsServer> metrics_server_;  // Asks loop_
  std::unique_ptr<ModelCatalog> catalog_;
  std::string public_address_;
  std::string internal_address_;
  std::string admin_address_;
};

}  // namespace sluice::controller
