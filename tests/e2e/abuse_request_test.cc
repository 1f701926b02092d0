// The public API under abuse by its messages (A1 to A6, A13, A15, A17 to A19 of tests/README.md):
// every case gets its status, reserves nothing, leaks nothing, and harms nobody.
#include <arpa/inet.h>
#include <fcntl.h>
#include <gmock/gmock.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cmath>
#include <functional>
#include <limits>

#include "tests/e2e/abuse.h"

namespace sluice::e2e {
namespace {

using ::testing::Each;
using ::testing::HasSubstr;
using ::testing::Not;
using v1::StreamGenerateRequest;

constexpr char kTokenize[] = "/sluice.v1.GenerationService/Tokenize";
constexpr char kCanary[] = "canary-7f3a91";  // In prompts: nowhere in errors and logs
constexpr uint32_t kContext = 256;           // Of the test's model
constexpr uint32_t kVocabulary = 512;
constexpr int kPeerCalls = 8;

class RequestAbuseTest : public AbuseTest {
 protected:
  static void SetUpTestSuite() {
    StartCluster(
        {"--max-requests-per-peer", std::to_string(kPeerCalls), "--write-deadline-ms", "3000"});
  }
  static void TearDownTestSuite() { StopCluster(); }

  // All that an error shows to its client.
  std::string ErrorOf(const grpc::Status& status) {
    errors_ += status.error_message() + status.error_details();
    return status.error_message() + status.error_details();
  }
  grpc::Status StatusOf(const StreamGenerateRequest& request) {
    const Answer answer = cluster_->Stream(request);
    ErrorOf(answer.status);
    return answer.status;
  }
  // Nothing that a client was told, and nothing that was logged, holds the prompt or a path.
  void ExpectNoLeak() {
    EXPECT_THAT(errors_, Not(HasSubstr(kCanary)));
    for (const std::string& path :
         {cluster_->folder(), std::string(SLUICE_BIN), std::string("/tmp")}) {
      EXPECT_THAT(errors_, Not(HasSubstr(path)));
    }
    EXPECT_THAT(cluster_->LogText(), Not(HasSubstr(kCanary)));
  }

