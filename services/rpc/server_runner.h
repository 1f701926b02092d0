// ServerRunner: a gRPC server with Sluice's limits, health names and reflection, on one or more
// addresses.
#pragma once

#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "services/rpc/frame_guard.h"

namespace sluice::rpc {

enum class ServerKind {
  kPublic,    // Clients: messages of 4 MiB, connections age after 30 min, a ping each 10 s at most
  kInternal,  // Between processes: messages of 2 MiB, 16 MB window, keepalive 2 s / 1 s,
              // connections never age
};

struct ServerOptions {
  // "host:port" (port 0: the system chooses) or "unix:/path". All must bind.
  std::vector<std::string> addresses;
  ServerKind kind = ServerKind::kInternal;
  // Health names that follow SetReady, besides "" and "ready"; "live" is always SERVING.
  std::vector<std::string> ready_names;
  // Public: how long a call may go on after its connection has aged.
  int age_grace_ms = 10 * 60 * 1000;
  int max_concurrent_streams = 100;  // Of one connection
  // A FrameGuard in front of each TCP address: what gRPC 1.51 does not bound is bounded there.
  bool guard = false;
  GuardOptions guard_options = {};  // All but address and max_streams
};

class ServerRunner {
 public:
  // Builds and starts the server; `services` must outlive the runner. UNAVAILABLE names the
  // addresses when one could not be bound; INVALID_ARGUMENT when there is none.
  static absl::StatusOr<std::unique_ptr<ServerRunner>> Start(
      const ServerOptions& options, absl::Span<grpc::Service* const> services);

  // Shuts down at once if Shutdown has not been called.
  ~ServerRunner();

  // Port of each address in order; 0 for a Unix socket.
  const std::vector<int>& ports() const { return ports_; }

  // Thread-safe. Not ready at the start.
  void SetReady(bool ready);

  // Stops listening, lets calls go on for grace_ms, cancels the rest and waits for them.
  // Thread-safe; later calls return when the first has.
  void Shutdown(int grace_ms);

 private:
  ServerRunner() = default;
  absl::Status StartGuards(const ServerOptions& options);

  std::vector<std::string> ready_names_;
  std::vector<int> ports_;
  std::shared_ptr<grpc::experimental::ExternalConnectionAcceptor> acceptor_;  // Of the guards
  std::unique_ptr<grpc::Server> server_;
  std::vector<std::unique_ptr<FrameGuard>> guards_;
};

}  // namespace sluice::rpc
