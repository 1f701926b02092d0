// Device sampling against the CPU's SampleRow and ScoreRow on the same logits: the same ids, exactly
// (kernels/cuda/sampling.h says when they may differ; with these inputs they do not).
#include "kernels/cuda/sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "kernels/cpu/sampling.h"
#include "tests/kernels/cuda/device_test.h"

namespace sluice {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Log-probabilities of logits below 64: two last places.
constexpr float kLogprobTolerance = 0x1p-17f;

struct Request {
  SamplingRow row;
  std::vector<uint32_t> prompt, output, banned;
  int64_t forced_id = -1;
};

// The arrays of a launch; `append` and `feed`: every row appends and feeds.
struct Launched {
  std::vector<DeviceSampledToken> tokens;
  std::vector<uint32_t> appended, fed;
};

class CudaSamplingTest : public DeviceTest {
 protected:
  using Launcher = void (*)(const LaunchContext&, const SampleArgs&);

  // Runs twice on the same scratch and expects the same.
  Launched Run(Launcher launcher, const std::vector<Request>& requests,
               const std::vector<float>& logits, int64_t vocab, int64_t stride);
  void ExpectCpus(const std::vector<Request>& requests, const std::vector<float>& logits,
                  int64_t vocab, int64_t stride);
};

DeviceSamplingRow DeviceRow(const Request& request, std::vector<uint32_t>& ids) {
  const auto add = [&ids](const std::vector<uint32_t>& list, int32_t& begin, int32_t& num) {
    begin = static_cast<int32_t>(ids.size());
    num = static_cast<int32_t>(list.size());
    ids.insert(ids.end(), list.begin(), list.end());
  };
  DeviceSamplingRow row;
  row.row = request.row.row;
  row.seed = request.row.seed;
  row.choice = request.row.choice;
  row.token_index = request.row.token_index;
  row.temperature = request.row.temperature;
  row.top_k = request.row.top_k;
  row.top_p = request.row.top_p;
  row.min_p = request.row.min_p;
  row.repetition_penalty = request.row.repetition_penalty;
  row.presence_penalty = request.row.presence_penalty;
  row.frequency_penalty = request.row.frequency_penalty;
  row.num_logprobs = request.row.num_logprobs;
  row.forced_id = static_cast<int32_t>(request.forced_id);
  add(request.prompt, row.prompt_begin, row.num_prompt);
  add(request.banned, row.banned_begin, row.num_banned);
  add(request.output, row.output_begin, row.num_output);
  row.append_at = static_cast<int32_t>(ids.size());
  ids.push_back(0xffffffffu);
  return row;
}

Launched CudaSamplingTest::Run(Launcher launcher, const std::vector<Request>& requests,
                               const std::vector<float>& logits, int64_t vocab, int64_t stride) {
  std::vector<uint32_t> ids;
  std::vector<DeviceSamplingRow> rows;
  const auto count = static_cast<int32_t>(requests.size());
  for (const Request& request : requests) {
    rows.push_back(DeviceRow(request, ids));
    rows.back().feed_at = count - static_cast<int32_t>(rows.size());
  }
  const DeviceArray<float> device_logits(logits);
  const DeviceArray<DeviceSamplingRow> device_rows(rows);
  const DeviceArray<uint32_t> device_ids(ids);
  const DeviceArray<uint32_t> fed(requests.size());
  const DeviceArray<DeviceSampledToken> out(requests.size());
  const DeviceArray<uint8_t> scratch(std::vector<uint8_t>(SamplingScratchBytes(count, vocab), 0));
  SampleArgs args;
  args.logits = device_logits.data();
  args.stride = stride;
  args.vocab = static_cast<int32_t>(vocab);
  args.rows = device_rows.data();
  args.num_rows = count;
  args.ids = device_ids.data();
  args.token_ids = fed.data();
  args.out = out.data();
  args.scratch = scratch.data();
  launcher(context_, args);
  EXPECT_EQ(cudaStreamSynchronize(context_.stream), cudaSuccess);
  Launched launched{out.Get(), {}, fed.Get()};
  launcher(context_, args);
  EXPECT_EQ(cudaStreamSynchronize(context_.stream), cudaSuccess);
  const std::vector<DeviceSampledToken> again = out.Get();
  for (int32_t i = 0; i < count; ++i) {
    EXPECT_EQ(again[i].token_id, launched.tokens[i].token_id) << "second run, request " << i;
    EXPECT_EQ(again[i].finite, launched.tokens[i].finite) << "second run, request " << i;
  }
  const std::vector<uint32_t> after = device_ids.Get();
  for (const DeviceSamplingRow& row : rows) launched.appended.push_back(after[row.append_at]);
  return launched;
}

void ExpectSame(const DeviceSampledToken& got, const SampledToken& want, int32_t num_logprobs) {
  ASSERT_EQ(got.finite, want.finite ? 1u : 0u);
  if (!want.finite) {
    EXPECT_EQ(got.token_id, 0u);
    return;
  }
  ASSERT_EQ(got.token_id, want.token_id);
  ASSERT_EQ(got.num_top, want.top.size());
  if (num_logprobs >= 0) {
    EXPECT_NEAR(got.logprob, want.logprob, kLogprobTolerance);
  }
  for (size_t i = 0; i < want.top.size(); ++i) {
    ASSERT_EQ(got.top_ids[i], want.top[i].token_id) << "top " << i;
    ASSERT_NEAR(got.top_logprobs[i], want.top[i].logprob, kLogprobTolerance) << "top " << i;
  }
}

void CudaSamplingTest::ExpectCpus(const std::vector<Request>& requests,
                                  const std::vector<float>& logits, int64_t vocab, int64_t stride) {
  const Launched launched = Run(SampleRows, requests, logits, vocab, stride);
  SamplingScratch scratch;
  for (size_t i = 0; i < requests.size(); ++i) {
    SamplingRow row = requests[i].row;
    row.prompt_ids = requests[i].prompt;
    row.output_ids = requests[i].output;
    row.banned_ids = requests[i].banned;
    const absl::Span<const float> values(&logits[row.row * stride], vocab);
    const SampledToken want = requests[i].forced_id >= 0
                                  ? ScoreRow(values, static_cast<uint32_t>(requests[i].forced_id),
                                             row.num_logprobs, scratch)
                                  : SampleRow(values, row, scratch);
    SCOPED_TRACE(testing::Message()
                 << "request " << i << ": vocabulary " << vocab << " temperature "
                 << row.temperature << " top_k " << row.top_k << " top_p " << row.top_p << " min_p "
                 << row.min_p << " penalties " << row.repetition_penalty << " banned "
                 << requests[i].banned.size());
    ExpectSame(launched.tokens[i], want, row.num_logprobs);
    if (HasFatalFailure()) return;
    EXPECT_EQ(launched.appended[i], launched.tokens[i].token_id);
    EXPECT_EQ(launched.fed[requests.size() - 1 - i], launched.tokens[i].token_id);
  }
}

enum class Logits { kNormal, kWide, kTies, kEqual, kPeaked };

// [rows, stride] of one kind.
std::vector<float> MakeLogits(Logits kind, int64_t rows, int64_t stride, std::mt19937& random) {
  std::vector<float> logits = RandomFloats(rows * stride, random, 2.5f);
  for (size_t i = 0; i < logits.size(); ++i) {
    float& logit = logits[i];
    if (kind == Logits::kWide) logit *= 20.0f;
    if (kind == Logits::kTies) logit = std::round(logit * 2.0f) / 2.0f;  // Both zeros too
    if (kind == Logits::kEqual) logit = -1.5f;
    if (kind == Logits::kPeaked && random() % 1000 == 0) logit += 12.0f;
  }
  return logits;
}

std::vector<uint32_t> RandomIds(size_t count, int64_t vocab, std::mt19937& random) {
  std::vector<uint32_t> ids(count);
  for (uint32_t& id : ids)
    id = static_cast<uint32_t>(random() % (vocab + 1));  // One beyond: unused
  return ids;
}

template <typename T>
T Pick(std::initializer_list<T> values, std::mt19937& random) {
  return values.begin()[random() % values.size()];
}

Request RandomRequest(int64_t row, int64_t vocab, std::mt19937& random) {
  Request request;
  SamplingRow& r = request.row;
  r.row = row;
  r.temperature = Pick({0.0f, 0.7f, 1.0f, 1.0f, 1.5f, 1e-3f, 50.0f}, random);
  r.top_k = Pick({0, 0, 1, 5, 50, 1000, 3000, 1 << 30}, random);
  r.top_p = Pick({1.0f, 1.0f, 0.95f, 0.5f, 0.01f, 0.9999f}, random);
  r.min_p = Pick({0.0f, 0.0f, 0.0f, 0.05f, 1.0f}, random);
  r.seed = static_cast<uint64_t>(random()) << 32 | random();
  r.choice = random() % 3;
  r.token_index = random() % 1000;
  r.num_logprobs = Pick({-1, -1, 0, 5, 20}, random);
  if (random() % 3 == 0) {
    r.repetition_penalty = Pick({1.0f, 1.3f, 0.5f}, random);
    r.presence_penalty = Pick({0.0f, 0.5f, -1.0f}, random);
    r.frequency_penalty = Pick({0.0f, 0.25f}, random);
    request.prompt = RandomIds(random() % 3000, vocab, random);
    request.output = RandomIds(random() % 200, vocab, random);
  }
  if (random() % 4 == 0) request.banned = RandomIds(random() % 5, vocab, random);
  return request;
}

class CudaSamplingSweep : public CudaSamplingTest,
                          public testing::WithParamInterface<std::tuple<int64_t, Logits>> {
 protected:
  void Check(size_t at_once) {
    const auto [vocab, kind] = GetParam();
    std::mt19937 random(static_cast<unsigned>(vocab) * 5 + static_cast<unsigned>(kind));
    constexpr int64_t kRows = 8;
    const int64_t stride = vocab + 3;
    const std::vector<float> logits = MakeLogits(kind, kRows, stride, random);
    std::vector<Request> requests;
    for (int i = 0; i < 150; ++i) {
      requests.push_back(RandomRequest(static_cast<int64_t>(random() % kRows), vocab, random));
      if (requests.size() < at_once) continue;
      ExpectCpus(requests, logits, vocab, stride);
      if (HasFatalFailure()) return;
      requests.clear();
    }
  }
};

// 150 rows: a block each, with the logits in shared memory while they fit.
TEST_P(CudaSamplingSweep, ManyRowsAreTheCpus) { Check(/*at_once=*/150); }

TEST_P(CudaSamplingSweep, ManyRowsWithoutSharedMemoryAreTheCpus) {
  context_.max_shared_bytes = 0;
  Check(/*at_once=*/150);
}

// Few rows: several blocks a row, where the card has clusters.
TEST_P(CudaSamplingSweep, FewRowsAreTheCpus) { Check(/*at_once=*/6); }

INSTANTIATE_TEST_SUITE_P(Sweep, CudaSamplingSweep,
                         testing::Combine(testing::Values(1, 7, 80, 4097, 32000, 128256),
                                          testing::Values(Logits::kNormal, Logits::kWide,
                                                          Logits::kTies, Logits::kEqual,
                                                          Logits::kPeaked)));

// Small enough for compute-sanitizer: one row with all its parts.
Request RequestWithEverything(int64_t vocab, std::mt19937& random) {
  Request request;
  request.row.temperature = 0.8f;
  request.row.top_k = 100;
  request.row.top_p = 0.9f;
  request.row.min_p = 0.01f;
  request.row.seed = 17;
  request.row.repetition_penalty = 1.1f;
  request.row.frequency_penalty = 0.2f;
  request.row.num_logprobs = 5;
  request.prompt = RandomIds(50, vocab, random);
  request.output = RandomIds(20, vocab, random);
  request.banned = {1, 2};
  return request;
}

TEST_F(CudaSamplingTest, OneRowWithEverythingIsTheCpus) {
  constexpr int64_t kVocab = 300;
  std::mt19937 random(9);
  ExpectCpus({RequestWithEverything(kVocab, random)}, MakeLogits(Logits::kTies, 1, kVocab, random),
             kVocab, kVocab);
}

TEST_F(CudaSamplingTest, OneRowInAClusterIsTheCpus) {
  constexpr int64_t kVocab = 24577;
  std::mt19937 random(9);
  ExpectCpus({RequestWithEverything(kVocab, random)}, MakeLogits(Logits::kTies, 1, kVocab, random),
             kVocab, kVocab);
}

TEST_F(CudaSamplingTest, ScoresAForcedId) {
  std::mt19937 random(3);
  const std::vector<float> logits = MakeLogits(Logits::kNormal, 4, 32000, random);
  std::vector<Request> requests;
  for (const int32_t count : {0, 1, 7, 20}) {
    for (const int64_t id : {0, 31999, 77}) {
      Request request;
      request.row.row = count % 4;
      request.row.num_logprobs = count;
      request.forced_id = id;
      requests.push_back(request);
    }
  }
  ExpectCpus(requests, logits, 32000, 32000);
}

TEST_F(CudaSamplingTest, SaysWhenNothingCanBeSampled) {
  std::vector<float> logits(5 * 100, 1.0f);
  logits[99] = std::numeric_limits<float>::quiet_NaN();
  logits[100] = kInfinity;
  logits[250] = -kInfinity;
  logits[301] = 3e38f;
  std::vector<Request> requests(6);
  for (int i = 0; i < 5; ++i) requests[i].row.row = i;
  requests[3].row.repetition_penalty = 0.1f;  // 3e39 is beyond float
  requests[3].prompt = {1};
  for (uint32_t id = 0; id < 100; ++id) requests[4].banned.push_back(id);
  requests[5].row.row = 4;
  requests[5].row.temperature = 1.0f;
  ExpectCpus(requests, logits, 100, 100);
}

// --- ArgmaxRows ------------------------------------------------------------------------------

TEST_F(CudaSamplingTest, ArgmaxIsTheCpus) {
  std::mt19937 random(4);
  SamplingScratch scratch;
  for (const int64_t vocab : {1, 7, 4096, 4097, 32000, 50272, 128256}) {
    for (const Logits kind : {Logits::kNormal, Logits::kTies, Logits::kEqual}) {
      for (const int64_t stride : {vocab, (vocab + 7) / 4 * 4}) {
        std::vector<float> logits = MakeLogits(kind, 3, stride, random);
        logits[random() % vocab] = kind == Logits::kEqual ? kInfinity : -0.0f;
        std::vector<Request> requests(5);
        for (int i = 0; i < 5; ++i) requests[i].row.row = i % 3;
        const Launched launched = Run(ArgmaxRows, requests, logits, vocab, stride);
        for (int i = 0; i < 5; ++i) {
          const absl::Span<const float> values(&logits[i % 3 * stride], vocab);
          ExpectSame(launched.tokens[i], SampleRow(values, requests[i].row, scratch), -1);
          EXPECT_EQ(launched.appended[i], launched.tokens[i].token_id);
          EXPECT_EQ(launched.fed[4 - i], launched.tokens[i].token_id);
        }
      }
    }
  }
}

TEST_F(CudaSamplingTest, ARecordedGraphSamplesTheRowsOfItsReplay) {
  constexpr int32_t kVocab = 32000;
  std::mt19937 random(5);
  const DeviceArray<float> logits(static_cast<size_t>(kVocab));
  const DeviceArray<DeviceSamplingRow> rows(1);
  const DeviceArray<DeviceSampledToken> out(2);
  const DeviceArray<uint8_t> scratch(std::vector<uint8_t>(SamplingScratchBytes(1, kVocab), 0));
  SampleArgs args;
  args.logits = logits.data();
  args.vocab = kVocab;
  args.rows = rows.data();
  args.num_rows = 1;
  args.out = out.data();
  args.scratch = scratch.data();
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  ASSERT_EQ(cudaStreamBeginCapture(context_.stream, cudaStreamCaptureModeThreadLocal), cudaSuccess);
  ArgmaxRows(context_, args);
  args.out = out.data() + 1;
  SampleRows(context_, args);
  ASSERT_EQ(cudaStreamEndCapture(context_.stream, &graph), cudaSuccess);
  ASSERT_EQ(cudaGraphInstantiate(&exec, graph, 0), cudaSuccess);
  SamplingScratch cpu_scratch;
  for (uint32_t step = 0; step < 20; ++step) {
    const std::vector<float> values = MakeLogits(Logits::kNormal, 1, kVocab, random);
    SamplingRow row;
    const uint32_t greedy = SampleRow(values, row, cpu_scratch).token_id;
    row.temperature = 1.0f;
    row.top_p = 0.9f;
    row.seed = 11;
    row.token_index = step;
    const uint32_t drawn = SampleRow(values, row, cpu_scratch).token_id;
    DeviceSamplingRow device_row;
    device_row.temperature = 1.0f;
    device_row.top_p = 0.9f;
    device_row.seed = 11;
    device_row.token_index = step;
    logits.Put(values);
    rows.Put({device_row});
    ASSERT_EQ(cudaGraphLaunch(exec, context_.stream), cudaSuccess);
    Wait();
    const std::vector<DeviceSampledToken> got = out.Get();
    EXPECT_EQ(got[0].token_id, greedy) << step;
    EXPECT_EQ(got[1].token_id, drawn) << step;
  }
  EXPECT_EQ(cudaGraphExecDestroy(exec), cudaSuccess);
  EXPECT_EQ(cudaGraphDestroy(graph), cudaSuccess);
}

}  // namespace
}  // namespace sluice
