// Listening TCP sockets of one address.
#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace sluice::rpc {

// Listens on "host:port" (port 0: the system chooses; *port tells). A name may have several
// addresses: all that can be bound. 0.0.0.0 takes IPv6 clients too where there is IPv6. The sockets
// do not block; the caller closes them. INVALID_ARGUMENT, UNAVAILABLE.
absl::StatusOr<std::vector<int>> ListenTcp(const std::string& address, int* port);

}  // namespace sluice::rpc
