#include "services/cli/progress.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace sluice::cli {
namespace {

void AddWorker(v1::GetClusterResponse& cluster, const std::string& id, uint64_t done,
               uint64_t total) {
  v1::Worker* worker = cluster.add_workers();
  worker->set_worker_id(id);
  worker->set_loaded_bytes(done);
  worker->set_shard_bytes(total);
}

TEST(ProgressLine, SaysWhatIsAwaited) {
  v1::GetClusterResponse cluster;
  cluster.set_reason("waiting for workers: 1 of 2 attached");
  AddWorker(cluster, "worker-0", 0, 0);
  EXPECT_EQ(ProgressLine(cluster, 80), "waiting for workers: 1 of 2 attached");
  EXPECT_EQ(ProgressLine(cluster, 7), "waiting");
}

TEST(ProgressLine, BarIsOverTheBytesOfAllWorkers) {
  v1::GetClusterResponse cluster;
  AddWorker(cluster, "worker-0", 300, 300);
  AddWorker(cluster, "worker-1", 0, 100);
  EXPECT_EQ(ProgressLine(cluster, 80),
            "[##################      ]  75%  worker-0 100%, worker-1 0%");
}

TEST(ProgressLine, FullBarTellsTheReason) {
  v1::GetClusterResponse cluster;
  cluster.set_state(v1::MODEL_STATE_LOADING);
  cluster.set_reason("connecting to the first stage");
  AddWorker(cluster, "worker-0", 300, 300);
  EXPECT_EQ(ProgressLine(cluster, 80),
            "[########################] 100%  connecting to the first stage");
}

TEST(ProgressDisplay, OffATerminalOnlyNewsAreWritten) {
  FILE* file = std::tmpfile();
  {
    ProgressDisplay display(file);
    display.Show("[###   ]  10%  worker-0 10%");
    display.Show("[###   ]  12%  worker-0 12%");
    display.Show("[###   ]  60%  worker-0 60%");
    display.Note("a note");
  }
  std::rewind(file);
  char text[500] = {};
  [[maybe_unused]] const size_t size = std::fread(text, 1, sizeof(text) - 1, file);
  std::fclose(file);
  EXPECT_STREQ(text, "[###   ]  10%  worker-0 10%\n[###   ]  60%  worker-0 60%\na note\n");
}

}  // namespace
}  // namespace sluice::cli
