// From a client's request to one that the scheduler can trust. Pure functions.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "proto/sluice/v1/generation.pb.h"
#include "services/controller/live_request.h"
#include "services/controller/model_catalog.h"

namespace sluice::controller {

// Most of each, before any work is done for a request.
inline constexpr size_t kMaxPromptBytes = 2u << 20;
inline constexpr uint32_t kMaxAnswers = 8;
inline constexpr int kMaxStops = 16;
inline constexpr size_t kMaxStopBytes = 256;
inline constexpr int kMaxStopTokenIds = 64;
inline constexpr int32_t kMaxLogprobs = 20;

// NOT_FOUND with ResourceInfo when `name` is neither empty nor the served model's.
absl::Status CheckModelName(const std::string& name, const ServedModel& model);

// INVALID_ARGUMENT: empty, or not of the form that request ids have.
absl::Status CheckRequestId(const std::string& id);

// INVALID_ARGUMENT with one field violation per bad field; also true for NaN. Looks at no content
// of the prompt.
absl::Status ValidateRequest(const v1::GenerateRequest& request, const ServedModel& model,
                             uint32_t max_model_len);

// Text and ids of a prompt.
struct Prompt {
  std::string text;  // Empty for token ids
  std::vector<uint32_t> ids;
};

// Tokenizes. INVALID_ARGUMENT: no prompt, an id outside the vocabulary, no token at all, a template
// that refuses; FAILED_PRECONDITION: no chat template.
absl::StatusOr<Prompt> MakePrompt(const v1::GenerateRequest& request, const ServedModel& model);

// Validates, tokenizes and fills in defaults. INVALID_ARGUMENT with ErrorInfo PROMPT_TOO_LONG as
// well. The deadline and the arrival are left to the caller.
absl::StatusOr<GenerationRequest> PrepareRequest(const v1::GenerateRequest& request,
                                                 const ServedModel& model, uint32_t max_model_len);

}  // namespace sluice::controller
