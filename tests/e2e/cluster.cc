#include "tests/e2e/cluster.h"

#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <thread>

namespace sluice::e2e {
namespace {

namespace fs = std::filesystem;

std::string Program(const std::string& name) { return std::string(SLUICE_BIN) + "/" + name; }

std::string ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::stringstream content;
  content << file.rdbuf();
  return content.str();
}

// Content of a file that a process writes once it listens; empty after 30 s or when it has ended.
std::string WaitForFile(const std::string& path, Process* process) {
  for (int i = 0; i < 6000; ++i) {
    if (const std::string content = ReadFile(path); content.ends_with("\n")) return content;
    if (!process->running()) break;
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  return "";
}

std::string LastLines(const std::string& path, size_t bytes) {
  const std::string text = ReadFile(path);
  return text.size() > bytes ? text.substr(text.size() - bytes) : text;
}

// Most checkpoints of tests/testdata lie there without a tokenizer, to save room; the controller
// wants one. They all have the vocabulary of llama-fp16, so a copy gets its tokenizer.
std::string WithTokenizer(const std::string& model, const std::string& folder) {
  const fs::path tokenizer = fs::path(CheckpointPath("llama-fp16")) / "tokenizer.json";
  if (!fs::is_directory(model) || fs::exists(fs::path(model) / "tokenizer.json")) return model;
  const fs::path copy = fs::path(folder) / fs::path(model).filename();
  fs::copy(model, copy);
  fs::copy(tokenizer, copy);
  return copy;
}

}  // namespace

Cluster::Cluster(const ClusterOptions& options) : options_(options) {
  std::string pattern = fs::temp_directory_path() / "sluice-e2e-XXXXXX";
  folder_ = mkdtemp(pattern.data());
  options_.model = WithTokenizer(options_.model, folder_);
  workers_.resize(options.workers);
  std::vector<std::string> names = {"loader", "controller"};
  for (int i = 0; i < options.workers; ++i) names.push_back("worker-" + std::to_string(i));
  for (const std::string& name : names) Start(name, options_.faults[name]);
}

Cluster::~Cluster() {
  workers_.clear();
  controller_.Kill();
  loader_.Kill();
  fs::remove_all(folder_);
}

Process& Cluster::process(const std::string& name) {
  if (name == "loader") return loader_;
  if (name == "controller") return controller_;
  return workers_.at(std::stoi(name.substr(name.find('-') + 1)));
}

void Cluster::Start(const std::string& name, const std::string& fault) {
  const std::string file = folder_ + "/" + name + ".json";
  fs::remove(file);
  std::vector<std::string> command;
  if (!fault.empty()) command = {"/usr/bin/env", "SLUICE_FAULT=" + fault};
  const std::vector<std::string> rest = name == "loader"       ? LoaderCommand(file)
                                        : name == "controller" ? ControllerCommand(file)
                                                               : WorkerCommand(name);
  command.insert(command.end(), rest.begin(), rest.end());
  process(name) = Process(command, folder_ + "/" + name + ".log");
  const bool known = name == "loader" ? !loader_address_.empty() : !public_address_.empty();
  if (name.starts_with("worker") || (known && !fault.empty())) return;
  const std::string written = WaitForFile(file, &process(name));
  if (name == "loader") {
    loader_address_ = written.substr(0, written.find('\n'));
    return;
  }
  const nlohmann::json addresses =
      nlohmann::json::parse(written, nullptr, /*allow_exceptions=*/false);
  if (!addresses.is_object()) return;  // It did not start: WaitReady() tells.
  public_address_ = addresses.value("public", "");
  internal_address_ = addresses.value("internal", "");
  admin_address_ = addresses.value("admin", "");
}

std::vector<std::string> Cluster::LoaderCommand(const std::string& address_file) const {
  return {Program("sluice-loader"),
          "--model",
          options_.model,
          "--listen",
          loader_address_.empty() ? "127.0.0.1:0" : loader_address_,
          "--address-file",
          address_file};
}

std::vector<std::string> Cluster::ControllerCommand(const std::string& address_file) const {
  const auto listen = [](const std::string& known) {
    return known.empty() ? std::string("127.0.0.1:0") : known;
  };
  std::vector<std::string> command = {Program("sluice-controller"),
                                      "--loader",
                                      loader_address_,
                                      "--listen",
                                      listen(public_address_),
                                      "--internal-listen",
                                      listen(internal_address_),
                                      "--admin-listen",
                                      listen(admin_address_),
                                      "--address-file",
                                      address_file,
                                      "--workers",
                                      std::to_string(options_.workers)};
  command.insert(command.end(), options_.controller_flags.begin(), options_.controller_flags.end());
  if (options_.controller_files > 0) {
    const std::string limit = "ulimit -n " + std::to_string(options_.controller_files);
    command.insert(command.begin(), {"/bin/sh", "-c", limit + " && exec \"$@\"", "sh"});
  }
  return command;
}

std::vector<std::string> Cluster::WorkerCommand(const std::string& name) const {
  std::vector<std::string> command = {Program("sluice-worker"),
                                      "--controller",
                                      internal_address_,
                                      "--worker-id",
                                      name,
                                      "--device-index",
                                      name.substr(name.find('-') + 1),
                                      "--listen",
                                      "127.0.0.1:0",
                                      "--threads",
                                      std::to_string(options_.threads),
                                      "--memory",
                                      "1GiB"};
  if (options_.unix_sockets) {
    command.insert(command.end(), {"--unix-socket", folder_ + "/" + name + ".sock"});
  }
  return command;
}

bool Cluster::WaitReady(int seconds) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(seconds);
  auto admin = Admin();
  while (std::chrono::steady_clock::now() < end) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(2));
    v1::GetClusterResponse response;
    if (admin->GetCluster(&context, {}, &response).ok() &&
        response.state() == v1::MODEL_STATE_SERVING) {
      return true;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
  return false;
}

