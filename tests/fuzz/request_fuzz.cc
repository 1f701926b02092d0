// A serialized GenerateRequest, as it comes from a client, up to what the scheduler gets.
#include <google/protobuf/stubs/logging.h>

#include <cmath>

#include "kernels/core/check.h"
#include "services/controller/request_validation.h"
#include "tests/fuzz/fuzz_target.h"
#include "tests/fuzz/small_tokenizer.h"

namespace sluice::fuzz {
namespace {

constexpr uint32_t kMaxModelLen = 64;

controller::ServedModel MakeModel() {
  controller::ServedModel model;
  model.name = "tiny";
  model.shards.mutable_config()->set_vocab_size(97);
  auto tokenizer = text::Tokenizer::Load(
      {{"tokenizer.json", SmallTokenizerJson()},
       {"chat_template.jinja", "{% for m in messages %}{{ m.role }}:{{ m.content }}{% endfor %}"}});
  SLUICE_CHECK(tokenizer.ok()) << tokenizer.status();
  model.tokenizer = *std::move(tokenizer);
  model.eos_ids = {1};
  return model;
}

// What the scheduler and the workers rely on.
void CheckPrepared(const controller::GenerationRequest& prepared,
                   const controller::ServedModel& model) {
  const auto& spec = prepared.spec;
  const auto& sampling = spec.sampling;
  SLUICE_CHECK(spec.n >= 1 && spec.n <= controller::kMaxAnswers) << spec.n;
  SLUICE_CHECK(!spec.prompt.empty() && spec.prompt.size() + spec.max_tokens <= kMaxModelLen);
  SLUICE_CHECK(spec.max_tokens >= 1);
  for (const uint32_t id : spec.prompt) SLUICE_CHECK(id < model.shards.config().vocab_size());
  SLUICE_CHECK(std::isfinite(sampling.temperature()) && sampling.temperature() >= 0);
  SLUICE_CHECK(sampling.top_p() > 0 && sampling.top_p() <= 1);
  SLUICE_CHECK(sampling.min_p() >= 0 && sampling.min_p() <= 1);
  SLUICE_CHECK(sampling.repetition_penalty() > 0 && std::isfinite(sampling.repetition_penalty()));
  SLUICE_CHECK(sampling.num_logprobs() >= -1 &&
               sampling.num_logprobs() <= controller::kMaxLogprobs);
}

}  // namespace

std::vector<std::string> Seeds() {
  v1::GenerateRequest text;
  text.set_text("ab ab");
  text.set_temperature(0.5F);
  text.set_max_tokens(8);
  text.add_stop("b");
  text.add_stop_token_ids(3);
  v1::GenerateRequest ids;
  ids.set_model("tiny");
  for (const uint32_t id : {2U, 3U, 4U}) ids.mutable_token_ids()->add_ids(id);
  ids.set_n(2);
  ids.set_top_k(5);
  ids.set_top_p(0.9F);
  ids.set_logprobs(3);
  ids.set_seed(7);
  ids.set_echo(true);
  v1::GenerateRequest chat;
  v1::ChatMessage* message = chat.mutable_chat_messages()->add_messages();
  message->set_role("user");
  message->set_content("ab <s>");
  chat.set_min_tokens(1);
  chat.set_ignore_eos(true);
  chat.set_request_id("a-1");
  return {text.SerializeAsString(), ids.SerializeAsString(), chat.SerializeAsString()};
}

}  // namespace sluice::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace sluice;  // NOLINT(google-build-using-namespace)
  // protobuf would print a line for each string that is no UTF-8.
  [[maybe_unused]] static auto* const before = google::protobuf::SetLogHandler(nullptr);
  static const auto* const kModel = new controller::ServedModel(fuzz::MakeModel());
  v1::GenerateRequest request;
  if (!request.ParseFromArray(data, static_cast<int>(size))) return 0;
  const auto prepared = controller::PrepareRequest(request, *kModel, fuzz::kMaxModelLen);
  if (prepared.ok()) {
    fuzz::CheckPrepared(*prepared, *kModel);
  } else {
    SLUICE_CHECK(prepared.status().code() != absl::StatusCode::kInternal) << prepared.status();
  }
  return 0;
}
