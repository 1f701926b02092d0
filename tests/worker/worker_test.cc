// Whole workers over real connections, behind a small controller and loader: pipelines of 1 to 3
// stages, epochs, faults, a controller that goes and comes back.
#include "worker/worker.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <string>
#include <thread>

#include "proto/sluice/internal/v1/stage.grpc.pb.h"
#include "services/metrics/metrics_server.h"
#include "services/rpc/channel.h"
#include "tests/support/scrape.h"
#include "tests/worker/fake_controller.h"
#include "tests/worker/fake_engine.h"
#include "tests/worker/fake_weights.h"

namespace sluice::worker {
namespace {

using internal::v1::AttachResponse;
using internal::v1::ShardAssignment;
using ::testing::HasSubstr;

// 400 KB a row: a step of 3 rows travels in two pieces.
constexpr int64_t kWords = 100000;

std::unique_ptr<rpc::ServerRunner> Serve(const std::vector<grpc::Service*>& services,
                                         int port = 0) {
  rpc::ServerOptions options;
  options.addresses = {"127.0.0.1:" + std::to_string(port)};
  auto server = rpc::ServerRunner::Start(options, services);
  EXPECT_TRUE(server.ok()) << server.status();
  return *std::move(server);
}

// A worker and the thread that runs it.
struct RunningWorker {
  std::unique_ptr<Worker> worker;
  std::thread thread;
  bool ended = false;
  std::mutex mutex;
  std::condition_variable changed;

  void WaitForEnd() {
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [this] { return ended; });
  }
};

class WorkerTest : public ::testing::Test {
 protected:
  void SetUp() override {
    controller_server_ = Serve({&controller_});
    port_ = controller_server_->ports().front();
    loader_server_ = Serve({&weights_});
  }
  void TearDown() override {
    for (auto& [id, running] : workers_) {
      running->worker->Stop();
      running->thread.join();
    }
  }

  std::string Address() const { return "127.0.0.1:" + std::to_string(port_); }

  internal::v1::WorkerHello StartWorker(const std::string& id, bool with_socket) {
    WorkerOptions options;
    options.controller_address = Address();
    options.worker_id = id;
    options.memory_bytes = 1 << 20;
    if (with_socket) {
      options.unix_socket = "/tmp/sluice_test_" + std::to_string(getpid()) + "_" + id;
    }
    auto running = std::make_unique<RunningWorker>();
    running->worker = *Worker::Start(options, [](const ShardAssignment& assignment) {
      return absl::StatusOr<std::unique_ptr<StageEngine::Loader>>(
          std::make_unique<FakeLoader>(assignment, kWords));
    });
    running->thread = std::thread([r = running.get()] {
      r->worker->Run();
      std::lock_guard<std::mutex> lock(r->mutex);
      r->ended = true;
      r->changed.notify_all();
    });
    workers_[id] = std::move(running);
    return controller_.WaitForHello(id);
  }

  void Configure(const std::string& id, uint64_t epoch, const ShardAssignment& base,
                 const std::vector<std::string>& next) {
    AttachResponse order;
    order.mutable_configure()->set_epoch(epoch);
    auto* assignment = order.mutable_configure()->mutable_assignment();
    *assignment = base;
    assignment->set_loader_address("127.0.0.1:" + std::to_string(loader_server_->ports().front()));
    *assignment->mutable_next_addresses() = {next.begin(), next.end()};
    controller_.Order(id, order);
  }

  // Starts `stages` workers "w0" ... and configures them; returns what carries each hop.
  std::vector<std::string> StartPipeline(uint32_t stages, uint64_t epoch, bool with_sockets) {
    for (uint32_t i = 0; i < stages; ++i) {
      hellos_.push_back(StartWorker("w" + std::to_string(i), with_sockets));
    }
    return ConfigureAll(epoch);
  }
  std::vector<std::string> ConfigureAll(uint64_t epoch) {
    const auto stages = static_cast<uint32_t>(hellos_.size());
    for (uint32_t i = 0; i < stages; ++i) {
      const auto& next = hellos_[(i + 1) % stages].addresses();
      Configure("w" + std::to_string(i), epoch, FakeAssignment(i, stages),
                {next.begin(), next.end()});
    }
    std::vector<std::string> transports;
    for (uint32_t i = 0; i < stages; ++i) {
      transports.push_back(controller_.WaitForReady("w" + std::to_string(i)).transport());
    }
    return transports;
  }

