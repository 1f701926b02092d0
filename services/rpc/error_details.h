// Details of google.rpc on an absl::Status: each is a payload whose type URL is the one that
// google.protobuf.Any uses, so ToGrpcStatus only copies them. Each type at most once (AIP-193): a
// second one of a type replaces the first.
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "absl/status/status.h"
#include "absl/types/optional.h"
#include "proto/google/rpc/error_details.pb.h"

namespace sluice::rpc {

// Attaches any google.rpc message. Nothing happens when `status` is OK.
void AttachDetail(const google::protobuf::Message& detail, absl::Status* status);

// Adds one violation to the status's BadRequest. `field` is a path such as "sampling.top_p".
void AttachFieldViolation(const std::string& field, const std::string& description,
                          absl::Status* status);

// ErrorInfo with domain "sluice". `reason` is UPPER_SNAKE_CASE.
void AttachErrorInfo(const std::string& reason, const std::map<std::string, std::string>& metadata,
                     absl::Status* status);

// When the client may try again.
void AttachRetryInfo(int64_t delay_ms, absl::Status* status);

// Which limit is full, e.g. ("queue", "64 requests are waiting, the limit is 64").
void AttachQuotaFailure(const std::string& subject, const std::string& description,
                        absl::Status* status);

// Which resource was not found, e.g. ("model", "llama").
void AttachResourceInfo(const std::string& type, const std::string& name, absl::Status* status);

// INVALID_ARGUMENT "<field>: <description>" with its BadRequest.
absl::Status FieldError(const std::string& field, const std::string& description);

// The detail of type `Detail`, if there is one and it parses.
template <typename Detail>
absl::optional<Detail> GetDetail(const absl::Status& status) {
  const auto payload =
      status.GetPayload("type.googleapis.com/" + Detail::descriptor()->full_name());
  Detail detail;
  if (!payload.has_value() || !detail.ParseFromString(std::string(*payload))) {
    return absl::nullopt;
  }
  return detail;
}

}  // namespace sluice::rpc
