#include "services/rpc/frame_guard.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "services/rpc/listen_socket.h"
#include "services/rpc/log.h"
#include "services/rpc/peer_limits.h"

namespace sluice::rpc {
namespace {

constexpr size_t kMostBuffered = 256 << 10;  // Of one direction; then the sender waits
constexpr size_t kReadBytes = 64 << 10;
constexpr uint32_t kFilesForOthers = 64;    // Links, logs, the model's loader
constexpr uint32_t kFilesOfConnection = 3;  // The client's socket and the pair
constexpr std::chrono::milliseconds kTick{500};
constexpr std::chrono::milliseconds kPausedTick{5};
constexpr std::chrono::seconds kLastWrites{1};

uint32_t ConnectionsThatFit() {
  rlimit limit = {};
  getrlimit(RLIMIT_NOFILE, &limit);
  const auto files = static_cast<uint64_t>(std::min<rlim_t>(limit.rlim_cur, 1 << 20));
  return static_cast<uint32_t>(
      std::max<int64_t>(4, (static_cast<int64_t>(files) - kFilesForOthers) / kFilesOfConnection));
}

// As gRPC names peers: "ipv4:1.2.3.4:567", "ipv6:[::1]:567".
std::string PeerName(const sockaddr_storage& address) {
  char host[INET6_ADDRSTRLEN] = {};
  if (address.ss_family == AF_INET) {
    const auto& ipv4 = reinterpret_cast<const sockaddr_in&>(address);
    inet_ntop(AF_INET, &ipv4.sin_addr, host, sizeof(host));
    return absl::StrCat("ipv4:", host, ":", ntohs(ipv4.sin_port));
  }
  const auto& ipv6 = reinterpret_cast<const sockaddr_in6&>(address);
  if (IN6_IS_ADDR_V4MAPPED(&ipv6.sin6_addr)) {
    inet_ntop(AF_INET, ipv6.sin6_addr.s6_addr + 12, host, sizeof(host));
    return absl::StrCat("ipv4:", host, ":", ntohs(ipv6.sin6_port));
  }
  inet_ntop(AF_INET6, &ipv6.sin6_addr, host, sizeof(host));
  return absl::StrCat("ipv6:[", host, "]:", ntohs(ipv6.sin6_port));
}

// Writes as much of `out` as the socket takes. False: it is broken.
bool WriteSome(int fd, std::string* out) {
  size_t done = 0;
  while (done < out->size()) {
    const ssize_t n = send(fd, out->data() + done, out->size() - done, MSG_NOSIGNAL);
    if (n < 0 && errno == EINTR) {
      continue;
    }
    if (n < 0 && errno != EAGAIN) {
      return false;
    }
    if (n <= 0) {
      break;
    }
    done += static_cast<size_t>(n);
  }
  out->erase(0, done);
  return true;
}

}  // namespace

struct FrameGuard::Connection {
  Connection(const FrameLimits& limits, Clock::time_point now) : scan(limits, now), began(now) {}

