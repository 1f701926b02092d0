// What Prometheus sees of a controller that serves, refuses, loses a worker and comes back: over
// real gRPC and real HTTP, with a pipeline that is none. And the times of one request by a clock of
// the test.
#include "services/controller/controller_metrics.h"

#include <gmock/gmock.h>
#include <grpcpp/client_context.h>
#include <gtest/gtest.h>

#include "services/controller/request_meter.h"
#include "services/metrics/metrics_server.h"
#include "tests/services/controller/fake_cluster.h"
#include "tests/support/scrape.h"

namespace sluice::controller {
namespace {

using std::chrono::milliseconds;

template <typename Request>
Request Greedy(uint32_t first, uint32_t max_tokens) {
  Request request;
  request.mutable_token_ids()->mutable_ids()->Add(first);
  request.mutable_token_ids()->mutable_ids()->Add(first + 1);
  request.set_max_tokens(max_tokens);
  request.set_temperature(0);
  request.set_ignore_eos(true);
  return request;
}

class ControllerMetricsTest : public testing::Test {
 protected:
  void SetUp() override {
    auto server = metrics::MetricsServer::Start(
        "127.0.0.1:0", [this](metrics::Page* page) { cluster_.loop->Collect(page); });
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
  }

  // Scrapes until the sample, its labels behind model_name's, has the value: the loop tells others
  // at the end of a round. The test's own timeout ends a wait in vain.
  void WaitFor(const std::string& sample, double value) {
    while (ScrapeMetrics(server_->port()).Value(sample) != value) {
      std::this_thread::sleep_for(milliseconds(2));
    }
  }
  static std::string Of(const std::string& name, const std::string& labels = "") {
    return "sluice_" + name + "{model_name=\"tiny\"" + labels + "}";
  }
  grpc::StatusCode Generate(const v1::GenerateRequest& request) {
    grpc::ClientContext context;
    v1::GenerateResponse response;
    return cluster_.generation->Generate(&context, request, &response).error_code();
  }

