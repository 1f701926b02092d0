// A page over a real HTTP endpoint: format, types, labels, buckets, and who may listen.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <thread>
#include <vector>

#include "services/metrics/metrics_server.h"
#include "tests/support/scrape.h"

namespace sluice::metrics {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

constexpr double kBounds[] = {0.1, 1, 10};

std::unique_ptr<MetricsServer> Serve(MetricsServer::Collect collect) {
  auto server = MetricsServer::Start("127.0.0.1:0", std::move(collect));
  EXPECT_TRUE(server.ok()) << server.status();
  return *std::move(server);
}

TEST(Histogram, BucketsIncludeTheirUpperEnd) {
  Histogram histogram(kBounds);
  for (const double value : {0.0, 0.1, 0.11, 1.0, 10.0, 11.0}) {
    histogram.Observe(value);
  }
  EXPECT_THAT(histogram.counts(), ElementsAre(2u, 2u, 1u, 1u));
  EXPECT_NEAR(histogram.sum(), 22.21, 1e-9);
}

TEST(Histogram, NothingIsLostBetweenThreads) {
  Histogram histogram(kBounds);
  Counter counter;
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      for (int j = 0; j < 10000; ++j) {
        histogram.Observe(2);
        counter.Add(3);
      }
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  EXPECT_THAT(histogram.counts(), ElementsAre(0u, 0u, 40000u, 0u));
  EXPECT_EQ(histogram.sum(), 80000);
  EXPECT_EQ(counter.value(), 120000u);
}

TEST(MetricsServer, ServesAPageThatMoves) {
  Counter counter;
  Gauge gauge;
  Histogram histogram(kBounds);
  const auto server = Serve([&](Page* page) {
    page->AddGauge("before_labels", "Without any.", 1);
    page->set_common_labels({{"model_name", "a\"b\\c"}});
    page->AddCounter("things_total", "Things.", static_cast<double>(counter.value()),
                     {{"kind", "one"}});
    page->AddCounter("things_total", "Things.", 7, {{"kind", "two"}});
    page->AddGauge("level", "Level.", gauge.value());
    page->AddHistogram("wait_seconds", "Wait.", histogram);
  });
  counter.Add(4);
  gauge.Set(0.25);
  histogram.Observe(0.5);
  histogram.Observe(99);
  Scrape scrape = ScrapeMetrics(server->port());
  EXPECT_EQ(scrape.status, 200);
  EXPECT_EQ(scrape.types["things_total"], "counter");
  EXPECT_EQ(scrape.types["level"], "gauge");
  EXPECT_EQ(scrape.types["wait_seconds"], "histogram");
  EXPECT_EQ(scrape.helps["things_total"], "Things.");
  EXPECT_EQ(scrape.Value("before_labels"), 1);
  const std::string model = R"(model_name="a\"b\\c")";
  EXPECT_EQ(scrape.Value("things_total{" + model + ",kind=\"one\"}"), 4);
  EXPECT_EQ(scrape.Value("things_total{" + model + ",kind=\"two\"}"), 7);
  EXPECT_EQ(scrape.Value("level{" + model + "}"), 0.25);
  EXPECT_EQ(scrape.Value("wait_seconds_bucket{" + model + ",le=\"0.1\"}"), 0);
  EXPECT_EQ(scrape.Value("wait_seconds_bucket{" + model + ",le=\"1\"}"), 1);
  EXPECT_EQ(scrape.Value("wait_seconds_bucket{" + model + ",le=\"+Inf\"}"), 2);
  EXPECT_EQ(scrape.Value("wait_seconds_count{" + model + "}"), 2);
  EXPECT_EQ(scrape.Value("wait_seconds_sum{" + model + "}"), 99.5);
  counter.Add(5);
  EXPECT_EQ(ScrapeMetrics(server->port()).Value("things_total{" + model + ",kind=\"one\"}"), 9);
}

TEST(MetricsServer, TellsOfItsProcess) {
  const auto server = Serve([](Page*) {});
  Scrape scrape = ScrapeMetrics(server->port());
  EXPECT_EQ(scrape.types["process_cpu_seconds_total"], "counter");
  EXPECT_GT(scrape.Value("process_resident_memory_bytes"), 1e6);
  EXPECT_GT(scrape.Value("process_open_fds"), 3);
  EXPECT_GT(scrape.Value("process_start_time_seconds"), 1.6e9);
}

TEST(MetricsServer, OtherPathsAreNotThere) {
  const auto server = Serve([](Page*) {});
  EXPECT_THAT(HttpGet(server->port(), "/"), HasSubstr(" 404 "));
  EXPECT_THAT(HttpGet(server->port(), "/../../etc/passwd"), testing::Not(HasSubstr("root:")));
}

TEST(MetricsServer, EmptyIsOffAndATakenPortIsAnError) {
  const auto off = MetricsServer::Start("", [](Page*) {});
  ASSERT_TRUE(off.ok());
  EXPECT_EQ(*off, nullptr);
  const auto server = Serve([](Page*) {});
  for (const std::string& address : {"127.0.0.1:" + std::to_string(server->port()),
                                     std::string("nonsense"), std::string("192.0.2.1:0")}) {
    const auto refused = MetricsServer::Start(address, [](Page*) {});
    ASSERT_EQ(refused.status().code(), absl::StatusCode::kUnavailable) << address;
    EXPECT_THAT(refused.status().ToString(), HasSubstr("--metrics-listen " + address));
  }
}

TEST(MetricsServer, NobodyListensAfterTheEnd) {
  auto server = Serve([](Page*) {});
  const int port = server->port();
  server.reset();
  EXPECT_EQ(HttpGet(port, "/metrics"), "");
}

}  // namespace
}  // namespace sluice::metrics