  int client = -1, server = -1;
  std::string peer;
  FrameScan scan;
  Clock::time_point began;
  Clock::time_point server_end = Clock::time_point::max();  // When gRPC ended it
  std::string held;                                         // Of the client, not judged yet
  std::string to_server, to_client;
  bool client_ended = false, server_ended = false, shut = false;
  bool paused = false;
  uint32_t watched_client = 0, watched_server = 0;  // Events that epoll tells of
};

FrameGuard::FrameGuard(const GuardOptions& options, std::function<void(int)> hand)
    : options_(options), hand_(std::move(hand)) {
  options_.max_connections = std::min(options_.max_connections, ConnectionsThatFit());
  options_.max_connections_per_peer =
      std::max(1u, std::min(options_.max_connections_per_peer, options_.max_connections / 2));
  epoll_fd_ = epoll_create1(EPOLL_CLOEXEC);
  wake_fd_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  spare_fd_ = open("/dev/null", O_RDONLY | O_CLOEXEC);
}

absl::StatusOr<std::unique_ptr<FrameGuard>> FrameGuard::Start(const GuardOptions& options,
                                                              std::function<void(int)> hand) {
  auto guard = std::unique_ptr<FrameGuard>(new FrameGuard(options, std::move(hand)));
  auto listeners = ListenTcp(options.address, &guard->port_);
  if (!listeners.ok()) {
    return listeners.status();
  }
  guard->listeners_ = *std::move(listeners);
  guard->thread_ = std::thread([raw = guard.get()] { raw->Run(); });
  return guard;
}

FrameGuard::~FrameGuard() {
  stop_ = true;
  StopListening();
  if (thread_.joinable()) {
    thread_.join();
  }
  for (const int fd : listeners_) {
    close(fd);
  }
  for (const int fd : {epoll_fd_, wake_fd_, spare_fd_}) {
    close(fd);
  }
}

void FrameGuard::StopListening() {
  listening_ = false;
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t written = write(wake_fd_, &one, sizeof(one));
}

void FrameGuard::Run() {
  std::vector<int> first = listeners_;
  first.push_back(wake_fd_);
  for (const int fd : first) {
    epoll_event event = {EPOLLIN, {.fd = fd}};
    epoll_ctl(epoll_fd_, EPOLL_CTL_ADD, fd, &event);
  }
  Clock::time_point next_look{}, last = Clock::time_point::max();
  while (connections_.empty() ? !stop_.load() : Clock::now() < last) {
    epoll_event events[64];
    const auto tick = any_paused_ ? kPausedTick : kTick;
    const int count = epoll_wait(epoll_fd_, events, 64, static_cast<int>(tick.count()));
    const Clock::time_point now = Clock::now();
    for (int i = 0; i < count; ++i) {
      OnEvent(events[i].data.fd, events[i].events, now);
    }
    if (!listening_) {
      for (const int fd : std::exchange(listeners_, {})) {
        close(fd);
      }
    }
    if (now >= next_look || any_paused_) {
      next_look = now + kTick;
      OnTime(now);
    }
    if (stop_ && last == Clock::time_point::max()) {
      last = now + kLastWrites;
    }
  }
  while (!connections_.empty()) {
    Close(connections_.begin()->first);
  }
}

void FrameGuard::OnEvent(int fd, uint32_t events, Clock::time_point now) {
  const auto it = by_fd_.find(fd);
  if (it != by_fd_.end()) {
    Connection* connection = it->second;
    // One that must wait and leaves: nobody wants what it has sent.
    const uint32_t gone = EPOLLHUP | EPOLLERR | (connection->paused ? EPOLLRDHUP : 0u);
    const bool client_gone = fd == connection->client && (events & gone) != 0;
    if (client_gone || !Serve(connection, now)) {
      Close(connection);
    }
  } else if (fd == wake_fd_) {
    uint64_t times = 0;
    [[maybe_unused]] const ssize_t got = read(wake_fd_, &times, sizeof(times));
  } else if (std::find(listeners_.begin(), listeners_.end(), fd) != listeners_.end()) {
    Accept(fd);
  }
}

void FrameGuard::Accept(int listener) {
  while (true) {
    sockaddr_storage address = {};
    socklen_t size = sizeof(address);
    const int fd = accept4(listener, reinterpret_cast<sockaddr*>(&address), &size,
                           SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd >= 0) {
      Admit(fd, PeerLimits::PeerOf(PeerName(address)));
    } else if ((errno == EMFILE || errno == ENFILE) && spare_fd_ >= 0) {
      close(spare_fd_);  // Else the listener would stay readable, and the client wait in vain
      close(accept(listener, nullptr, nullptr));
      spare_fd_ = open("/dev/null", O_RDONLY | O_CLOEXEC);
    } else if (errno != EINTR && errno != ECONNABORTED) {
      return;
    }
  }
}

void FrameGuard::Admit(int client, const std::string& peer) {
  const auto known = by_peer_.find(peer);
  const bool full = connections_.size() >= options_.max_connections ||
                    (known != by_peer_.end() && known->second >= options_.max_connections_per_peer);
  const int inside = full ? -1 : MakeInside(peer);
  if (inside < 0) {
    close(client);
    return;
  }
  const int on = 1;
  setsockopt(client, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
  auto made = std::make_unique<Connection>(options_.frames, Clock::now());
  Connection* connection = made.get();
  connection->client = client;
  connection->server = inside;
  connection->peer = peer;
  ++by_peer_[peer];
  connections_[connection] = std::move(made);
  by_fd_[client] = by_fd_[inside] = connection;
  Watch(connection);
}

// A pair of Unix sockets; one goes to gRPC, which gives the name of ours, the result, as the peer.
// Negative: files have run out.
int FrameGuard::MakeInside(const std::string& peer) {
  int pair[2];
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, pair) != 0) {
    return -1;
  }
  sockaddr_un name = {};
  name.sun_family = AF_UNIX;
  const std::string text =
      absl::StrCat("sluice/", getpid(), "/", port_, "/", next_name_++, "/", peer);
  const size_t length = std::min(text.size(), sizeof(name.sun_path) - 1);
  std::memcpy(name.sun_path + 1, text.data(), length);
  const size_t size = offsetof(sockaddr_un, sun_path) + 1 + length;
  if (bind(pair[0], reinterpret_cast<sockaddr*>(&name), static_cast<socklen_t>(size)) != 0) {
    close(pair[0]);
    close(pair[1]);
    return -1;
  }
  hand_(pair[1]);
  return pair[0];
}

