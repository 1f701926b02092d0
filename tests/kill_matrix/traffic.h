// Traffic: clients that stream greedy answers without pause and check every message against what
// the model answers without faults.
#pragma once

#include <atomic>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "tests/e2e/cluster.h"

namespace sluice::kill_matrix {

// A prompt and its whole answer.
struct Reference {
  std::vector<uint32_t> prompt;
  std::vector<uint32_t> ids;
};

// Some prompts of different lengths for the checkpoint NAME of tests/testdata, and their answers,
// asked of a cluster without faults. Empty: it did not serve.
std::vector<Reference> MakeReferences(const std::string& checkpoint);

constexpr int kCallSeconds = 20;  // Deadline of each call

class Traffic {
 public:
  // Both must outlive it. Clients begin at once; whatever is wrong is kept for failures().
  // `may_cancel`: the controller will end by SIGTERM. gRPC 1.51 answers CANCELLED to a call that
  // comes while its server closes the connections; allowed then, when the call got no token.
  Traffic(const e2e::Cluster* cluster, const std::vector<Reference>* references, bool may_cancel);
  ~Traffic() { Stop(); }
  Traffic(const Traffic&) = delete;
  Traffic& operator=(const Traffic&) = delete;

  void Stop();  // Waits for the calls that run

  int whole() const { return whole_; }  // Answers
  int lost() const { return lost_; }    // Calls that ended with UNAVAILABLE
  int late() const { return late_; }    // Calls that came too late: CANCELLED, as above
  int gone() const { return gone_; }    // Clients that hung up after some tokens
  double longest_call() const;          // Seconds
  std::vector<std::string> failures() const;

 private:
  void Run(int client);
  void StreamOne(const Reference& reference);
  void HangUpOne(const Reference& reference);
  void Check(const e2e::Answer& answer, const Reference& reference);
  void Fail(const std::string& text);

  const e2e::Cluster* const cluster_;
  const std::vector<Reference>* const references_;
  const bool may_cancel_;
  std::atomic<bool> stop_{false};
  std::atomic<int> whole_{0}, lost_{0}, late_{0}, gone_{0};
  mutable std::mutex mutex_;  // Guards what follows
  double longest_call_ = 0;
  std::vector<std::string> failures_;
  std::vector<std::thread> clients_;
};

}  // namespace sluice::kill_matrix
