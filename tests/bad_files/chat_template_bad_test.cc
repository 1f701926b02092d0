// Bad chat templates: what does not compile, and what does not end well when it is rendered.
#include <gtest/gtest.h>

#include "tests/bad_files/bad_file.h"
#include "tests/fuzz/small_tokenizer.h"

namespace sluice::bad_files {
namespace {

// llama-cpp-python CVE-2024-34359: a template that reaches Python; vLLM PYSEC-2026-2013 and
// CVE-2026-115911: one that never ends.
// NOLINTNEXTLINE(readability-function-size): a table
TEST(BadFilesTest, ChatTemplates) {
  const auto source = [](const std::string& text) {
    return [=](const TempDir& dir) {
      dir.Write("tokenizer.json", fuzz::SmallTokenizerJson());
      dir.Write("chat_template.jinja", text);
    };
  };
  std::vector<BadFile> cases;
  const auto add = [&](const std::string& name, const std::string& text, const std::string& word) {
    cases.push_back({"F22", name, source(text), {"chat template", word}});
  };
  add("a loop of 10^9", "{% for i in range(1000000000) %}{% endfor %}", "");
  add("nested loops of 10^8",
      "{% for i in range(9999) %}{% for j in range(9999) %}{% set x = i %}{% endfor %}{% endfor %}",
      "steps");
  add("recursion", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion");
  add("a string that doubles 99 times",
      "{% set ns = namespace(s='x') %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}"
      "{% endfor %}",
      "steps");
  add("a string of 10^9 bytes", "{{ 'x' * 1000000000 }}", "");
  add("a string of 2^63 bytes", "{{ 'x' * 9223372036854775807 }}", "");
  add("a list of 10^9", "{{ (messages | list) * 1000000000 }}", "");
  add("10 MB of output", "{% for i in range(9999) %}{{ 'y' * 1000 }}{% endfor %}", "longer than");
  add("centered in 10^9", "{{ 'x'.center(1000000000) }}", "");
  add("indented by 10^9", "{{ messages | tojson(indent=1000000000) * 1000000 }}", "");
  add("replaced 10^6 times over", "{{ ('a' * 10000).replace('a', 'b' * 10000) }}", "");
  add("joined by a long text", "{{ range(9999) | join('x' * 100000) }}", "");
  add("formatted to 10^9 places", "{{ '%1000000000d' | format(1) }}", "");
  add("include of a file", "{% include '/etc/passwd' %}", "");
  add("import of a file", "{% import '/etc/passwd' as x %}{{ x }}", "");
  add("extends a file", "{% extends '/etc/passwd' %}", "");
  add("Python's classes", "{{ ''.__class__.__mro__[1].__subclasses__() }}", "");
  add("Python's os", "{{ cycler.__init__.__globals__.os.popen('id').read() }}", "");
  add("a function that is not there", "{{ open('/etc/passwd') }}", "");
  add("a filter that is not there", "{{ 'x' | attr_of_os }}", "");
  add("its own words", "{{ raise_exception('roles must alternate') }}", "roles must alternate");
  add("division by zero", "{{ 1 // 0 }}", "");
  add("an open loop", "{% for %}", "does not compile");
  add("an open expression", "{{ 1 +", "does not compile");
  add("an unknown tag", "{% nonsense %}", "does not compile");
  add("an open block", "{% if x %}", "does not compile");
  add("20,000 parentheses", "{{ " + Copies(20'000, "(") + "1" + Copies(20'000, ")") + " }}", "");
  add("20,000 blocks", Copies(20'000, "{% if true %}"), "");
  add("20,000 signs", "{{ " + Copies(20'000, "-") + "1 }}", "");
  add("20,000 nots", "{{ " + Copies(20'000, "not ") + "1 }}", "");
  add("20,000 filters", "{{ 1" + Copies(20'000, "|abs|a") + " }}", "");
  // Found by tests/fuzz: a panic.
  add("a tag that shares its sign", "{%}", "does not compile");
  add("a tag that shares its sign, with a block", "{%}{% generation %}", "does not compile");
  // Found here: the parser's recursion ended the process.
  add("100,000 signs", "{{ " + Copies(100'000, "-") + "1 }}", "a tag of");
  add("20,000 words", "{{ a" + Copies(20'000, " and a") + " }}", "a tag of");
  add("20,000 conditions", "{{ a" + Copies(20'000, " if a else a") + " }}", "a tag of");
  add("20,000 tests", "{{ a" + Copies(20'000, " is not a") + " }}", "a tag of");
  add("20,000 members", "{{ a" + Copies(20'000, ".a") + " }}", "a tag of");
  add("20,000 calls", "{{ a" + Copies(20'000, "()") + " }}", "a tag of");
  add("20,000 powers", "{{ 1" + Copies(20'000, "**1") + " }}", "a tag of");
  add("20,000 elifs", "{% if a %}" + Copies(20'000, "{% elif a %}") + "{% endif %}", "elif");
  add("999 signs and an error", "{{ " + Copies(995, "-") + "nothing }}", "");
  add("1,000 elifs and an error",
      "{% if a %}" + Copies(1'000, "{% elif a %}") + "{% endif %}{{ 1 // 0 }}", "1 // 0");
  add("20,000 brackets", "{{ " + Copies(20'000, "[") + " }}", "");
  add("256 KiB and one byte", std::string((256 << 10) + 1, 'x'), "limit");
  cases.push_back({"F22", "not UTF-8", source("\xFF"), {"chat_template.jinja", "UTF-8"}});
  cases.push_back({"F22",
                   "no template at all",
                   File("tokenizer.json", fuzz::SmallTokenizerJson()),
                   {"no chat template"},
                   absl::StatusCode::kFailedPrecondition});
  ExpectRefused("chat template", cases, OpenTokenizer);
}

}  // namespace
}  // namespace sluice::bad_files
