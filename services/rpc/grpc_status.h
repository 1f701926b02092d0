// The one place where absl::Status becomes grpc::Status and back. Codes are numerically equal.
#pragma once

#include <grpcpp/support/status.h>

#include "absl/status/status.h"

namespace sluice::rpc {

// Keeps code and message (cut to 1024 bytes: it travels in a header) and the details of
// error_details.h, as a serialized google.rpc.Status. Details that would not fit in the 8 KiB of a
// peer's headers are left out.
grpc::Status ToGrpcStatus(const absl::Status& status);

// Keeps code, message and the details of a serialized google.rpc.Status. A code that does not exist
// is UNKNOWN.
absl::Status FromGrpcStatus(const grpc::Status& status);

}  // namespace sluice::rpc
