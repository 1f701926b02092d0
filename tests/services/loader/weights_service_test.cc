// The service over a real connection.
#include "services/loader/weights_service.h"

#include <thread>

#include "services/loader/shard_source.h"
#include "services/metrics/metrics_server.h"
#include "services/rpc/channel.h"
#include "services/rpc/crc32c.h"
#include "services/rpc/server_runner.h"
#include "tests/services/checkpoint/checkpoint_builder.h"
#include "tests/services/checkpoint/fails.h"
#include "tests/support/scrape.h"

namespace sluice::loader {
namespace {

namespace v1 = internal::v1;

class WeightsServiceTest : public testing::Test {
 protected:
  void SetUp() override {
    dir_.Write("tokenizer.json", std::string(kPartBytes + 5, 't'));
    auto model = checkpoint::TinyModel::Llama();
    // A table of 16 MiB, so that a stream cannot fit into the buffers of a connection.
    model.config["vocab_size"] = 262144;
    model.tensors["model.embed_tokens.weight"] = {
        "F16", {262144, 32}, std::string(16 << 20, '\x11')};
    auto opened = model.Open(dir_);
    ASSERT_TRUE(opened.ok()) << opened.status();
    checkpoint_ = *std::move(opened);
    service_ = std::make_unique<WeightsService>(*checkpoint_);
    grpc::Service* const services[] = {service_.get()};
    rpc::ServerOptions options;
    options.addresses = {"127.0.0.1:0"};
    auto started = rpc::ServerRunner::Start(options, services);
    ASSERT_TRUE(started.ok()) << started.status();
    server_ = *std::move(started);
    stub_ = v1::Weights::NewStub(rpc::MakeChannel(
        "127.0.0.1:" + std::to_string(server_->ports()[0]), rpc::ChannelKind::kLink));
  }

  v1::FetchRequest Everything() const {
    v1::FetchRequest request;
    request.set_model_digest(checkpoint_->description().model_digest());
    request.mutable_layers()->set_end(1);
    request.set_embedding(true);
    request.set_head(true);
    return request;
  }