  // Opens the controller's step stream to stage 0.
  void OpenSteps() {
    stub_ = internal::v1::Stage::NewStub(
        rpc::MakeChannel(hellos_[0].addresses().rbegin()[0], rpc::ChannelKind::kLink));
    context_ = std::make_unique<grpc::ClientContext>();
    steps_ = stub_->Step(context_.get());
  }
  void SendStep(const internal::v1::StepHeader& header) {
    internal::v1::StepRequest request;
    *request.mutable_frame()->mutable_header() = header;
    request.mutable_frame()->set_last(true);
    ASSERT_TRUE(steps_->Write(request));
  }
  // A prompt of 3 ids and `more` steps that run ahead; token of step i is 12 + stages * i.
  void ExpectGeneration(uint64_t epoch, uint64_t more) {
    const auto stages = static_cast<uint32_t>(hellos_.size());
    SendStep(OneSequenceStep(epoch, 1, {10, 11, 12}));
    for (uint64_t step = 2; step <= more + 1; ++step) {
      SendStep(OneSequenceStep(epoch, step, {}, step - 1));
    }
    for (uint64_t step = 1; step <= more + 1; ++step) {
      const auto frame = controller_.WaitForTokens(step);
      ASSERT_EQ(frame.tokens_size(), 1);
      EXPECT_EQ(frame.tokens(0).token_id(), 12 + stages * step);
      EXPECT_EQ(frame.epoch(), epoch);
      EXPECT_EQ(frame.stage_us_size(), static_cast<int>(stages));
      EXPECT_EQ(frame.wait_us_size(), static_cast<int>(stages));
    }
  }

