#include "services/checkpoint/hf_cache.h"

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <filesystem>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "kernels/core/status_macros.h"
#include "services/checkpoint/file.h"

namespace sluice::checkpoint {
namespace {

namespace fs = std::filesystem;

constexpr char kPrefix[] = "models--";
constexpr size_t kMaxNameBytes = 255;
constexpr size_t kCommitDigits = 40;
constexpr size_t kMaxRefs = 1'000;

// Empty when the variable is not set.
std::string Variable(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

std::string HubFolder() {
  for (const char* name : {"HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"}) {
    if (std::string folder = Variable(name); !folder.empty()) return folder;
  }
  if (const std::string home = Variable("HF_HOME"); !home.empty()) return home + "/hub";
  std::string cache = Variable("XDG_CACHE_HOME");
  if (cache.empty()) cache = Variable("HOME") + "/.cache";
  return cache + "/huggingface/hub";
}

// Parts of letters, digits, '.', '_' and '-', between single slashes; none leaves its folder.
bool IsPlainName(const std::string& name, size_t max_parts) {
  if (name.size() > kMaxNameBytes) return false;
  const std::vector<std::string> parts = absl::StrSplit(name, '/');
  if (parts.size() > max_parts) return false;
  for (const std::string& part : parts) {
    if (part.empty() || part == "." || part == "..") return false;
    for (const char c : part) {
      if (!absl::ascii_isalnum(static_cast<unsigned char>(c)) &&
          !absl::StrContains("._-", {&c, 1})) {
        return false;
      }
    }
  }
  return true;
}

bool IsCommit(const std::string& text) {
  return text.size() == kCommitDigits && std::all_of(text.begin(), text.end(), [](char c) {
           return absl::ascii_isdigit(static_cast<unsigned char>(c)) || (c >= 'a' && c <= 'f');
         });
}

// Names in a folder; none when it is not there.
std::vector<std::string> NamesIn(const std::string& folder) {
  const absl::StatusOr<ModelDir> dir = ModelDir::Open(folder);
  if (!dir.ok()) return {};
  return dir->List().value_or(std::vector<std::string>());
}

std::string NameOfFolder(const std::string& folder) {
  return absl::StrReplaceAll(folder.substr(sizeof(kPrefix) - 1), {{"--", "/"}});
}

absl::Status NoModel(const std::string& model, const std::string& hub) {
  std::vector<std::string> cached;
  for (const std::string& folder : NamesIn(hub)) {
    if (absl::StartsWith(folder, kPrefix)) cached.push_back(NameOfFolder(folder));
  }
  return absl::NotFoundError(absl::StrCat(
      model, ": no such path, and no such model in the Hugging Face cache ", hub, ", which holds ",
      ListText(cached), "; get it with `hf download ", model, "`, or give a folder or .gguf file"));
}

// Branches and tags ("refs/pr/1" lies in folders), then commits.
absl::Status NoRevision(const std::string& model, const std::string& revision,
                        const std::string& folder) {
  std::vector<std::string> there;
  std::error_code error;
  const fs::path refs = folder + "/refs";
  for (fs::recursive_directory_iterator it(refs, error), end; !error && it != end;
       it.increment(error)) {
    if (it->is_regular_file(error)) there.push_back(it->path().lexically_relative(refs).string());
    if (there.size() >= kMaxRefs) break;
  }
  std::sort(there.begin(), there.end());
  for (const std::string& commit : NamesIn(folder + "/snapshots")) there.push_back(commit);
  return absl::NotFoundError(absl::StrCat(
      model, ": revision ", revision, " is not in the Hugging Face cache, which holds ",
      ListText(there), "; get it with `hf download ", model, " --revision ", revision, "`"));
}

// The commit that a branch or tag names; empty when there is no such.
absl::StatusOr<std::string> CommitOf(const std::string& folder, const std::string& revision) {
  const fs::path ref = fs::path(folder) / "refs" / revision;
  const absl::StatusOr<ModelDir> dir = ModelDir::Open(ref.parent_path().string());
  if (!dir.ok()) return std::string();
  const absl::StatusOr<std::unique_ptr<File>> file = dir->OpenFile(ref.filename().string());
  if (absl::IsNotFound(file.status())) return std::string();
  if (!file.ok()) return file.status();
  SLUICE_ASSIGN_OR_RETURN(const std::string text, (*file)->ReadAll(/*cap=*/256));
  const std::string commit(absl::StripAsciiWhitespace(text));
  if (IsCommit(commit)) return commit;
  return absl::InvalidArgumentError(absl::StrCat(ref.string(), ": must hold a commit of ",
                                                 kCommitDigits,
                                                 " hex digits; remove it and run "
                                                 "`hf download` again"));
}

}  // namespace

absl::StatusOr<std::string> ResolveModel(const std::string& model, const std::string& revision) {
  std::error_code error;
  if (fs::exists(model, error)) {
    if (revision.empty()) return model;
    return absl::InvalidArgumentError(absl::StrCat(
        model,
        ": a path has no revision; leave --revision out, or give the name of a model of the "
        "Hugging Face cache"));
  }
  if (!IsPlainName(model, /*max_parts=*/2) || absl::EndsWith(model, ".gguf")) {
    return absl::NotFoundError(absl::StrCat(
        ListText({model}),
        ": No such file or directory; give a Hugging Face model folder, a .gguf file, or "
        "the name (org/name) of a model of the Hugging Face cache"));
  }
  const std::string wanted = revision.empty() ? "main" : revision;
  if (!IsPlainName(wanted, /*max_parts=*/8)) {
    return absl::InvalidArgumentError(
        "--revision must be a branch, a tag or a commit; letters, digits, '.', '_', '-', '/' are "
        "allowed");
  }
  const std::string hub = HubFolder();
  const std::string folder =
      absl::StrCat(hub, "/", kPrefix, absl::StrReplaceAll(model, {{"/", "--"}}));
  if (!fs::is_directory(folder, error)) return NoModel(model, hub);
  SLUICE_ASSIGN_OR_RETURN(std::string commit, CommitOf(folder, wanted));
  if (commit.empty() && IsCommit(wanted)) commit = wanted;
  const std::string snapshot = absl::StrCat(folder, "/snapshots/", commit);
  if (commit.empty() || !fs::is_directory(snapshot, error)) {
    return NoRevision(model, wanted, folder);
  }
  return snapshot;
}

std::string ModelNameOfPath(const std::string& path) {
  const fs::path real = path;
  const fs::path cached = real.parent_path().parent_path();
  const std::string folder = cached.filename().string();
  if (real.parent_path().filename() == "snapshots" && absl::StartsWith(folder, kPrefix)) {
    return NameOfFolder(folder);
  }
  return real.filename().string();
}

}  // namespace sluice::checkpoint