  checkpoint::TempDir dir_;
  std::unique_ptr<checkpoint::Checkpoint> checkpoint_;
  std::unique_ptr<WeightsService> service_;
  std::unique_ptr<rpc::ServerRunner> server_;
  std::unique_ptr<v1::Weights::Stub> stub_;
};

TEST_F(WeightsServiceTest, PlansAndFetches) {
  grpc::ClientContext plan_context;
  v1::PlanShardsResponse plan;
  ASSERT_TRUE(stub_->PlanShards(&plan_context, v1::PlanShardsRequest(), &plan).ok());
  EXPECT_EQ(plan.tensors_size(), 11);
  grpc::ClientContext context;
  auto reader = stub_->Fetch(&context, Everything());
  v1::FetchResponse part;
  uint64_t bytes = 0;
  std::string last;
  while (reader->Read(&part)) {
    bytes += part.data().size();
    last = part.name();
    ASSERT_EQ(part.crc32c(), rpc::Crc32c(part.data().data(), part.data().size()));
  }
  EXPECT_TRUE(reader->Finish().ok());
  uint64_t want = plan.tensors(0).bytes();  // The table again, as the head.
  for (const auto& tensor : plan.tensors()) want += tensor.bytes();
  EXPECT_EQ(bytes, want);
  EXPECT_EQ(last, "lm_head.weight");
}

TEST_F(WeightsServiceTest, FetchesFiles) {
  v1::FetchFileRequest request;
  request.set_model_digest(checkpoint_->description().model_digest());
  request.set_name("tokenizer.json");
  grpc::ClientContext context;
  auto reader = stub_->FetchFile(&context, request);
  v1::FetchFileResponse piece;
  std::string content;
  while (reader->Read(&piece)) {
    EXPECT_EQ(piece.crc32c(), rpc::Crc32c(piece.data().data(), piece.data().size()));
    content += piece.data();
  }
  EXPECT_TRUE(reader->Finish().ok());
  EXPECT_EQ(content, std::string(kPartBytes + 5, 't'));
}

TEST_F(WeightsServiceTest, ShowsPrometheusWhatItServed) {
  const auto server = metrics::MetricsServer::Start(
      "127.0.0.1:0", [this](metrics::Page* page) { service_->Collect(page); });
  ASSERT_TRUE(server.ok()) << server.status();
  const std::string model = "model_name=\"" + checkpoint_->description().model_name() + "\"";
  const std::string tensors = "sluice_loader_served_bytes_total{" + model + ",kind=\"tensor\"}";
  const std::string files = "sluice_loader_served_bytes_total{" + model + ",kind=\"file\"}";
  Scrape before = ScrapeMetrics((*server)->port());
  EXPECT_EQ(before.types["sluice_loader_served_bytes_total"], "counter");
  EXPECT_EQ(before.types["sluice_loader_converted_bytes_total"], "counter");
  EXPECT_EQ(before.types["sluice_loader_conversion_seconds"], "histogram");
  EXPECT_EQ(before.types["sluice_loader_streams"], "gauge");
  EXPECT_EQ(before.Value(tensors), 0);
  EXPECT_EQ(before.Value(files), 0);
  grpc::ClientContext context;
  auto reader = stub_->Fetch(&context, Everything());
  v1::FetchResponse part;
  double bytes = 0;
  while (reader->Read(&part)) bytes += static_cast<double>(part.data().size());
  EXPECT_TRUE(reader->Finish().ok());
  v1::FetchFileRequest request;
  request.set_model_digest(checkpoint_->description().model_digest());
  request.set_name("tokenizer.json");
  grpc::ClientContext file_context;
  auto file_reader = stub_->FetchFile(&file_context, request);
  v1::FetchFileResponse piece;
  while (file_reader->Read(&piece)) {
  }
  EXPECT_TRUE(file_reader->Finish().ok());
  const Scrape after = ScrapeMetrics((*server)->port());
  EXPECT_EQ(after.Value(tensors), bytes);
  EXPECT_EQ(after.Value(files), kPartBytes + 5);
}

TEST_F(WeightsServiceTest, EndsBadCallsWithTheirCode) {
  v1::FetchResponse part;
  v1::FetchRequest request = Everything();
  request.mutable_layers()->set_end(9);
  grpc::ClientContext first;
  auto reader = stub_->Fetch(&first, request);
  EXPECT_FALSE(reader->Read(&part));
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  request.set_model_digest("other");
  grpc::ClientContext second;
  reader = stub_->Fetch(&second, request);
  EXPECT_FALSE(reader->Read(&part));
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  v1::FetchFileRequest file;
  file.set_model_digest(checkpoint_->description().model_digest());
  file.set_name("../config.json");
  v1::FetchFileResponse piece;
  grpc::ClientContext third;
  auto file_reader = stub_->FetchFile(&third, file);
  EXPECT_FALSE(file_reader->Read(&piece));
  EXPECT_EQ(file_reader->Finish().error_code(), grpc::StatusCode::NOT_FOUND);
}

// A client that goes away in the middle leaves nothing behind: more calls than there are streams.
TEST_F(WeightsServiceTest, CancelledStreamsGiveBackTheirPlace) {
  for (int i = 0; i < 100; ++i) {
    grpc::ClientContext context;
    auto reader = stub_->Fetch(&context, Everything());
    v1::FetchResponse part;
    // A place may still be held by a stream that is being cancelled; it comes free without our
    // help.
    while (!reader->Read(&part)) {
      ASSERT_EQ(reader->Finish().error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
      grpc::ClientContext retry;
      std::this_thread::yield();
      reader = nullptr;
      break;
    }
    context.TryCancel();
  }
  server_->Shutdown(/*grace_ms=*/5000);
}

}  // namespace
}  // namespace sluice::loader
