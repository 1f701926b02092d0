// The command lines of the processes that `sluice up` starts, and the files in which they say where
// they listen.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "services/cli/resources.h"

namespace sluice::cli {

// What a user says to `sluice up`. 0 and "" mean: chosen by us, or the program's own default.
struct UpOptions {
  std::string model;
  std::string revision;
  std::string model_name;
  int workers = 0;  // 0: the devices of max_memory, or 1
  std::string device = "cpu";
  std::string device_map = "auto";
  std::string max_memory;
  std::string dtype = "auto";
  std::string host = "127.0.0.1";
  int port = 50051;        // 0: any free one
  int admin_port = 50052;  // 0: any free one
  int metrics_port =
      -1;           // Of the controller; loader and workers follow. 0: any free ones; -1: none
  int threads = 0;  // Of each CPU worker
  int max_batch_size = 0;
  int max_batch_tokens = 0;
  int max_model_len = 0;
  int block_size = 0;
  int max_queue = -1;
  std::string log_level = "info";
  std::string log_dir;  // Empty: the run folder, removed at a clean end
};

// One worker process.
struct WorkerSpec {
  std::string id;
  std::string device;    // "cpu" or "cuda:N"
  int device_index = 0;  // -1: the "cpu" device beside GPUs
  int threads = 0;       // CPU only
  uint64_t memory_bytes = 0;
  int position = 0;  // Among the workers, from 0
};

// Which workers to start: numbers 0 .. n-1, and one more for a "cpu" in max_memory.
// INVALID_ARGUMENT: max_memory cannot be read, names numbers that are not 0 .. n-1, or a GPU worker
// has no entry there.
absl::StatusOr<std::vector<WorkerSpec>> WorkersOf(const UpOptions& options,
                                                  const Resources& resources);

// `folder`: the run folder, for address files and sockets. `programs`: folder of the binaries.
struct ClusterPaths {
  std::string programs;
  std::string folder;
  std::string loader_file() const { return folder + "/loader.address"; }
  std::string controller_file() const { return folder + "/controller.address"; }
};

// Where a running process listens; empty: any free port of the loopback interface.
struct ControllerAddresses {
  std::string public_address;
  std::string internal_address;
  std::string admin_address;
  std::string metrics_address;  // Empty: none, or not known yet
};

std::vector<std::string> LoaderCommand(const UpOptions& options, const ClusterPaths& paths,
                                       const std::string& address);
std::vector<std::string> ControllerCommand(const UpOptions& options, const ClusterPaths& paths,
                                           const std::string& loader_address, int workers,
                                           const ControllerAddresses& addresses);
std::vector<std::string> WorkerCommand(const UpOptions& options, const ClusterPaths& paths,
                                       const WorkerSpec& worker,
                                       const std::string& controller_address);

// Reads an address file: {"address": ...} or plain text for the loader, {"public", "internal",
// "admin"} and perhaps "metrics" for the controller. NOT_FOUND while it is not there.
absl::StatusOr<std::string> ReadLoaderAddress(const std::string& path);
absl::StatusOr<ControllerAddresses> ReadControllerAddresses(const std::string& path);

}  // namespace sluice::cli