  FakeCluster cluster_;
  std::unique_ptr<metrics::MetricsServer> server_;
};

TEST_F(ControllerMetricsTest, NamesAndTypesAreThePublicInterface) {
  Scrape scrape = ScrapeMetrics(server_->port());
  const std::map<std::string, std::vector<std::string>> names = {
      {"counter",
       {"prompt_tokens_total", "generation_tokens_total", "request_success_total",
        "cancelled_requests_total", "rejected_requests_total", "failed_requests_total",
        "steps_total", "plans_lost_total"}},
      {"gauge",
       {"num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "pipeline_epoch",
        "pipeline_serving", "microbatches_inflight", "workers_expected", "workers_attached"}},
      {"histogram",
       {"time_to_first_token_seconds", "inter_token_latency_seconds",
        "request_time_per_output_token_seconds", "e2e_request_latency_seconds",
        "request_queue_time_seconds", "request_inference_time_seconds",
        "request_prefill_time_seconds", "request_decode_time_seconds", "request_prompt_tokens",
        "request_generation_tokens", "request_params_n", "request_params_max_tokens",
        "iteration_tokens", "recovery_seconds"}}};
  for (const auto& [type, list] : names) {
    for (const std::string& name : list) {
      EXPECT_EQ(scrape.types["sluice_" + name], type) << name;
      EXPECT_FALSE(scrape.helps["sluice_" + name].empty()) << name;
    }
  }
  for (const char* bound : {"0.001", "0.06", "2560"}) {
    EXPECT_EQ(scrape.Value(
                  Of("time_to_first_token_seconds_bucket", ",le=\"" + std::string(bound) + "\"")),
              0);
  }
  EXPECT_EQ(scrape.Value(Of("e2e_request_latency_seconds_bucket", ",le=\"7680\"")), 0);
  EXPECT_EQ(scrape.Value("sluice_pipeline_serving"), 0);
}

TEST_F(ControllerMetricsTest, CountsAnAnswer) {
  cluster_.AttachWorker();
  v1::GenerateRequest request = Greedy<v1::GenerateRequest>(5, 6);
  request.set_n(2);
  EXPECT_EQ(Generate(request), grpc::StatusCode::OK);
  cluster_.WaitIdle();
  WaitFor(Of("num_requests_running"), 0);
  const Scrape scrape = ScrapeMetrics(server_->port());
  EXPECT_EQ(scrape.Value(Of("prompt_tokens_total")), 2);
  EXPECT_EQ(scrape.Value(Of("generation_tokens_total")), 12);
  EXPECT_EQ(scrape.Value(Of("request_success_total", ",finished_reason=\"length\"")), 2);
  EXPECT_EQ(scrape.Value(Of("request_success_total", ",finished_reason=\"stop\"")), 0);
  EXPECT_EQ(scrape.Value(Of("time_to_first_token_seconds_count")), 2);
  EXPECT_EQ(scrape.Value(Of("inter_token_latency_seconds_count")), 10);
  EXPECT_EQ(scrape.Value(Of("e2e_request_latency_seconds_count")), 2);
  EXPECT_EQ(scrape.Value(Of("request_queue_time_seconds_count")), 1);
  EXPECT_EQ(scrape.Value(Of("request_generation_tokens_sum")), 12);
  EXPECT_EQ(scrape.Value(Of("request_params_n_sum")), 2);
  EXPECT_GE(scrape.Value(Of("iteration_tokens_sum")), 2 * 2 + 2 * 5);
  EXPECT_GE(scrape.Value("sluice_steps_total"), 6);
  EXPECT_EQ(scrape.Value("sluice_pipeline_serving"), 1);
  EXPECT_EQ(scrape.Value("sluice_worker_up{worker=\"w0\"}"), 1);
}

TEST_F(ControllerMetricsTest, CountsRefusalsByReason) {
  EXPECT_EQ(Generate(Greedy<v1::GenerateRequest>(5, 6)), grpc::StatusCode::UNAVAILABLE);
  cluster_.AttachWorker();
  v1::GenerateRequest bad = Greedy<v1::GenerateRequest>(5, 6);
  bad.set_temperature(-1);
  EXPECT_EQ(Generate(bad), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(Generate(bad), grpc::StatusCode::INVALID_ARGUMENT);
  const Scrape scrape = ScrapeMetrics(server_->port());
  EXPECT_EQ(scrape.Value(Of("rejected_requests_total", ",reason=\"not_serving\"")), 1);
  EXPECT_EQ(scrape.Value(Of("rejected_requests_total", ",reason=\"invalid\"")), 2);
  EXPECT_EQ(scrape.Value(Of("rejected_requests_total", ",reason=\"queue_full\"")), 0);
  EXPECT_EQ(scrape.Value(Of("request_params_n_count")), 0);
}

TEST_F(ControllerMetricsTest, ShowsLoadAndWhereClientsGaveUp) {
  cluster_.AttachWorker();
  cluster_.pipeline.Hold();
  std::vector<std::unique_ptr<grpc::ClientContext>> contexts;
  std::vector<std::unique_ptr<grpc::ClientReader<v1::StreamGenerateResponse>>> streams;
  for (uint32_t i = 0; i < 5; ++i) {  // 4 run, 1 waits
    contexts.push_back(std::make_unique<grpc::ClientContext>());
    streams.push_back(cluster_.generation->StreamGenerate(
        contexts.back().get(), Greedy<v1::StreamGenerateRequest>(5 + i, 4)));
    WaitFor(Of("num_requests_running"), std::min(i + 1, 4u));
  }
  WaitFor(Of("num_requests_waiting"), 1);
  const Scrape scrape = ScrapeMetrics(server_->port());
  EXPECT_GT(scrape.Value(Of("kv_cache_usage_perc")), 0);
  EXPECT_GT(scrape.Value("sluice_microbatches_inflight"), 0);
  contexts[4]->TryCancel();
  WaitFor(Of("cancelled_requests_total", ",where=\"queue\""), 1);
  contexts[0]->TryCancel();
  WaitFor(Of("cancelled_requests_total", ",where=\"prefill\""), 1);
  WaitFor(Of("request_success_total", ",finished_reason=\"abort\""), 2);
  cluster_.pipeline.Release();
  for (const auto& stream : streams) {
    v1::StreamGenerateResponse message;
    while (stream->Read(&message)) {
    }
    (void)stream->Finish();
  }
  cluster_.WaitIdle();
  WaitFor(Of("num_requests_running"), 0);
  WaitFor(Of("kv_cache_usage_perc"), 0);
}

TEST_F(ControllerMetricsTest, CountsALostWorkerAndTheRecovery) {
  cluster_.AttachWorker();
  const double epoch = ScrapeMetrics(server_->port()).Value("sluice_pipeline_epoch");
  cluster_.pipeline.Hold();
  grpc::ClientContext context;
  auto stream =
      cluster_.generation->StreamGenerate(&context, Greedy<v1::StreamGenerateRequest>(5, 40));
  WaitFor(Of("num_requests_running"), 1);
  cluster_.LoseWorker();
  cluster_.WaitReady(false);
  EXPECT_EQ(stream->Finish().error_code(), grpc::StatusCode::UNAVAILABLE);
  WaitFor("sluice_worker_up{worker=\"w0\"}", 0);
  WaitFor("sluice_pipeline_serving", 0);
  Scrape scrape = ScrapeMetrics(server_->port());
  EXPECT_EQ(scrape.Value("sluice_workers_attached"), 0);
  EXPECT_EQ(scrape.Value("sluice_workers_expected"), 1);
  EXPECT_EQ(scrape.Value("sluice_plans_lost_total"), 1);
  EXPECT_EQ(scrape.Value("sluice_recovery_seconds_count"), 0);
  EXPECT_EQ(scrape.Value(Of("failed_requests_total", ",reason=\"worker_lost\"")), 1);
  EXPECT_EQ(scrape.Value(Of("num_requests_running")), 0);
  cluster_.pipeline.Release();
  cluster_.AttachWorker();
  WaitFor("sluice_pipeline_serving", 1);
  scrape = ScrapeMetrics(server_->port());
  EXPECT_EQ(scrape.Value("sluice_recovery_seconds_count"), 1);
  EXPECT_EQ(scrape.Value("sluice_worker_up{worker=\"w0\"}"), 1);
  EXPECT_GT(scrape.Value("sluice_pipeline_epoch"), epoch);
}

// One request by a clock of the test.
TEST(RequestMeter, MeasuresEachPartOfARequest) {
  ControllerMetrics metrics;
  RequestSpec spec;
  spec.prompt = {1, 2, 3};
  spec.max_tokens = 9;
  const TimePoint arrival = TimePoint() + milliseconds(1000);
  RequestMeter meter(&metrics, arrival, spec);
  SchedulerEvent event;
  meter.OnEvent(arrival + milliseconds(100), event);  // Started
  event.kind = SchedulerEvent::Kind::kToken;
  meter.OnEvent(arrival + milliseconds(300), event);
  meter.OnEvent(arrival + milliseconds(350), event);
  meter.OnEvent(arrival + milliseconds(500), event);
  meter.OnStopped(arrival + milliseconds(500), 0);
  meter.OnEvent(arrival + milliseconds(600), event);  // Too late: not counted
  event.kind = SchedulerEvent::Kind::kDone;
  meter.OnEvent(arrival + milliseconds(600), event);
  EXPECT_NEAR(metrics.queue_seconds.sum(), .1, 1e-9);
  EXPECT_NEAR(metrics.first_token_seconds.sum(), .3, 1e-9);
  EXPECT_NEAR(metrics.inter_token_seconds.sum(), .2, 1e-9);
  EXPECT_NEAR(metrics.prefill_seconds.sum(), .2, 1e-9);
  EXPECT_NEAR(metrics.decode_seconds.sum(), .2, 1e-9);
  EXPECT_NEAR(metrics.per_output_token_seconds.sum(), .1, 1e-9);
  EXPECT_NEAR(metrics.inference_seconds.sum(), .4, 1e-9);
  EXPECT_NEAR(metrics.e2e_seconds.sum(), .5, 1e-9);
  EXPECT_EQ(metrics.prompt_tokens.value(), 3u);
  EXPECT_EQ(metrics.generation_tokens.value(), 3u);
}

TEST(ControllerMetrics, WorkersThatComeAndGoForEverAreForgotten) {
  ControllerMetrics metrics;
  for (int i = 0; i < 5000; ++i) {
    metrics.SetWorkers({"w" + std::to_string(i)});
  }
  metrics::Page page;
  metrics.Collect("tiny", &page);
  for (const auto& family : page.Take()) {
    if (family.name == "sluice_worker_up") {
      EXPECT_LE(family.metric.size(), 1025u);
    }
  }
}

}  // namespace
}  // namespace sluice::controller
