#include "services/cli/answer_stream.h"

#include <gmock/gmock.h>
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>
#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"

namespace sluice::cli {
namespace {

using ::testing::HasSubstr;

// Answers "Hello" in two pieces, in the way the test wants it to end.
class FakeService : public v1::GenerationService::Service {
 public:
  grpc::Status StreamGenerate(grpc::ServerContext* context,
                              const v1::StreamGenerateRequest* request,
                              grpc::ServerWriter<v1::StreamGenerateResponse>* writer) override {
    v1::StreamGenerateResponse message;
    message.set_text("Hel");
    message.add_token_ids(1);
    writer->Write(message);
    message.set_text("lo");
    message.set_token_index(1);
    message.add_token_ids(2);
    if (finish) {
      message.set_finish_reason(v1::FINISH_REASON_STOP);
      message.mutable_usage()->set_prompt_tokens(5);
    }
    writer->Write(message);
    prompt = request->text();
    return status;
  }

  bool finish = true;
  grpc::Status status;
  std::string prompt;
};

class AnswerStreamTest : public ::testing::Test {
 protected:
  AnswerStreamTest() {
    int port = 0;
    grpc::ServerBuilder builder;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
    builder.RegisterService(&service_);
    server_ = builder.BuildAndStart();
    address_ = absl::StrCat("127.0.0.1:", port);
  }

  StreamedAnswer Ask() {
    v1::StreamGenerateRequest request;
    request.set_text("prompt");
    grpc::ClientContext context;
    return StreamAnswer(address_, request, &context,
                        [this](const std::string& text) { pieces_.push_back(text); });
  }

  FakeService service_;
  std::unique_ptr<grpc::Server> server_;
  std::string address_;
  std::vector<std::string> pieces_;
};

TEST_F(AnswerStreamTest, WholeAnswer) {
  const StreamedAnswer answer = Ask();
  EXPECT_TRUE(answer.status.ok()) << answer.status;
  EXPECT_EQ(answer.text, "Hello");
  EXPECT_EQ(answer.tokens, 3u);
  EXPECT_EQ(answer.prompt_tokens, 5u);
  EXPECT_EQ(answer.finish_reason, v1::FINISH_REASON_STOP);
  EXPECT_THAT(pieces_, ::testing::ElementsAre("Hel", "lo"));
  EXPECT_EQ(service_.prompt, "prompt");
  EXPECT_THAT(StatsLine(answer), HasSubstr("5 prompt tokens, 3 tokens"));
}

TEST_F(AnswerStreamTest, HalfAnAnswerIsNeverWhole) {
  service_.finish = false;
  EXPECT_EQ(Ask().status.code(), absl::StatusCode::kDataLoss);
  service_.status = grpc::Status(grpc::StatusCode::UNAVAILABLE, "worker-1 was lost");
  const StreamedAnswer answer = Ask();
  EXPECT_EQ(answer.status.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(ErrorLine(answer.status, address_), HasSubstr("worker-1 was lost"));
}

TEST_F(AnswerStreamTest, NobodyListens) {
  server_->Shutdown();
  const StreamedAnswer answer = Ask();
  EXPECT_EQ(answer.status.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(ErrorLine(answer.status, address_), HasSubstr(address_));
}

}  // namespace
}  // namespace sluice::cli