  FakeController controller_;
  FakeWeights weights_;
  std::unique_ptr<rpc::ServerRunner> controller_server_;
  std::unique_ptr<rpc::ServerRunner> loader_server_;
  int port_ = 0;
  std::vector<internal::v1::WorkerHello> hellos_;
  std::map<std::string, std::unique_ptr<RunningWorker>> workers_;
  std::unique_ptr<internal::v1::Stage::Stub> stub_;
  std::unique_ptr<grpc::ClientContext> context_;
  std::unique_ptr<grpc::ClientReaderWriter<internal::v1::StepRequest, internal::v1::StepResponse>>
      steps_;
};

TEST_F(WorkerTest, OneStageHasNoHop) {
  EXPECT_THAT(StartPipeline(1, 1, false), ::testing::ElementsAre(""));
  EXPECT_EQ(hellos_[0].protocol_version(), 1u);
  EXPECT_FALSE(hellos_[0].has_held());
  OpenSteps();
  ExpectGeneration(1, 20);
}

TEST_F(WorkerTest, ThreeStagesOverUnixSockets) {
  EXPECT_THAT(StartPipeline(3, 1, true), ::testing::ElementsAre("unix", "unix", "unix"));
  OpenSteps();
  ExpectGeneration(1, 20);
}

// The stages count what they computed and sent; the last one sends no hidden states.
TEST_F(WorkerTest, ShowsPrometheusItsStage) {
  StartPipeline(2, 3, true);
  OpenSteps();
  ExpectGeneration(3, 4);
  for (const std::string stage : {"0", "1"}) {
    Worker* worker = workers_["w" + stage]->worker.get();
    const auto server = metrics::MetricsServer::Start(
        "127.0.0.1:0", [worker](metrics::Page* page) { worker->Collect(page); });
    ASSERT_TRUE(server.ok()) << server.status();
    const std::string links = "sluice_link_seconds_count{from=\"0\",to=\"1\"}";
    Scrape scrape;
    do {  // The last write may be counted after its step has come round
      scrape = ScrapeMetrics((*server)->port());
    } while (stage == "0" && scrape.Value(links) < 5);
    EXPECT_EQ(scrape.types["sluice_stage_compute_seconds"], "histogram");
    EXPECT_EQ(scrape.types["sluice_stage_wait_seconds"], "histogram");
    EXPECT_EQ(scrape.types["sluice_shard_load_seconds"], "histogram");
    EXPECT_EQ(scrape.types["sluice_worker_memory_bytes"], "gauge");
    EXPECT_EQ(scrape.types["sluice_worker_faults_total"], "counter");
    const std::string label = "{stage=\"" + stage + "\"}";
    EXPECT_EQ(scrape.Value("sluice_stage_compute_seconds_count" + label), 5);
    EXPECT_EQ(scrape.Value("sluice_stage_wait_seconds_count" + label), 5);
    EXPECT_EQ(scrape.Value("sluice_shard_load_seconds_count"), 1);
    EXPECT_EQ(scrape.Value("sluice_worker_epoch"), 3);
    EXPECT_EQ(scrape.Value("sluice_worker_serving"), 1);
    EXPECT_EQ(scrape.Value("sluice_worker_faults_total"), 0);
    const StageMemory memory = FakeEngine(FakeAssignment(0, 2), kWords).memory();
    EXPECT_EQ(scrape.Value("sluice_worker_memory_bytes{kind=\"weights\"}"),
              static_cast<double>(memory.weight_bytes));
    EXPECT_GT(scrape.Value("sluice_worker_memory_bytes{kind=\"free\"}"), 0);
    // 3 rows, then 1 in each of 4 steps.
    const double sent = scrape.Value("sluice_activation_bytes_total{from=\"0\",to=\"1\"}");
    EXPECT_EQ(sent, stage == "0" ? 7 * 4 * static_cast<double>(kWords) : -1);
    EXPECT_EQ(scrape.Value(links), stage == "0" ? 5 : -1);
  }
}

TEST_F(WorkerTest, TwoStagesOverTcpWhenTheSocketIsNotThere) {
  hellos_ = {StartWorker("w0", false), StartWorker("w1", false)};
  for (auto& hello : hellos_) {
    const std::string tcp = hello.addresses(0);
    hello.clear_addresses();
    hello.add_addresses("unix:/tmp/sluice_test_not_there");
    hello.add_addresses(tcp);
  }
  EXPECT_THAT(ConfigureAll(1), ::testing::ElementsAre("tcp", "tcp"));
  OpenSteps();
  ExpectGeneration(1, 20);
}

TEST_F(WorkerTest, ANewEpochKeepsTheWeightsAndFencesTheOld) {
  StartPipeline(2, 1, true);
  OpenSteps();
  ExpectGeneration(1, 5);
  auto old_steps = std::move(steps_);
  auto old_context = std::move(context_);
  const int parts = weights_.parts_sent;
  controller_.ForgetTokens();
  ConfigureAll(4);
  EXPECT_EQ(weights_.parts_sent, parts);
  internal::v1::StepResponse response;
  while (old_steps->Read(&response)) {
  }
  EXPECT_FALSE(old_steps->Finish().ok());
  OpenSteps();
  ExpectGeneration(4, 5);
  Configure("w0", 4, FakeAssignment(0, 2), {});
  EXPECT_EQ(controller_.WaitForFault("w0").code(),
            static_cast<int>(grpc::StatusCode::FAILED_PRECONDITION));
}

TEST_F(WorkerTest, OtherLayersAreFetched) {
  StartPipeline(1, 1, false);
  const int parts = weights_.parts_sent;
  ShardAssignment wider = FakeAssignment(0, 1);
  wider.mutable_layers()->set_end(5);
  Configure("w0", 2, wider, {});
  controller_.WaitForReady("w0");
  EXPECT_EQ(weights_.parts_sent, parts + 5 * static_cast<int>(FakeWeights::kParts));
}

TEST_F(WorkerTest, ControllerThatComesBackFindsTheShardHeld) {
  StartPipeline(2, 7, true);
  OpenSteps();
  ExpectGeneration(7, 3);
  const int parts = weights_.parts_sent;
  controller_server_.reset();  // All its streams break
  internal::v1::StepResponse response;
  while (steps_->Read(&response)) {
  }
  EXPECT_FALSE(steps_->Finish().ok());  // The stage has stopped computing
  controller_.ForgetTokens();
  controller_server_ = Serve({&controller_}, port_);
  for (auto& hello : hellos_) {
    hello = controller_.WaitForHello(hello.worker_id());
    EXPECT_EQ(hello.epoch(), 7u);
    ASSERT_TRUE(hello.has_held());
    EXPECT_EQ(hello.held().model_digest(), "digest");
  }
  ConfigureAll(8);
  EXPECT_EQ(weights_.parts_sent, parts);
  OpenSteps();
  ExpectGeneration(8, 3);
}

TEST_F(WorkerTest, AFailedStepIsAFaultAndEndsTheEpoch) {
  StartPipeline(2, 1, true);
  OpenSteps();
  SendStep(OneSequenceStep(1, 1, {FakeEngine::kPoison - 2}));  // Fails on stage 1
  const auto fault = controller_.WaitForFault("w1");
  EXPECT_EQ(fault.epoch(), 1u);
  metrics::Page page;
  workers_["w1"]->worker->Collect(&page);
  std::map<std::string, double> counted;
  for (const auto& family : page.Take()) {
    counted[family.name] = family.metric[0].counter.value + family.metric[0].gauge.value;
  }
  EXPECT_EQ(counted["sluice_worker_faults_total"], 1);
  EXPECT_EQ(counted["sluice_worker_serving"], 0);
  EXPECT_EQ(fault.code(), static_cast<int>(grpc::StatusCode::INVALID_ARGUMENT));
  EXPECT_THAT(fault.message(), HasSubstr("step 1: poisoned row"));
  const auto neighbour = controller_.WaitForFault("w0");  // Its link broke
  EXPECT_THAT(neighbour.message(), HasSubstr("link to unix:"));
  ConfigureAll(2);
  OpenSteps();
  ExpectGeneration(2, 2);
}

TEST_F(WorkerTest, ALostNeighbourIsAFault) {
  StartPipeline(3, 1, false);
  OpenSteps();
  ExpectGeneration(1, 2);
  workers_["w1"]->worker->Stop();
  EXPECT_THAT(controller_.WaitForFault("w0").message(), HasSubstr("link to 127.0.0.1"));
}

TEST_F(WorkerTest, LoadingEndsWithAFaultOrWhenItIsSuperseded) {
  StartWorker("w0", false);
  weights_.fail = true;
  Configure("w0", 1, FakeAssignment(0, 1), {});
  EXPECT_THAT(controller_.WaitForFault("w0").message(), HasSubstr("another digest"));
  weights_.fail = false;
  weights_.hang = true;
  Configure("w0", 2, FakeAssignment(0, 1), {});
  controller_.WaitForEvent("w0", [](const auto& event) { return event.has_load_progress(); });
  weights_.hang = false;
  Configure("w0", 3, FakeAssignment(0, 1), {});
  EXPECT_EQ(controller_.WaitForReady("w0").epoch(), 3u);
}

TEST_F(WorkerTest, HaltDuringLoadingEndsItAndReleaseEndsTheProcess) {
  StartWorker("w0", false);
  weights_.hang = true;
  Configure("w0", 1, FakeAssignment(0, 1), {});
  controller_.WaitForEvent("w0", [](const auto& event) { return event.has_load_progress(); });
  AttachResponse order;
  order.mutable_halt()->set_epoch(1);
  controller_.Order("w0", order);
  order.mutable_release();
  controller_.Order("w0", order);
  workers_["w0"]->WaitForEnd();
}

TEST_F(WorkerTest, StopEndsAWorkerWhoseControllerIsNotThere) {
  StartPipeline(1, 1, false);
  controller_server_.reset();
  workers_["w0"]->worker->Stop();
  workers_["w0"]->WaitForEnd();
}

TEST(WorkerOptionsTest, AreChecked) {
  const auto start = [](const WorkerOptions& options) {
    return Worker::Start(options, nullptr).status();
  };
  WorkerOptions options;
  options.controller_address = "127.0.0.1:1";
  options.worker_id = "Bad Name";
  EXPECT_THAT(start(options).ToString(), HasSubstr("--worker-id"));
  options.worker_id = "w0";
  options.unix_socket = "/tmp/" + std::string(110, 'x');
  EXPECT_THAT(start(options).ToString(), HasSubstr("--unix-socket"));
  options.unix_socket.clear();
  options.listen = "nowhere";
  EXPECT_THAT(start(options).ToString(), HasSubstr("--listen"));
  options.listen = "0.0.0.0:0";
  EXPECT_THAT(start(options).ToString(), HasSubstr("--advertise-host"));
}

}  // namespace
}  // namespace sluice::worker
