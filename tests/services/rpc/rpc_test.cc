// Statuses with details there and back, CRC32C, flags.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "proto/google/rpc/status.pb.h"
#include "services/rpc/crc32c.h"
#include "services/rpc/error_details.h"
#include "services/rpc/flags.h"
#include "services/rpc/grpc_status.h"

namespace sluice::rpc {
namespace {

using ::testing::HasSubstr;

TEST(GrpcStatus, KeepsEveryCodeAndMessage) {
  for (int code = 0; code <= 16; ++code) {
    const absl::Status status(static_cast<absl::StatusCode>(code), code == 0 ? "" : "why");
    const grpc::Status wire = ToGrpcStatus(status);
    EXPECT_EQ(static_cast<int>(wire.error_code()), code);
    EXPECT_EQ(FromGrpcStatus(wire), status);
  }
}

TEST(GrpcStatus, UnknownCodeBecomesUnknown) {
  // 20: no code, but a value that the enumeration can hold.
  EXPECT_EQ(FromGrpcStatus(grpc::Status(static_cast<grpc::StatusCode>(20), "x")).code(),
            absl::StatusCode::kUnknown);
}

TEST(GrpcStatus, CarriesDetails) {
  absl::Status status = absl::ResourceExhaustedError("queue is full");
  AttachRetryInfo(1500, &status);
  AttachQuotaFailure("queue", "64 requests wait", &status);
  AttachErrorInfo("QUEUE_FULL", {{"limit", "64"}}, &status);
  const grpc::Status wire = ToGrpcStatus(status);
  google::rpc::Status parsed;
  ASSERT_TRUE(parsed.ParseFromString(wire.error_details()));
  EXPECT_EQ(parsed.code(), 8);
  EXPECT_EQ(parsed.message(), "queue is full");
  ASSERT_EQ(parsed.details_size(), 3);

  const absl::Status back = FromGrpcStatus(wire);
  const auto retry = GetDetail<google::rpc::RetryInfo>(back);
  ASSERT_TRUE(retry.has_value());
  EXPECT_EQ(retry->retry_delay().seconds(), 1);
  EXPECT_EQ(retry->retry_delay().nanos(), 500000000);
  EXPECT_EQ(GetDetail<google::rpc::QuotaFailure>(back)->violations(0).subject(), "queue");
  const auto info = GetDetail<google::rpc::ErrorInfo>(back);
  EXPECT_EQ(info->domain(), "sluice");
  EXPECT_EQ(info->metadata().at("limit"), "64");
  EXPECT_FALSE(GetDetail<google::rpc::BadRequest>(back).has_value());
}

TEST(GrpcStatus, EachTypeOfDetailAtMostOnce) {
  absl::Status status = FieldError("sampling.top_p", "must be in (0, 1]");
  AttachFieldViolation("sampling.seed", "is missing", &status);
  AttachErrorInfo("A", {}, &status);
  AttachErrorInfo("B", {}, &status);
  EXPECT_THAT(std::string(status.message()), HasSubstr("sampling.top_p: must be"));
  EXPECT_EQ(GetDetail<google::rpc::BadRequest>(status)->field_violations_size(), 2);
  EXPECT_EQ(GetDetail<google::rpc::ErrorInfo>(status)->reason(), "B");
}

TEST(GrpcStatus, CutsWhatDoesNotFitIntoHeaders) {
  absl::Status status = absl::InternalError(std::string(1020, 'x') + "\u20ac\u20ac\u20ac");
  AttachResourceInfo("model", std::string(10000, 'm'), &status);
  AttachRetryInfo(1000, &status);
  const grpc::Status wire = ToGrpcStatus(status);
  EXPECT_LE(wire.error_message().size(), 1024u);
  EXPECT_EQ(wire.error_message(), std::string(1020, 'x') + "...");
  EXPECT_LT(wire.error_details().size(), 6000u);
  EXPECT_TRUE(GetDetail<google::rpc::RetryInfo>(FromGrpcStatus(wire)).has_value());
}

TEST(Crc32c, KnownVectors) {
  EXPECT_EQ(Crc32c("123456789", 9), 0xE3069283u);
  EXPECT_EQ(Crc32c("", 0), 0u);
  EXPECT_EQ(Crc32c(std::string(32, '\0').data(), 32), 0x8A9136AAu);  // RFC 3720 B.4
  EXPECT_EQ(Crc32c(std::string(32, '\xff').data(), 32), 0x62A8AB43u);
}

TEST(Crc32c, FastAndTableAgreeAtEveryLengthAndChain) {
  std::string data(300, '\0');
  for (size_t i = 0; i < data.size(); ++i) {
    data[i] = static_cast<char>(i * 37 + 11);
  }
  for (size_t size = 0; size <= data.size(); ++size) {
    const uint32_t whole = Crc32cByTable(data.data(), size);
    EXPECT_EQ(Crc32c(data.data(), size), whole) << size;
    const size_t cut = size / 3;
    EXPECT_EQ(Crc32c(data.data() + cut, size - cut, Crc32c(data.data(), cut)), whole) << size;
  }
}

TEST(Flags, ParsesBytes) {
  EXPECT_EQ(*ParseBytes("1073741824"), 1073741824u);
  EXPECT_EQ(*ParseBytes("1GiB"), 1073741824u);
  EXPECT_EQ(*ParseBytes("1.5 gb"), 1500000000u);
  EXPECT_EQ(*ParseBytes("200MiB"), 200u << 20);
  for (const char* bad : {"", "GiB", "-1", "1XB", "1e400", "nan", "99999999TiB", " 1"}) {
    EXPECT_EQ(ParseBytes(bad).status().code(), absl::StatusCode::kInvalidArgument) << bad;
  }
}

TEST(Flags, EveryFlagIsAnEnvironmentVariable) {
  EXPECT_EQ(EnvNameOf("worker-id"), "SLUICE_WORKER_ID");
  CLI::App app("test");
  std::string id;
  int threads = 3;
  AddFlag(app, "worker-id", &id, "");
  AddFlag(app, "threads", &threads, "");
  setenv("SLUICE_WORKER_ID", "w7", 1);
  std::vector<std::string> words = {"program", "--threads", "5"};
  std::vector<char*> argv;
  for (std::string& word : words) {
    argv.push_back(word.data());
  }
  EXPECT_EQ(ParseFlags(app, static_cast<int>(argv.size()), argv.data()), -1);
  unsetenv("SLUICE_WORKER_ID");
  EXPECT_EQ(id, "w7");
  EXPECT_EQ(threads, 5);
  argv[1] = argv[0];
  EXPECT_GT(ParseFlags(app, static_cast<int>(argv.size()), argv.data()), 0);
}

}  // namespace
}  // namespace sluice::rpc
