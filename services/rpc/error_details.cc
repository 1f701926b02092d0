#include "services/rpc/error_details.h"

#include "absl/strings/cord.h"

namespace sluice::rpc {

void AttachDetail(const google::protobuf::Message& detail, absl::Status* status) {
  status->SetPayload("type.googleapis.com/" + detail.GetDescriptor()->full_name(),
                     absl::Cord(detail.SerializeAsString()));
}

void AttachFieldViolation(const std::string& field, const std::string& description,
                          absl::Status* status) {
  google::rpc::BadRequest detail =
      GetDetail<google::rpc::BadRequest>(*status).value_or(google::rpc::BadRequest());
  auto* violation = detail.add_field_violations();
  violation->set_field(field);
  violation->set_description(description);
  AttachDetail(detail, status);
}

void AttachErrorInfo(const std::string& reason, const std::map<std::string, std::string>& metadata,
                     absl::Status* status) {
  google::rpc::ErrorInfo detail;
  detail.set_reason(reason);
  detail.set_domain("sluice");
  for (const auto& [key, value] : metadata) {
    (*detail.mutable_metadata())[key] = value;
  }
  AttachDetail(detail, status);
}

void AttachRetryInfo(int64_t delay_ms, absl::Status* status) {
  google::rpc::RetryInfo detail;
  detail.mutable_retry_delay()->set_seconds(delay_ms / 1000);
  detail.mutable_retry_delay()->set_nanos(static_cast<int32_t>(delay_ms % 1000 * 1000000));
  AttachDetail(detail, status);
}

void AttachQuotaFailure(const std::string& subject, const std::string& description,
                        absl::Status* status) {
  google::rpc::QuotaFailure detail;
  auto* violation = detail.add_violations();
  violation->set_subject(subject);
  violation->set_description(description);
  AttachDetail(detail, status);
}

void AttachResourceInfo(const std::string& type, const std::string& name, absl::Status* status) {
  google::rpc::ResourceInfo detail;
  detail.set_resource_type(type);
  detail.set_resource_name(name);
  AttachDetail(detail, status);
}

absl::Status FieldError(const std::string& field, const std::string& description) {
  absl::Status status = absl::InvalidArgumentError(field + ": " + description);
  AttachFieldViolation(field, description, &status);
  return status;
}

}  // namespace sluice::rpc
