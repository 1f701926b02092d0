// The one place where absl::Status becomes grpc::Status and back. Codes are numerically equal.
#pragma once

#include <grpcpp/support/status.h>

#include "absl/status/status.h"

namespace sluice::rpc {

// Keeps code and message (cut to 1024 bytes: it travels in a header) and the details attached with AttachDetails.
grpc::Status ToGrpcStatus(const absl::Status& status);

// Keeps code, message and the serialized google.rpc.Status.
absl::Status FromGrpcStatus(const grpc::Status& status);

}  // namespace sluice::rpc
