#include "tests/kill_matrix/traffic.h"

#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <chrono>

namespace sluice::kill_matrix {
namespace {

constexpr int kPrompts = 4;
constexpr int kStreams = 5;       // The last of them hangs up
constexpr uint32_t kTokens = 48;  // Of an answer

// A client whose answer was lost asks again, as a real one would; but not without end at once.
void Pause() { std::this_thread::sleep_for(std::chrono::milliseconds(20)); }

}  // namespace

std::vector<Reference> MakeReferences(const std::string& checkpoint) {
  e2e::Cluster cluster({.model = e2e::CheckpointPath(checkpoint), .workers = 2});
  if (!cluster.WaitReady()) return {};
  const e2e::Golden golden = e2e::ReadGolden(checkpoint);
  std::vector<Reference> references(kPrompts);
  for (int i = 0; i < kPrompts; ++i) {
    references[i].prompt = golden.prompt;
    references[i].prompt.insert(references[i].prompt.end(), golden.greedy.begin(),
                                golden.greedy.begin() + 3 * i);
    const e2e::Answer answer = cluster.Stream(e2e::GreedyRequest(references[i].prompt, kTokens));
    if (!answer.status.ok() || answer.ids.size() != kTokens) return {};
    references[i].ids = answer.ids;
  }
  return references;
}

Traffic::Traffic(const e2e::Cluster* cluster, const std::vector<Reference>* references,
                 bool may_cancel)
    : cluster_(cluster), references_(references), may_cancel_(may_cancel) {
  for (int i = 0; i < kStreams; ++i) clients_.emplace_back([this, i] { Run(i); });
}

void Traffic::Stop() {
  stop_ = true;
  for (std::thread& client : clients_) {
    if (client.joinable()) client.join();
  }
}

void Traffic::Run(int client) {
  for (size_t round = client; !stop_; ++round) {
    const Reference& reference = (*references_)[round % references_->size()];
    const auto begin = std::chrono::steady_clock::now();
    if (client + 1 == kStreams) {
      HangUpOne(reference);
    } else {
      StreamOne(reference);
    }
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    std::lock_guard<std::mutex> lock(mutex_);
    longest_call_ = std::max(longest_call_, seconds.count());
  }
}

void Traffic::StreamOne(const Reference& reference) {
  Check(cluster_->Stream(e2e::GreedyRequest(reference.prompt, kTokens), kCallSeconds), reference);
}

void Traffic::Check(const e2e::Answer& answer, const Reference& reference) {
  if (!answer.dense) Fail("a token index was missing or came twice");
  const bool prefix = answer.ids.size() <= reference.ids.size() &&
                      std::equal(answer.ids.begin(), answer.ids.end(), reference.ids.begin());
  if (!prefix) Fail("wrong token");
  if (answer.status.ok()) {
    if (answer.ids.size() != reference.ids.size() ||
        answer.finish_reason != v1::FINISH_REASON_LENGTH) {
      Fail("an answer that is not whole ended with OK");
    }
    ++whole_;
    return;
  }
  const grpc::StatusCode code = answer.status.error_code();
  if (may_cancel_ && code == grpc::StatusCode::CANCELLED && answer.ids.empty()) {
    ++late_;
  } else if (code == grpc::StatusCode::UNAVAILABLE) {
    ++lost_;
  } else {
    Fail("ended with code " + std::to_string(code) + ": " + answer.status.error_message());
  }
  Pause();
}

void Traffic::HangUpOne(const Reference& reference) {
  auto stub = cluster_->Generation();
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(kCallSeconds));
  auto reader = stub->StreamGenerate(&context, e2e::GreedyRequest(reference.prompt, kTokens));
  v1::StreamGenerateResponse message;
  size_t tokens = 0;
  while (tokens < kTokens / 4 && reader->Read(&message)) {
    if (!message.token_ids().empty() && message.token_index() != tokens) {
      Fail("a token index was missing or came twice");
    }
    for (const uint32_t id : message.token_ids()) {
      if (tokens >= reference.ids.size() || id != reference.ids[tokens]) Fail("wrong token");
      ++tokens;
    }
  }
  if (tokens > 0) ++gone_;
  context.TryCancel();
  while (reader->Read(&message)) {
  }
  const grpc::Status status = reader->Finish();
  if (status.error_code() == grpc::StatusCode::DEADLINE_EXCEEDED) Fail("a call hung");
  Pause();
}

double Traffic::longest_call() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return longest_call_;
}

std::vector<std::string> Traffic::failures() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return failures_;
}

void Traffic::Fail(const std::string& text) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (std::find(failures_.begin(), failures_.end(), text) == failures_.end()) {
    failures_.push_back(text);
  }
}

}  // namespace sluice::kill_matrix