std::string Cluster::Logs() const {
  std::string all;
  for (const auto& entry : fs::directory_iterator(folder_)) {
    if (entry.path().extension() != ".log") continue;
    all += "--- " + entry.path().filename().string() + "\n" + LastLines(entry.path(), 3000);
  }
  return all;
}

std::string Cluster::Log(const std::string& name) const {
  return ReadFile(folder_ + "/" + name + ".log");
}

std::string Cluster::LogText() const {
  std::string all;
  for (const auto& entry : fs::directory_iterator(folder_)) {
    if (entry.path().extension() == ".log") all += ReadFile(entry.path());
  }
  return all;
}

std::shared_ptr<grpc::Channel> Cluster::PublicChannel() const {
  grpc::ChannelArguments arguments;  // A connection of its own; reconnects at once after a restart.
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 50);
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 200);
  return grpc::CreateCustomChannel(public_address_, grpc::InsecureChannelCredentials(), arguments);
}

std::unique_ptr<v1::GenerationService::Stub> Cluster::Generation() const {
  return v1::GenerationService::NewStub(PublicChannel());
}

std::unique_ptr<v1::ModelService::Stub> Cluster::Model() const {
  return v1::ModelService::NewStub(PublicChannel());
}

std::unique_ptr<v1::AdminService::Stub> Cluster::Admin() const {
  return v1::AdminService::NewStub(
      grpc::CreateChannel(admin_address_, grpc::InsecureChannelCredentials()));
}

Answer Cluster::Stream(const v1::StreamGenerateRequest& request, int deadline_seconds) const {
  auto stub = Generation();
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(deadline_seconds));
  auto reader = stub->StreamGenerate(&context, request);
  Answer answer;
  v1::StreamGenerateResponse message;
  while (reader->Read(&message)) {
    answer.dense &= message.token_ids().empty() || message.token_index() == answer.ids.size();
    answer.ids.insert(answer.ids.end(), message.token_ids().begin(), message.token_ids().end());
    answer.text += message.text();
    for (const auto& position : message.logprobs()) {
      answer.logprobs.push_back(position.chosen().logprob());
    }
    if (message.finish_reason() != v1::FINISH_REASON_UNSPECIFIED) {
      answer.finish_reason = message.finish_reason();
    }
  }
  answer.status = reader->Finish();
  return answer;
}

v1::StreamGenerateRequest GreedyRequest(const std::vector<uint32_t>& prompt, uint32_t max_tokens) {
  v1::StreamGenerateRequest request;
  request.mutable_token_ids()->mutable_ids()->Assign(prompt.begin(), prompt.end());
  request.set_max_tokens(max_tokens);
  request.set_temperature(0);
  request.set_ignore_eos(true);
  return request;
}

std::string CheckpointPath(const std::string& name) {
  return std::string(SLUICE_TESTDATA) + "/checkpoints/" + name;
}

Golden ReadGolden(const std::string& name) {
  const auto json = nlohmann::json::parse(ReadFile(CheckpointPath(name) + "/golden.json"));
  Golden golden;
  json.at("prompt_ids").get_to(golden.prompt);
  json.at("greedy_ids").get_to(golden.greedy);
  json.at("gaps").get_to(golden.gaps);
  return golden;
}

Golden LongestClearRun(const Golden& golden) {
  constexpr float kClearGap = 0.04f;  // Twice golden_test's larger bound
  size_t begin = 0, length = 0;
  for (size_t i = 0, start = 0; i < golden.greedy.size(); ++i) {
    if (golden.gaps[i] <= kClearGap) {
      start = i + 1;
    } else if (i + 1 - start > length) {
      begin = start;
      length = i + 1 - start;
    }
  }
  const auto first = golden.greedy.begin() + static_cast<ptrdiff_t>(begin);
  Golden run;
  run.prompt = golden.prompt;
  run.prompt.insert(run.prompt.end(), golden.greedy.begin(), first);
  run.greedy.assign(first, first + static_cast<ptrdiff_t>(length));
  return run;
}

}  // namespace sluice::e2e
