// Cluster: a real controller, loader and CPU workers as processes on this machine, all on ports
// that the system chose.
#pragma once

#include <grpcpp/grpcpp.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "proto/sluice/v1/admin.grpc.pb.h"
#include "proto/sluice/v1/generation.grpc.pb.h"
#include "proto/sluice/v1/model.grpc.pb.h"
#include "tests/e2e/process.h"

namespace sluice::e2e {

struct ClusterOptions {
  std::string model;  // Folder (one without a tokenizer gets llama-fp16's) or GGUF file
  int workers = 1;
  int threads = 1;  // Of each worker
  std::vector<std::string> controller_flags = {};
  int controller_files = 0;  // Most open files of the controller; 0: as many as the test may have
  bool unix_sockets = true;  // Links between workers over Unix sockets, else TCP
  // Process name -> SLUICE_FAULT of its first start (kernels/core/fault_point.h)
  std::map<std::string, std::string> faults = {};
};

// One answer, put together from a stream.
struct Answer {
  grpc::Status status;
  std::vector<uint32_t> ids;
  std::string text;
  v1::FinishReason finish_reason = v1::FINISH_REASON_UNSPECIFIED;
  std::vector<float> logprobs;  // Of the chosen tokens, when asked for
  bool dense = true;            // token_index had no gap and no repeat
};

class Cluster {
 public:
  // Starts everything; call WaitReady() before the first request.
  explicit Cluster(const ClusterOptions& options);
  ~Cluster();

  // True when the model serves; false after `seconds` (then Logs() tells why).
  bool WaitReady(int seconds = 120);
  std::string Logs() const;                        // Last lines of every process
  std::string Log(const std::string& name) const;  // All lines of one

  std::unique_ptr<v1::GenerationService::Stub> Generation() const;
  std::unique_ptr<v1::ModelService::Stub> Model() const;
  std::unique_ptr<v1::AdminService::Stub> Admin() const;
  std::shared_ptr<grpc::Channel> PublicChannel() const;
  const std::string& public_address() const { return public_address_; }
  std::string LogText() const;  // All that the processes have logged
  const std::string& folder() const { return folder_; }

  // Streams one request of greedy decoding unless `request` says otherwise.
  Answer Stream(const v1::StreamGenerateRequest& request, int deadline_seconds = 120) const;

  Process& loader() { return loader_; }
  Process& controller() { return controller_; }
  Process& worker(int index) { return workers_[index]; }
  void StartLoader() { Start("loader"); }
  void StartController() { Start("controller"); }
  void StartWorker(int index) { Start("worker-" + std::to_string(index)); }
  // By name: "loader", "controller", "worker-N". Starts it on the ports it had before, once they
  // are known, and waits until it listens, but for one with a fault, which may never do so.
  Process& process(const std::string& name);
  void Start(const std::string& name, const std::string& fault = "");

 private:
  std::vector<std::string> LoaderCommand(const std::string& address_file) const;
  std::vector<std::string> ControllerCommand(const std::string& address_file) const;
  std::vector<std::string> WorkerCommand(const std::string& name) const;

  ClusterOptions options_;
  std::string folder_;
  std::string loader_address_, public_address_, internal_address_, admin_address_;
  Process loader_, controller_;
  std::vector<Process> workers_;
};

// A request of `max_tokens` greedy tokens after `prompt`, eos ignored.
v1::StreamGenerateRequest GreedyRequest(const std::vector<uint32_t>& prompt, uint32_t max_tokens);

// tests/testdata/checkpoints/NAME and its golden.json.
std::string CheckpointPath(const std::string& name);
struct Golden {
  std::vector<uint32_t> prompt, greedy;
  std::vector<float> gaps;  // Between the two best logits at each greedy id
};
Golden ReadGolden(const std::string& name);
// The longest run of greedy ids whose two best logits are never closer than the engine's bound
// allows to judge, and the ids before it as the prompt (the teacher-forced comparison of every id
// is tests/worker/engine/golden_test.cc).
Golden LongestClearRun(const Golden& golden);

}  // namespace sluice::e2e