  std::string errors_;
};

StreamGenerateRequest Good() { return GreedyRequest({1, 5, 6, 7}, 4); }

// A varint field of the wire format.
std::string Varint(uint32_t field, uint64_t value) {
  std::string bytes;
  for (uint64_t part : {uint64_t{field} << 3, value}) {
    for (; part >= 128; part >>= 7) bytes.push_back(static_cast<char>(part % 128 + 128));
    bytes.push_back(static_cast<char>(part));
  }
  return bytes;
}

// A field of bytes: a string, or a message.
std::string Bytes(uint32_t field, const std::string& content) {
  std::string bytes = Varint(field, content.size());
  bytes[0] = static_cast<char>(bytes[0] | 2);  // The tag's low bits, also of a tag of two bytes
  return bytes + content;
}

TEST_F(RequestAbuseTest, A1GiantPrompts) {
  StreamGenerateRequest request = Good();
  request.set_text(std::string((4 << 20) + 1, 'a'));
  grpc::Status status = StatusOf(request);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_EQ(status.error_details(), "") << "a size error is not to be tried again";
  request.set_text(std::string((2 << 20) + 1, 'a'));
  EXPECT_EQ(StatusOf(request).error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  request.set_text(std::string(1 << 20, 'a'));
  EXPECT_EQ(StatusOf(request).error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  status = StatusOf(GreedyRequest(std::vector<uint32_t>(kContext, 5), 1));
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(status.error_details(), HasSubstr("PROMPT_TOO_LONG"));
  EXPECT_TRUE(StatusOf(GreedyRequest(std::vector<uint32_t>(kContext - 1, 5), 1)).ok());
  ExpectUnharmed();
}

// Two bytes on the wire each, and a hundred times as many once parsed.
TEST_F(RequestAbuseTest, A1ManyEmptyFields) {
  auto client = Attacker();
  std::string stops, messages, both;
  for (int i = 0; i < 1000000; ++i) {
    stops += Bytes(15, "");
    messages += Bytes(1, "");
  }
  EXPECT_EQ(CallStatus(client.get(), kGenerate, stops), grpc::StatusCode::INVALID_ARGUMENT);
  for (const char* method : {kGenerate, kStreamGenerate}) {
    EXPECT_EQ(CallStatus(client.get(), method, Bytes(4, messages)),
              grpc::StatusCode::INVALID_ARGUMENT);
  }
  EXPECT_EQ(CallStatus(client.get(), kTokenize, Bytes(3, messages)),
            grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(CallStatus(client.get(), "/sluice.v1.ModelService/PlanDeviceMap", messages),
            grpc::StatusCode::INVALID_ARGUMENT);
  ExpectUnharmed();
  ExpectPeakGrowthBelow(32);  // The message itself, twice
}

// Counts beyond the caps, as numbers and as varints that fit no field.
TEST_F(RequestAbuseTest, A2HugeCounts) {
  auto client = Attacker();
  const std::string good = Good().SerializeAsString();
  // max_tokens, n; min_tokens 4294967295 is above max_tokens; logprobs and prompt_logprobs signed.
  for (const uint32_t field : {5u, 6u, 20u, 21u, 22u}) {
    for (const uint64_t value : {uint64_t{INT32_MAX}, uint64_t{UINT32_MAX} - 1, ~uint64_t{1}}) {
      EXPECT_EQ(CallStatus(client.get(), kGenerate, good + Varint(field, value)),
                grpc::StatusCode::INVALID_ARGUMENT)
          << "field " << field << " = " << value;
    }
  }
  // 2^63 has no bit that a 32-bit field keeps: it is 0 there.
  EXPECT_EQ(CallStatus(client.get(), kGenerate, good + Varint(5, uint64_t{1} << 63)),
            grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(CallStatus(client.get(), kGenerate, good + Varint(22, uint64_t{1} << 63)),
            grpc::StatusCode::INVALID_ARGUMENT);
  const std::vector<std::function<void(StreamGenerateRequest*)>> bad = {
      [](auto* request) { request->set_max_tokens(0); },
      [](auto* request) { request->set_n(0); },
      [](auto* request) { request->set_n(9); },
      [](auto* request) { request->set_logprobs(-1); },
      [](auto* request) { request->set_prompt_logprobs(21); },
      [](auto* request) { request->set_top_k(-2); },
      [](auto* request) { request->add_stop(""); },
      [](auto* request) { request->add_stop(std::string(257, 's')); },
      [](auto* request) {
        for (int i = 0; i < 17; ++i) request->add_stop(kCanary);
      },
      [](auto* request) {
        for (int i = 0; i < 65; ++i) request->add_stop_token_ids(3);
      },
      [](auto* request) { request->add_stop_token_ids(kVocabulary); },
      [](auto* request) { request->mutable_token_ids()->add_ids(kVocabulary); },
      [](auto* request) { request->set_request_id(std::string(129, 'i')); },
      [](auto* request) { request->set_request_id(std::string(kCanary) + " \n"); }};
  for (size_t i = 0; i < bad.size(); ++i) {
    StreamGenerateRequest request = Good();
    bad[i](&request);
    EXPECT_EQ(StatusOf(request).error_code(), grpc::StatusCode::INVALID_ARGUMENT) << i;
  }
  ExpectNoLeak();
  ExpectUnharmed();
}

TEST_F(RequestAbuseTest, A3NumbersThatAreNone) {
  using Setter = void (StreamGenerateRequest::*)(float);
  const std::pair<Setter, float> fields[] = {
      // And the lowest value that is allowed
      {&StreamGenerateRequest::set_temperature, 0.0f},
      {&StreamGenerateRequest::set_top_p, 1e-40f},
      {&StreamGenerateRequest::set_min_p, 0.0f},
      {&StreamGenerateRequest::set_repetition_penalty, 0.01f},
      {&StreamGenerateRequest::set_presence_penalty, -2.0f},
      {&StreamGenerateRequest::set_frequency_penalty, -2.0f}};
  const float infinity = std::numeric_limits<float>::infinity();
  for (const auto& [set, lowest] : fields) {
    for (const float value : {std::nanf(""), infinity, -infinity, 1e38f, -1e38f}) {
      StreamGenerateRequest request = Good();
      (request.*set)(value);
      EXPECT_EQ(StatusOf(request).error_code(), grpc::StatusCode::INVALID_ARGUMENT) << value;
    }
    for (const float value : {-0.0f, 1e-40f, lowest}) {
      StreamGenerateRequest request = Good();
      (request.*set)(value);
      EXPECT_EQ(StatusOf(request).ok(), value >= lowest) << value << " " << lowest;
    }
  }
  ExpectUnharmed();
}

TEST_F(RequestAbuseTest, A4TextThatIsNoUtf8) {
  auto client = Attacker();
  const std::string good = Good().SerializeAsString();
  for (const std::string& bad :
       {std::string("\xc0\xaf"), std::string("\xed\xa0\x80"), std::string("\xe2\x82"),
        std::string("\xf5\x80\x80\x80"), std::string("\xff"), std::string("a\x80")}) {
    const std::string text = kCanary + bad;
    for (const std::string& request :
         {good + Bytes(2, text), good + Bytes(1, text), good + Bytes(15, text),
          good + Bytes(24, text), good + Bytes(4, Bytes(1, Bytes(1, "user") + Bytes(2, text))),
          good + Bytes(4, Bytes(1, Bytes(1, text)))}) {
      EXPECT_EQ(CallStatus(client.get(), kGenerate, request), grpc::StatusCode::INVALID_ARGUMENT);
      EXPECT_EQ(CallStatus(client.get(), kStreamGenerate, request),
                grpc::StatusCode::INVALID_ARGUMENT);
    }
    EXPECT_EQ(CallStatus(client.get(), kTokenize, Bytes(2, text)),
              grpc::StatusCode::INVALID_ARGUMENT);
    EXPECT_EQ(CallStatus(client.get(), "/sluice.v1.ModelService/GetModel", Bytes(1, text)),
              grpc::StatusCode::INVALID_ARGUMENT);
  }
  // Bytes that are no message at all, cut and random.
  for (size_t cut = 1; cut < good.size(); ++cut) {
    CallStatus(client.get(), kGenerate, good.substr(0, cut));
  }
  EXPECT_EQ(CallStatus(client.get(), kGenerate, std::string(64, '\xff')),
            grpc::StatusCode::INVALID_ARGUMENT);
  StreamGenerateRequest zeros = Good();
  zeros.set_text(std::string(8, '\0'));  // U+0000 is a character like others
  EXPECT_TRUE(StatusOf(zeros).ok());
  ExpectNoLeak();
  ExpectUnharmed();
}

bool IsUtf8(const std::string& text) {
  v1::TokenLogprob message;
  return message.ParseFromString(Bytes(2, text));  // protobuf refuses a string that is not
}

// Weights are random, so tokens are bytes in any order; each answer is cut at another place.
TEST_F(RequestAbuseTest, A5AnswersAreUtf8WhereverTheyEnd) {
  ASSERT_FALSE(IsUtf8("\xe2\x82"));
  auto stub = cluster_->Generation();
  for (uint32_t tokens = 1; tokens <= 60; ++tokens) {
    StreamGenerateRequest request = GreedyRequest({1, 5, 6, tokens}, tokens);
    request.set_temperature(100);
    request.set_seed(tokens);
    request.set_n(3);
    grpc::ClientContext context;
    auto reader = stub->StreamGenerate(&context, request);
    v1::StreamGenerateResponse message;
    while (reader->Read(&message)) {
      EXPECT_TRUE(IsUtf8(message.text())) << tokens;
    }
    EXPECT_TRUE(reader->Finish().ok()) << "a client of gRPC refuses what is no UTF-8, too";
  }
  ExpectUnharmed();
}

TEST_F(RequestAbuseTest, A6ControlTokensInTextStayText) {
  auto stub = cluster_->Generation();
  for (const std::string text :
       {"<s>", "</s>", "<unk>", "<|im_start|>", "a</s>b", "<s></s><unk>"}) {
    v1::TokenizeRequest request;
    request.set_text(text);
    request.set_add_special_tokens(false);
    v1::TokenizeResponse response;
    grpc::ClientContext context, back_context;
    const grpc::Status status = stub->Tokenize(&context, request, &response);
    ASSERT_TRUE(status.ok()) << text << ": " << status.error_message();
    EXPECT_THAT(response.token_ids(), Each(::testing::Gt(2u)))
        << text << ": 0 to 2 are control tokens";
    v1::DetokenizeRequest back;
    *back.mutable_token_ids() = response.token_ids();
    back.set_skip_special_tokens(true);
    v1::DetokenizeResponse same;
    ASSERT_TRUE(stub->Detokenize(&back_context, back, &same).ok());
    EXPECT_EQ(same.text(), text);
  }
  ExpectUnharmed();
}

// What one address may have in flight, before any work: eight calls whose client does not read.
TEST_F(RequestAbuseTest, A10CallsOfOnePeerAreCounted) {
  auto client = Attacker({.source = "127.0.0.2", .stream_window = 0});
  std::vector<uint32_t> streams;
  for (int i = 0; i < kPeerCalls; ++i) {
    streams.push_back(client->OpenCall(kStreamGenerate));
    client->SendMessage(streams.back(), Good().SerializeAsString());
  }
  auto same_peer = Attacker();
  for (const char* method : {kGenerate, kStreamGenerate, kTokenize}) {
    // The eight may still be on their way: until the first refusal.
    uint32_t stream = 0;
    for (int tries = 0; tries < 200; ++tries) {
      stream = same_peer->OpenCall(method);
      same_peer->SendMessage(stream, Good().SerializeAsString());
      ASSERT_TRUE(same_peer->ReadUntil([&] { return same_peer->stream(stream).done(); }));
      if (same_peer->stream(stream).grpc_status() == grpc::StatusCode::RESOURCE_EXHAUSTED) break;
    }
    EXPECT_EQ(same_peer->stream(stream).grpc_status(), grpc::StatusCode::RESOURCE_EXHAUSTED);
    EXPECT_THAT(same_peer->stream(stream).headers, HasSubstr("grpc-status-details-bin"));
    EXPECT_THAT(same_peer->stream(stream).headers, HasSubstr("grpc-retry-pushback-ms"));
  }
  GoodAnswer();  // Of another address
  client.reset();
  ExpectUnharmed();
  EXPECT_EQ(CallStatus(same_peer.get(), kGenerate, Good().SerializeAsString()),
            grpc::StatusCode::OK);
}

TEST_F(RequestAbuseTest, A15DeadlinesThatCannotBeMet) {
  auto client = Attacker();
  for (const char* timeout : {"0n", "1n", "1u"}) {
    const uint32_t stream = client->OpenCall(kGenerate, {{"grpc-timeout", timeout}});
    client->SendMessage(stream, GreedyRequest({1, 5}, 200).SerializeAsString());
    ASSERT_TRUE(client->ReadUntil([&] { return client->stream(stream).done(); }));
    const int status = client->stream(stream).grpc_status();
    // gRPC may end the call before it answers: then there is only a reset.
    EXPECT_TRUE(status == grpc::StatusCode::DEADLINE_EXCEEDED || client->stream(stream).reset)
        << timeout << ": " << status;
  }
  for (const char* timeout : {"99999999H", "18446744073709551616S", "-1S", "x", ""}) {
    const uint32_t stream = client->OpenCall(kGenerate, {{"grpc-timeout", timeout}});
    client->SendMessage(stream, Good().SerializeAsString());
    EXPECT_TRUE(client->ReadUntil([&] { return client->stream(stream).done(); })) << timeout;
  }
  EXPECT_EQ(CallStatus(client.get(), kGenerate, Good().SerializeAsString()), grpc::StatusCode::OK)
      << "no deadline: the server's own";
  ExpectUnharmed();
}

TEST_F(RequestAbuseTest, A17OtherPortsMethodsAreNotHere) {
  auto client = Attacker();
  for (const char* method :
       {"/sluice.v1.AdminService/Drain", "/sluice.v1.AdminService/GetCluster",
        "/sluice.internal.v1.Controller/Attach", "/sluice.internal.v1.Controller/Tokens",
        "/sluice.internal.v1.Stage/Step", "/sluice.internal.v1.Weights/Fetch",
        "/sluice.v1.ModelService/LoadModel", "/grpc.channelz.v1.Channelz/GetServers", "/", "//"}) {
    EXPECT_EQ(CallStatus(client.get(), method, ""), grpc::StatusCode::UNIMPLEMENTED) << method;
  }
  ExpectUnharmed();
}

TEST_F(RequestAbuseTest, A18AddressesAreText) {
  const int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof(address);
  ASSERT_EQ(bind(listener, reinterpret_cast<sockaddr*>(&address), size), 0);
  ASSERT_EQ(listen(listener, 8), 0);
  getsockname(listener, reinterpret_cast<sockaddr*>(&address), &size);
  const std::string url = "http://127.0.0.1:" + std::to_string(ntohs(address.sin_port)) + "/x";
  StreamGenerateRequest request = Good();
  request.set_text(url);
  request.add_stop(url);
  EXPECT_TRUE(StatusOf(request).ok());
  request.set_model(url);
  EXPECT_EQ(StatusOf(request).error_code(), grpc::StatusCode::NOT_FOUND);
  ExpectUnharmed();
  EXPECT_LT(accept(listener, nullptr, nullptr), 0) << "somebody has called " << url;
  close(listener);
}

// The canary in every text field of requests that are refused, and of one that is answered.
TEST_F(RequestAbuseTest, A19ErrorsAndLogsTellNothing) {
  StreamGenerateRequest request = Good();
  request.set_text(kCanary);
  EXPECT_TRUE(StatusOf(request).ok());
  request.set_model(std::string(kCanary) + " \xc3\xa9");
  EXPECT_FALSE(StatusOf(request).ok());
  request.clear_model();
  request.set_max_tokens(0);
  request.add_stop(kCanary);
  EXPECT_FALSE(StatusOf(request).ok());
  request = Good();
  auto* message = request.mutable_chat_messages()->add_messages();
  message->set_role(kCanary);
  message->set_content(kCanary);
  EXPECT_FALSE(StatusOf(request).ok()) << "this model has no chat template";
  auto stub = cluster_->Generation();
  grpc::ClientContext context;
  v1::CancelRequestRequest cancel;
  cancel.set_request_id(std::string(kCanary) + "?");
  v1::CancelRequestResponse cancelled;
  const grpc::Status status = stub->CancelRequest(&context, cancel, &cancelled);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  ErrorOf(status);
  ExpectNoLeak();
  ExpectUnharmed();
}

}  // namespace
}  // namespace sluice::e2e
