// Bad files by name. Each case builds its files into an empty folder; what opens them must refuse
// with one error, within bounds of memory and reading that are measured here:
//
//   one line that holds every word of the case (file, tensor or field, rule) and a way out
//   at most 64 MiB taken from the heap at any moment, Rust's included, over what there was before
//   at most 64 MiB read from files
//   a guard against a hang: 30 s, then the process ends with the case's name
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "services/text/tokenizer.h"
#include "tests/services/checkpoint/checkpoint_builder.h"
#include "tests/services/checkpoint/fails.h"

namespace sluice::bad_files {

using checkpoint::TempDir;

struct BadFile {
  const char* rule;  // Of the reliability rules, "F1" to "F24"; a public case's number in the name
  std::string name;
  std::function<void(const TempDir&)> write;
  std::vector<std::string> words;
  absl::StatusCode code = absl::StatusCode::kInvalidArgument;
};

// Opens what lies in the folder.
using Open = std::function<absl::Status(const std::string& folder)>;

// As the loader does: headers first, then every tensor and file.
absl::Status OpenModel(const std::string& folder);
// As OpenModel(), of model.gguf in the folder.
absl::Status OpenGguf(const std::string& folder);

// All files of the folder go to the tokenizer as the controller hands them over; the chat template,
// when it compiles, is rendered.
absl::Status OpenTokenizer(const std::string& folder);

// Runs the cases, each in a folder of its own, and counts them under `container`.
void ExpectRefused(const char* container, const std::vector<BadFile>& cases,
                   const Open& open = OpenModel);

// Writes one file.
std::function<void(const TempDir&)> File(const std::string& name, const std::string& content);

// `text` again and again.
std::string Copies(size_t count, const std::string& text);

// Short forms of codes.
inline constexpr auto kUnimplemented = absl::StatusCode::kUnimplemented;
inline constexpr auto kNotFound = absl::StatusCode::kNotFound;
inline constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;

}  // namespace sluice::bad_files
