#include "services/loader/shard_source.h"

#include <map>

#include "services/rpc/crc32c.h"
#include "tests/services/checkpoint/checkpoint_builder.h"
#include "tests/services/checkpoint/fails.h"

namespace sluice::loader {
namespace {

using checkpoint::Checkpoint;
using checkpoint::Fails;
using checkpoint::TinyModel;
using internal::v1::FetchRequest;
using internal::v1::FetchResponse;

// 128 x 16384 float16: 4 MiB, four parts.
constexpr uint64_t kWide = 16384;

// A tiny Llama of two layers whose embedding has several parts; layer 0's down_proj is GPTQ, 2
// groups.
TinyModel Model() {
  TinyModel model = TinyModel::Llama();
  model.config["quantization_config"] = {{"quant_method", "gptq"}, {"bits", 4}, {"group_size", 32}};
  model.config["num_hidden_layers"] = 2;
  model.config["vocab_size"] = 4 * kWide;
  model.tensors["model.embed_tokens.weight"] = {
      "F16", {4 * kWide, 32}, std::string(4 * kWide * 32 * 2, '\x11')};
  checkpoint::TensorMap second;
  for (const auto& [name, tensor] : model.tensors) {
    if (name.rfind("model.layers.0.", 0) == 0) second["model.layers.1." + name.substr(15)] = tensor;
  }
  model.tensors.insert(second.begin(), second.end());
  model.Quantize("mlp.down_proj",
                 {{"qweight", {"I32", {8, 32}, checkpoint::Repeat<uint32_t>(0x76543210, 256)}},
                  {"qzeros", {"I32", {2, 4}, checkpoint::Repeat<uint32_t>(0x77777777, 8)}},
                  {"scales", {"F16", {2, 32}, checkpoint::Repeat<uint16_t>(0x3C00, 64)}}});
  return model;
}

class ShardSourceTest : public testing::Test {
 protected:
  void SetUp() override {
    auto opened = Model().Open(dir_);
    ASSERT_TRUE(opened.ok()) << opened.status();
    checkpoint_ = *std::move(opened);
    request_.set_model_digest(checkpoint_->description().model_digest());
  }

  absl::StatusOr<std::unique_ptr<ShardSource>> Open() {
    return ShardSource::Open(*checkpoint_, &budget_, &metrics_, request_);
  }

  // All parts, checked for order, offsets and CRC; in `planes_` what they add up to.
  void Fetch() {
    names_.clear();
    planes_.clear();
    auto source = Open();
    ASSERT_TRUE(source.ok()) << source.status();
    FetchResponse part;
    for (;;) {
      const absl::StatusOr<bool> more = (*source)->Next(&part);
      ASSERT_TRUE(more.ok()) << more.status();
      if (!*more) return;
      ASSERT_LE(part.data().size(), kPartBytes);
      ASSERT_EQ(part.crc32c(), rpc::Crc32c(part.data().data(), part.data().size()));
      std::string& planes = planes_[part.name()];
      const bool first = names_.empty() || names_.back() != part.name();
      ASSERT_EQ(part.has_spec(), first);
      if (first) {
        names_.push_back(part.name());
        ASSERT_EQ(part.spec().name(), part.name());
        planes.resize(part.spec().bytes());
      }
      ASSERT_EQ(part.offset(), part.part() * kPartBytes);
      planes.replace(part.offset(), part.data().size(), part.data());
      ASSERT_EQ(part.last(), part.offset() + part.data().size() == planes.size());
    }
  }