// False: the connection has ended.
bool FrameGuard::Serve(Connection* connection, Clock::time_point now) {
  FromServer(connection);
  if (!FromClient(connection, now)) {
    return false;
  }
  if (!WriteSome(connection->server, &connection->to_server)) {
    connection->to_server.clear();
    connection->client_ended = connection->shut = true;  // gRPC reads no more; it may still write
  }
  if (!WriteSome(connection->client, &connection->to_client)) {
    return false;
  }
  if (connection->client_ended && !connection->paused && connection->to_server.empty() &&
      !connection->shut) {
    connection->shut = true;
    shutdown(connection->server, SHUT_WR);
  }
  if (connection->server_ended) {
    connection->server_end = std::min(connection->server_end, now);
    if (connection->to_client.empty()) {
      return false;
    }
  }
  Watch(connection);
  return true;
}

bool FrameGuard::FromClient(Connection* connection, Clock::time_point now) {
  if (connection->paused && now < connection->scan.wait_until()) {
    return true;
  }
  char buffer[kReadBytes];
  if (!connection->client_ended && connection->held.size() < kReadBytes &&
      connection->to_server.size() < kMostBuffered) {
    const ssize_t got = recv(connection->client, buffer, sizeof(buffer), 0);
    if (got < 0 && errno != EAGAIN && errno != EINTR) {
      return false;
    }
    connection->client_ended = got == 0;
    connection->held.append(buffer, static_cast<size_t>(std::max<ssize_t>(0, got)));
  }
  const auto verdict = connection->scan.FromClient(now, &connection->held, &connection->to_server);
  connection->paused = verdict == FrameScan::Verdict::kWait;
  any_paused_ = any_paused_ || connection->paused;
  if (verdict == FrameScan::Verdict::kEnd) {
    if (now >= next_log_) {  // A flood of them must not become one of lines
      next_log_ = now + std::chrono::seconds(1);
      LogInfo("connection_ended",
              {{"peer", connection->peer}, {"reason", connection->scan.reason()}});
    }
    return false;
  }
  return true;
}

void FrameGuard::FromServer(Connection* connection) {
  char buffer[kReadBytes];
  while (!connection->server_ended && connection->to_client.size() < kMostBuffered) {
    const ssize_t got = recv(connection->server, buffer, sizeof(buffer), 0);
    if (got < 0) {
      connection->server_ended = errno != EAGAIN && errno != EINTR;
      break;
    }
    connection->server_ended = got == 0;
    connection->scan.FromServer(buffer, static_cast<size_t>(got));
    connection->to_client.append(buffer, static_cast<size_t>(got));
  }
}

void FrameGuard::Watch(Connection* connection) {
  // A socket of which nothing is wanted is taken out: its hang-up would be told again and again.
  const auto want = [&](int fd, uint32_t events, uint32_t* watched) {
    epoll_event event = {events, {.fd = fd}};
    if (events != *watched) {
      const int how = *watched == 0 ? EPOLL_CTL_ADD : events == 0 ? EPOLL_CTL_DEL : EPOLL_CTL_MOD;
      epoll_ctl(epoll_fd_, how, fd, &event);
    }
    *watched = events;
  };
  const bool reads_client = !connection->paused && !connection->client_ended &&
                            connection->to_server.size() < kMostBuffered;
  const bool reads_server =
      !connection->server_ended && connection->to_client.size() < kMostBuffered;
  want(connection->client,
       (reads_client ? EPOLLIN : 0u) | (connection->to_client.empty() ? 0u : EPOLLOUT) |
           (connection->paused ? EPOLLRDHUP : 0u),
       &connection->watched_client);
  want(connection->server,
       (reads_server ? EPOLLIN : 0u) | (connection->to_server.empty() ? 0u : EPOLLOUT),
       &connection->watched_server);
}

void FrameGuard::Close(Connection* connection) {
  for (const int fd : {connection->client, connection->server}) {
    by_fd_.erase(fd);
    close(fd);
  }
  const auto peer = by_peer_.find(connection->peer);
  if (--peer->second == 0) {
    by_peer_.erase(peer);
  }
  connections_.erase(connection);
}

// Connections whose wait is over, those that never said anything, and those whose client does not
// take the end.
void FrameGuard::OnTime(Clock::time_point now) {
  std::vector<Connection*> over, due;
  any_paused_ = false;
  for (const auto& [connection, owned] : connections_) {
    if ((!connection->scan.greeted() && now >= connection->began + options_.patience) ||
        now - options_.patience >= connection->server_end) {
      over.push_back(connection);
    } else if (connection->paused) {
      any_paused_ = true;
      due.push_back(connection);
    }
  }
  for (Connection* connection : over) {
    Close(connection);
  }
  for (Connection* connection : due) {
    if (now >= connection->scan.wait_until() && !Serve(connection, now)) {
      Close(connection);
    }
  }
}

}  // namespace sluice::rpc
