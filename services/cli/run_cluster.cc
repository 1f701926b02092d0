#include "services/cli/run_cluster.h"

#include <unistd.h>

#include <cstdio>
#include <filesystem>
#include <utility>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "services/cli/cluster.h"
#include "services/cli/resources.h"

namespace sluice::cli {
namespace {

namespace fs = std::filesystem;

// Folder of this binary: the other programs lie beside it.
std::string ProgramFolder() {
  std::error_code error;
  return fs::read_symlink("/proc/self/exe", error).parent_path().string();
}

absl::StatusOr<ClusterPaths> MakePaths(const UpOptions& options) {
  ClusterPaths paths;
  paths.programs = ProgramFolder();
  for (const char* program : {"sluice-loader", "sluice-controller", "sluice-worker"}) {
    if (access(absl::StrCat(paths.programs, "/", program).c_str(), X_OK) != 0) {
      return absl::NotFoundError(absl::StrCat(program, " is not beside this program, in ",
                                              paths.programs, "; build or install it there"));
    }
  }
  std::error_code error;
  if (!options.log_dir.empty() && !fs::is_directory(options.log_dir, error) &&
      !fs::create_directories(options.log_dir, error)) {
    return absl::InvalidArgumentError(
        absl::StrCat("--log-dir ", options.log_dir, ": ", error.message()));
  }
  // Sockets' paths are short by force (108 bytes), so not below --log-dir.
  std::string pattern = fs::temp_directory_path(error).string() + "/sluice-XXXXXX";
  if (mkdtemp(pattern.data()) == nullptr) {
    return absl::InternalError(absl::StrCat(
        "no folder can be made in ", fs::temp_directory_path(error).string(), "; set TMPDIR"));
  }
  paths.folder = pattern;
  return paths;
}

}  // namespace

int RunCluster(const UpOptions& options, SignalQueue* signals, ClusterTask* task) {
  auto workers = WorkersOf(options, ThisMachine());
  if (!workers.ok()) {
    std::fprintf(stderr, "sluice: %s\n", std::string(workers.status().message()).c_str());
    return 1;
  }
  auto paths = MakePaths(options);
  if (!paths.ok()) {
    std::fprintf(stderr, "sluice: %s\n", std::string(paths.status().message()).c_str());
    return 1;
  }
  int code = 1;
  {
    Cluster cluster(options, *paths, signals, task);
    code = cluster.Run(*std::move(workers));
  }
  std::error_code error;
  if (code == 0 || !options.log_dir.empty()) {
    fs::remove_all(paths->folder, error);
  } else {
    std::fprintf(stderr, "sluice: the logs are kept in %s\n", paths->folder.c_str());
  }
  return code;
}

}  // namespace sluice::cli