  checkpoint::TempDir dir_;
  std::unique_ptr<Checkpoint> checkpoint_;
  MemoryBudget budget_{1 << 20};
  LoaderMetrics metrics_;
  FetchRequest request_;
  std::vector<std::string> names_;
  std::map<std::string, std::string> planes_;
};

TEST_F(ShardSourceTest, CountsWhatItConverts) {
  request_.mutable_layers()->set_end(2);
  Fetch();
  uint64_t quantized = 0;
  for (const auto& tensor : checkpoint_->description().tensors()) {
    if (tensor.format() != static_cast<uint32_t>(QuantFormat::kPlain)) quantized += tensor.bytes();
  }
  EXPECT_GT(quantized, 0u);
  EXPECT_EQ(metrics_.converted_bytes.value(), quantized);
  uint64_t samples = 0;
  for (const uint64_t count : metrics_.conversion_seconds.counts()) samples += count;
  EXPECT_EQ(samples, 1u);  // One quantized tensor
  EXPECT_GT(metrics_.conversion_seconds.sum(), 0);
}

TEST_F(ShardSourceTest, SendsTheLayersAskedFor) {
  request_.mutable_layers()->set_begin(1);
  request_.mutable_layers()->set_end(2);
  Fetch();
  EXPECT_EQ(names_.size(), 9U);
  for (const std::string& name : names_) EXPECT_EQ(name.rfind("layers.1.", 0), 0U) << name;
}

TEST_F(ShardSourceTest, SendsWhatTheCheckpointReads) {
  request_.mutable_layers()->set_end(2);
  request_.set_embedding(true);
  request_.set_head(true);
  Fetch();
  EXPECT_EQ(names_.front(), "embed_tokens.weight");
  EXPECT_EQ(names_[names_.size() - 2], "norm.weight");
  EXPECT_EQ(names_.back(), "lm_head.weight");  // Tied: the table once more.
  EXPECT_EQ(planes_["lm_head.weight"], planes_["embed_tokens.weight"]);
  for (int i = 0; i < checkpoint_->description().tensors_size(); ++i) {
    const std::string& name = checkpoint_->description().tensors(i).name();
    const QuantizedMatrix matrix = *checkpoint_->Read(i);
    const std::string want(reinterpret_cast<const char*>(matrix.planes.data()),
                           matrix.planes.size());
    EXPECT_EQ(planes_[name], want) << name;
  }
}

TEST_F(ShardSourceTest, ResumesAtAPart) {
  request_.set_embedding(true);
  request_.mutable_layers()->set_end(1);
  Fetch();
  const std::string whole = planes_["embed_tokens.weight"];
  const size_t count = names_.size();
  request_.set_resume_name("embed_tokens.weight");
  request_.set_resume_part(2);
  Fetch();
  EXPECT_EQ(names_.size(), count);
  EXPECT_EQ(planes_["embed_tokens.weight"].substr(2 * kPartBytes), whole.substr(2 * kPartBytes));
  EXPECT_EQ(planes_["embed_tokens.weight"].substr(0, kPartBytes), std::string(kPartBytes, '\0'));
  request_.set_resume_name("layers.0.mlp.down_proj.weight");
  request_.set_resume_part(0);
  Fetch();
  EXPECT_EQ(names_, std::vector<std::string>{"layers.0.mlp.down_proj.weight"});
}

TEST_F(ShardSourceTest, ChecksTheRequest) {
  request_.mutable_layers()->set_end(3);
  EXPECT_TRUE(checkpoint::Invalid(Open().status(), {"layers [0, 3)", "2"}));
  request_.mutable_layers()->set_begin(2);
  request_.mutable_layers()->set_end(1);
  EXPECT_TRUE(checkpoint::Invalid(Open().status(), {"layers [2, 1)"}));
  request_.clear_layers();
  request_.set_embedding(true);
  request_.set_resume_name("norm.weight");
  EXPECT_TRUE(Fails(Open().status(), absl::StatusCode::kNotFound, {"norm.weight"}));
  request_.set_resume_name("embed_tokens.weight");
  request_.set_resume_part(4);
  EXPECT_TRUE(checkpoint::Invalid(Open().status(), {"resume_part 4", "4 parts"}));
  request_.set_model_digest("x");
  EXPECT_TRUE(Fails(Open().status(), absl::StatusCode::kFailedPrecondition, {"model_digest"}));
}

TEST_F(ShardSourceTest, StopEndsNext) {
  request_.mutable_layers()->set_end(2);
  auto source = Open();
  ASSERT_TRUE(source.ok());
  FetchResponse part;
  ASSERT_TRUE((*source)->Next(&part).ok());
  (*source)->Stop();
  EXPECT_EQ((*source)->Next(&part).status().code(), absl::StatusCode::kCancelled);
}

// A stream that waits for the budget is not stuck when it is stopped.
TEST_F(ShardSourceTest, StopEndsAWaitForTheBudget) {
  const MemoryBudget::Share all = budget_.Acquire(1 << 20, std::stop_token());
  request_.mutable_layers()->set_end(1);
  request_.set_resume_name("layers.0.mlp.down_proj.weight");
  auto source = Open();
  ASSERT_TRUE(source.ok());
  std::jthread stopper([&source] { (*source)->Stop(); });
  FetchResponse part;
  EXPECT_EQ((*source)->Next(&part).status().code(), absl::StatusCode::kCancelled);
}

TEST_F(ShardSourceTest, BadValuesEndTheFetch) {
  TinyModel model = Model();
  model.tensors["model.layers.0.mlp.down_proj.scales"].data[1] = '\x7C';  // Infinite.
  auto opened = model.Open(dir_);
  ASSERT_TRUE(opened.ok());
  checkpoint_ = *std::move(opened);
  request_.set_model_digest(checkpoint_->description().model_digest());
  request_.mutable_layers()->set_end(1);
  auto source = Open();
  FetchResponse part;
  absl::StatusOr<bool> more = true;
  while (more.ok() && *more) more = (*source)->Next(&part);
  EXPECT_TRUE(checkpoint::Invalid(more.status(), {"layers.0.mlp.down_proj.weight", "scales[0]"}));
}

}  // namespace
}  // namespace sluice::loader
