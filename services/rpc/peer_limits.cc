#include "services/rpc/peer_limits.h"

#include <arpa/inet.h>

#include <utility>

#include "absl/strings/str_cat.h"
#include "services/rpc/error_details.h"

namespace sluice::rpc {
namespace {

constexpr int64_t kRetryMs = 1000;
constexpr size_t kPrefixBytes = 8;  // A host's own network in IPv6

absl::Status Refused(const std::string& what) {
  absl::Status status = absl::ResourceExhaustedError(absl::StrCat(what, ": try again later"));
  AttachRetryInfo(kRetryMs, &status);
  AttachQuotaFailure("peer", what, &status);
  return status;
}

// "%5B::1%5D:567" or "[::1]:567" -> "::1"; empty when it is neither.
std::string Ipv6Of(const std::string& address) {
  for (const auto& [open, close] :
       {std::pair<std::string, std::string>{"%5B", "%5D"}, {"[", "]"}}) {
    const size_t begin = address.find(open);
    const size_t end = address.find(close);
    if (begin != std::string::npos && end != std::string::npos && begin < end) {
      const std::string host = address.substr(begin + open.size(), end - begin - open.size());
      return host.substr(0, host.find('%'));  // Without a zone
    }
  }
  return "";
}

}  // namespace

PeerLimits::Ticket& PeerLimits::Ticket::operator=(Ticket&& other) noexcept {
  Release();
  limits_ = std::exchange(other.limits_, nullptr);
  peer_ = std::move(other.peer_);
  bytes_ = other.bytes_;
  return *this;
}

void PeerLimits::Ticket::Release() {
  if (limits_ != nullptr) {
    std::exchange(limits_, nullptr)->Leave(peer_, bytes_);
  }
}

absl::StatusOr<PeerLimits::Ticket> PeerLimits::Enter(const std::string& peer, uint64_t bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto it = uses_.find(peer);
  const Use use = it == uses_.end() ? Use() : it->second;
  if (use.calls >= limits_.calls) {
    return Refused(absl::StrCat(limits_.calls,
                                " calls of this client's address are in flight, as many as may"));
  }
  // A first call always may: a request alone is bounded by the message limit.
  if (use.calls > 0 && use.bytes + bytes > limits_.bytes) {
    return Refused("the requests in flight of this client's address are too large together");
  }
  if (total_.calls > 0 && total_.bytes + bytes > limits_.total_bytes) {
    return Refused("the requests in flight are too large together");
  }
  for (Use* counted : {&uses_[peer], &total_}) {
    ++counted->calls;
    counted->bytes += bytes;
  }
  Ticket ticket;
  ticket.limits_ = this;
  ticket.peer_ = peer;
  ticket.bytes_ = bytes;
  return ticket;
}

void PeerLimits::Leave(const std::string& peer, uint64_t bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto it = uses_.find(peer);
  for (Use* counted : {&it->second, &total_}) {
    --counted->calls;
    counted->bytes -= bytes;
  }
  if (it->second.calls == 0) {
    uses_.erase(it);
  }
}

uint64_t PeerLimits::calls() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return total_.calls;
}

std::string PeerLimits::PeerOf(const std::string& grpc_peer) {
  const std::string kind = grpc_peer.substr(0, grpc_peer.find(':'));
  if (kind == "ipv4") {
    return grpc_peer.substr(0, grpc_peer.rfind(':'));
  }
  unsigned char address[16];
  if (kind == "ipv6" && inet_pton(AF_INET6, Ipv6Of(grpc_peer).c_str(), address) == 1) {
    std::string prefix = "ipv6:";
    for (size_t i = 0; i < kPrefixBytes; ++i) {
      absl::StrAppend(&prefix, absl::Hex(address[i], absl::kZeroPad2));
    }
    return prefix;
  }
  // From a FrameGuard: "unix-abstract:sluice/<process>/<port>/<number>/<peer>".
  if (kind == "unix-abstract" && grpc_peer.find("sluice/") != std::string::npos) {
    return grpc_peer.substr(grpc_peer.rfind('/') + 1);
  }
  return kind;  // unix, or one that nobody knows: all of a kind together
}

}  // namespace sluice::rpc
