#include "services/rpc/listen_socket.h"

#include <netdb.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

namespace sluice::rpc {
namespace {

int BindAndListen(const addrinfo& at) {
  const int fd = socket(at.ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  if (fd < 0) {
    return -1;
  }
  const int on = 1, off = 0;
  setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
  if (at.ai_family == AF_INET6) {
    setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof(off));  // IPv4 clients too
  }
  if (bind(fd, at.ai_addr, at.ai_addrlen) != 0 || listen(fd, SOMAXCONN) != 0) {
    close(fd);
    return -1;
  }
  return fd;
}

int PortOf(int fd) {
  sockaddr_storage bound = {};
  socklen_t size = sizeof(bound);
  getsockname(fd, reinterpret_cast<sockaddr*>(&bound), &size);
  return ntohs(bound.ss_family == AF_INET ? reinterpret_cast<sockaddr_in&>(bound).sin_port
                                          : reinterpret_cast<sockaddr_in6&>(bound).sin6_port);
}

// Binds what `host` means into `fds`. A port of 0 becomes the first one that the system chose.
void ListenOn(const std::string& host, const std::string& wanted_port, std::vector<int>* fds,
              int* port) {
  addrinfo hints = {};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE;
  addrinfo* found = nullptr;
  if (getaddrinfo(host.empty() ? nullptr : host.c_str(), wanted_port.c_str(), &hints, &found) !=
      0) {
    return;
  }
  for (const addrinfo* at = found; at != nullptr; at = at->ai_next) {
    if (!fds->empty()) {  // The others get the same port
      const auto same = htons(static_cast<uint16_t>(*port));
      if (at->ai_family == AF_INET) {
        reinterpret_cast<sockaddr_in*>(at->ai_addr)->sin_port = same;
      } else {
        reinterpret_cast<sockaddr_in6*>(at->ai_addr)->sin6_port = same;
      }
    }
    if (const int fd = BindAndListen(*at); fd >= 0) {
      fds->push_back(fd);
      *port = PortOf(fd);
    }
  }
  freeaddrinfo(found);
}

}  // namespace

absl::StatusOr<std::vector<int>> ListenTcp(const std::string& address, int* port) {
  const size_t colon = address.rfind(':');
  if (colon == std::string::npos) {
    return absl::InvalidArgumentError("\"" + address + "\" is no host:port");
  }
  std::string host = address.substr(0, colon);
  if (host.size() > 2 && host.front() == '[' && host.back() == ']') {
    host = host.substr(1, host.size() - 2);
  }
  std::vector<int> fds;
  if (host == "0.0.0.0" || host.empty()) {
    ListenOn("::", address.substr(colon + 1), &fds, port);
  }
  if (fds.empty()) {
    ListenOn(host, address.substr(colon + 1), &fds, port);
  }
  if (fds.empty()) {
    return absl::UnavailableError("cannot listen on " + address +
                                  ": the port is taken or the address is not one of this host; "
                                  "choose another, or port 0");
  }
  return fds;
}

}  // namespace sluice::rpc
