// chat_template.jinja beside a small tokenizer, rendered for two conversations.
#include "kernels/core/check.h"
#include "services/text/tokenizer.h"
#include "tests/fuzz/fuzz_target.h"
#include "tests/fuzz/small_tokenizer.h"

namespace sluice::fuzz {

std::vector<std::string> Seeds() {
  return {
      "{{ bos_token }}{% for message in messages %}{{ message['role'] + ': ' + message['content'] "
      "}}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}",
      "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
      "{% generation %}{{ m.content | trim | upper }}{% endgeneration %}{% endfor %}{{ ns.n }}",
      "{% macro f(x) %}{{ x | tojson }}{% endmacro %}{{ f(messages) }}{{ strftime_now('%Y') }}",
      "{{ raise_exception('no') }}", "{{ messages[-1].content.split('a')[0] ~ 'x' * 3 }}"};
}

}  // namespace sluice::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace sluice;  // NOLINT(google-build-using-namespace)
  static const auto* const kTokenizerJson = new std::string(fuzz::SmallTokenizerJson());
  const auto tokenizer = text::Tokenizer::Load(
      {{"tokenizer.json", *kTokenizerJson},
       {"chat_template.jinja", std::string(reinterpret_cast<const char*>(data), size)}});
  if (!tokenizer.ok()) {
    SLUICE_CHECK(tokenizer.status().code() != absl::StatusCode::kInternal) << tokenizer.status();
    return 0;
  }
  if (!(*tokenizer)->has_chat_template()) return 0;
  const std::vector<text::Tokenizer::ChatMessage> messages = {{"user", "ab <s>"}, {"x", ""}};
  const auto prompt = (*tokenizer)->ApplyChatTemplate(messages, true);
  const auto ids = (*tokenizer)->EncodeChat(messages, false);
  SLUICE_CHECK(prompt.status().code() != absl::StatusCode::kInternal) << prompt.status();
  SLUICE_CHECK(ids.status().code() != absl::StatusCode::kInternal) << ids.status();
  return 0;
}
