// PeerLimits: how many calls of one client address may be in flight, and how many bytes of requests
// they may hold. Our own count, taken before any work for a call: HTTP/2's limit of streams does
// not bind a client that never acknowledges the settings (gRPC 1.51).
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <string>

#include "absl/status/statusor.h"

namespace sluice::rpc {

class PeerLimits {
 public:
  struct Limits {
    uint32_t calls = 512;          // Of one peer
    uint64_t bytes = 64ull << 20;  // Of the requests of one peer's calls
    uint64_t total_bytes = 256ull << 20;
  };

  // A call that was admitted; gives its place back when it goes. Must not outlive the limits.
  class Ticket {
   public:
    Ticket() = default;
    Ticket(Ticket&& other) noexcept { *this = std::move(other); }
    Ticket& operator=(Ticket&& other) noexcept;
    ~Ticket() { Release(); }

   private:
    friend class PeerLimits;
    void Release();

    PeerLimits* limits_ = nullptr;
    std::string peer_;
    uint64_t bytes_ = 0;
  };

  explicit PeerLimits(const Limits& limits) : limits_(limits) {}

  // Counts a call of `peer` (PeerOf). RESOURCE_EXHAUSTED with RetryInfo and QuotaFailure when a
  // limit is reached. Thread-safe.
  absl::StatusOr<Ticket> Enter(const std::string& peer, uint64_t bytes);

  // Calls in flight, of all peers. Thread-safe.
  uint64_t calls() const;

  // What counts as one peer of gRPC's "ipv4:1.2.3.4:567", "ipv6:%5B::1%5D:567" or "unix:...": the
  // address without its port, of IPv6 the first 64 bits, which one host can choose freely below.
  static std::string PeerOf(const std::string& grpc_peer);

 private:
  struct Use {
    uint32_t calls = 0;
    uint64_t bytes = 0;
  };
  void Leave(const std::string& peer, uint64_t bytes);

  const Limits limits_;
  mutable std::mutex mutex_;         // Guards what follows
  std::map<std::string, Use> uses_;  // Peers with calls in flight
  Use total_;
};

}  // namespace sluice::rpc
