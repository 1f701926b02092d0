// The Hugging Face cache: models by name, as `hf download` and transformers keep them.
//
//   HUB/models--ORG--NAME/refs/REVISION          text: a commit, for a branch or tag
//                        /snapshots/COMMIT/FILE  links into ../../blobs (file.h follows them)
//
// HUB is $HF_HUB_CACHE, else $HUGGINGFACE_HUB_CACHE, else $HF_HOME/hub, else
// $XDG_CACHE_HOME/huggingface/hub, else ~/.cache/huggingface/hub. Nothing is downloaded.
#pragma once

#include <string>

#include "absl/status/statusor.h"

namespace sluice::checkpoint {

// The path that `model` stands for: itself if it exists, else the cached snapshot of the model of
// that name ("org/name" or "name") at `revision`, a branch, tag or commit; empty: main.
// NOT_FOUND lists the models, or revisions, that the cache holds; INVALID_ARGUMENT for a revision
// beside a path, or one that is no plain name.
absl::StatusOr<std::string> ResolveModel(const std::string& model, const std::string& revision);

// What clients call the model at the real path `path`: "org/name" for a snapshot of the cache, else
// the last part of the path.
std::string ModelNameOfPath(const std::string& path);

}  // namespace sluice::checkpoint
