// FrameGuard: the public port's own front: accepts connections, bounds how many there are, in all
// and of one peer, and passes bytes between each client and gRPC, under the limits of FrameScan. One
// thread serves all connections; buffers of a connection are bounded, so a slow side stops the
// other.
//
// gRPC gets one end of a Unix socket pair; its peer name carries the client's address
// (PeerLimits::PeerOf reads it). Plain text only: with TLS the frames are not visible here.
#pragma once

#include <atomic>
#include <chrono>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "absl/status/statusor.h"
#include "services/rpc/frame_scan.h"

namespace sluice::rpc {

struct GuardOptions {
  std::string address;             // "host:port"; port 0: the system chooses
  uint32_t max_connections = 512;  // Cut to what the limit of open files allows
  // Of one address; always at most half of all, so that nobody can shut out everybody.
  uint32_t max_connections_per_peer = 64;
  // For the client's first bytes, and to take the last ones.
  std::chrono::milliseconds patience{10 * 1000};
  FrameLimits frames;
};

class FrameGuard {
 public:
  // `hand` takes a connected socket for gRPC; called on the guard's thread. UNAVAILABLE: the address
  // cannot be bound; INVALID_ARGUMENT: it is none.
  static absl::StatusOr<std::unique_ptr<FrameGuard>> Start(const GuardOptions& options,
                                                           std::function<void(int)> hand);
  // Passes on what gRPC still writes, at most a second, then closes all.
  ~FrameGuard();

  int port() const { return port_; }
  // No new connections from here on. Thread-safe.
  void StopListening();

 private:
  using Clock = std::chrono::steady_clock;
  struct Connection;

  FrameGuard(const GuardOptions& options, std::function<void(int)> hand);
  void Run();
  void OnEvent(int fd, uint32_t events, Clock::time_point now);
  void Accept(int listener);
  void Admit(int client, const std::string& peer);
  int MakeInside(const std::string& peer);
  bool Serve(Connection* connection, Clock::time_point now);
  bool FromClient(Connection* connection, Clock::time_point now);
  void FromServer(Connection* connection);
  void Watch(Connection* connection);
  void Close(Connection* connection);
  void OnTime(Clock::time_point now);

  GuardOptions options_;
  const std::function<void(int)> hand_;
  int port_ = 0;
  int epoll_fd_ = -1;
  int wake_fd_ = -1;
  std::vector<int> listeners_;
  int spare_fd_ = -1;  // Given up to accept, and refuse, when files run out
  std::atomic<bool> listening_{true};
  std::atomic<bool> stop_{false};
  uint64_t next_name_ = 0;
  bool any_paused_ = false;
  Clock::time_point next_log_{};
  std::unordered_map<int, Connection*> by_fd_;
  std::map<Connection*, std::unique_ptr<Connection>> connections_;
  std::map<std::string, uint32_t> by_peer_;
  std::thread thread_;
};

}  // namespace sluice::rpc
