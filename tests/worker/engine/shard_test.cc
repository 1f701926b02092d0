#include "worker/engine/shard.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/worker/engine/small_model.h"

namespace sluice::worker {
namespace {

using internal::v1::ShardAssignment;
using testing::HasSubstr;
using testing::Not;

class ShardTest : public testing::Test {
 protected:
  void SetUp() override {
    auto backend = MakeCpuBackend(1);
    ASSERT_TRUE(backend.ok()) << backend.status();
    backend_ = *std::move(backend);
  }

  // Every tensor of the shard, but those in `without`.
  absl::StatusOr<std::unique_ptr<Shard>> Build(const SmallModel& model,
                                               const ShardAssignment& assignment,
                                               const std::vector<std::string>& without = {}) {
    ShardBuilder builder(assignment, backend_.get());
    for (const std::string& name : model.NamesFor(assignment)) {
      if (std::count(without.begin(), without.end(), name) > 0) continue;
      const absl::Status status = builder.Add(name, ToMatrix(model.at(name)));
      if (!status.ok()) return status;
    }
    return builder.Finish();
  }

  // The message of the INVALID_ARGUMENT that this tensor gets.
  std::string RefusalOf(ShardBuilder* builder, const std::string& name, QuantizedMatrix tensor) {
    const absl::Status status = builder->Add(name, std::move(tensor));
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(name));
    return std::string(status.message());
  }

  std::unique_ptr<Backend> backend_;
};

TEST_F(ShardTest, StacksWhatSharesAnInput) {
  const SmallModel model = MakeLlama(1);
  const auto shard = Build(model, MakeAssignment(model, 1, 3));
  ASSERT_TRUE(shard.ok()) << shard.status();
  ASSERT_EQ((*shard)->layers.size(), 1u);
  const LayerWeights& layer = (*shard)->layers[0];
  EXPECT_EQ(layer.qkv.weight->n(), (4 + 2 * 2) * 10);
  EXPECT_EQ(layer.qkv.weight->k(), 32);
  EXPECT_EQ(layer.qkv.bias->size(), (4 + 2 * 2) * 10);
  EXPECT_EQ(layer.attention_out.weight->k(), 40);
  EXPECT_EQ(layer.mlp_in.weight->n(), 2 * 48);
  EXPECT_EQ(layer.mlp_in.bias->size(), 2 * 48);
  EXPECT_EQ(layer.mlp_out.weight->k(), 48);
  EXPECT_EQ(layer.attention_norm.kind, NormKind::kRms);
  EXPECT_FLOAT_EQ(layer.attention_norm.eps, 1e-5f);
  EXPECT_EQ((*shard)->embed_tokens, nullptr);
  EXPECT_EQ((*shard)->head.weight, nullptr);
  EXPECT_GT((*shard)->bytes, 0u);
}

TEST_F(ShardTest, OptHasPositionsProjectionsAndNoFinalNormAs350m) {
  const SmallModel model = MakeOpt350m(1);
  const auto shard = Build(model, MakeAssignment(model, 0, 1));
  ASSERT_TRUE(shard.ok()) << shard.status();
  EXPECT_EQ((*shard)->embed_tokens->k(), 20);
  EXPECT_EQ((*shard)->embed_positions->n(), 66);
  EXPECT_EQ((*shard)->project_in.weight->n(), 32);
  EXPECT_EQ((*shard)->project_out.weight->n(), 20);
  EXPECT_EQ((*shard)->final_norm.kind, NormKind::kNone);
  EXPECT_EQ((*shard)->layers[0].mlp_norm.kind, NormKind::kLayer);
  EXPECT_EQ((*shard)->layers[2].mlp_in.weight->n(), 48);
}

TEST_F(ShardTest, NormsWithoutWeights) {
  SmallModel model = MakeOpt(1);
  model.config.set_norm_affine(false);
  for (auto it = model.tensors.begin(); it != model.tensors.end();) {
    it =
        it->first.find("layer_norm") == std::string::npos ? std::next(it) : model.tensors.erase(it);
  }
  const auto shard = Build(model, MakeAssignment(model, 0, 1));
  ASSERT_TRUE(shard.ok()) << shard.status();
  EXPECT_EQ((*shard)->layers[0].attention_norm.kind, NormKind::kLayer);
  EXPECT_EQ((*shard)->layers[0].attention_norm.weight, nullptr);
  EXPECT_EQ((*shard)->final_norm.kind, NormKind::kLayer);
}

TEST_F(ShardTest, TiedHeadIsHeldOnceWhereItCanBe) {
  const SmallModel model = MakeTiedDynamicLlama(1);
  const ShardAssignment whole = MakeAssignment(model, 0, 1);
  const auto shared = Build(model, whole);
  ASSERT_TRUE(shared.ok()) << shared.status();
  EXPECT_EQ((*shared)->head.weight, (*shared)->embed_tokens);
  const auto not_sent = Build(model, whole, {"lm_head.weight"});
  ASSERT_TRUE(not_sent.ok()) << not_sent.status();
  EXPECT_EQ((*shared)->bytes, (*not_sent)->bytes);

  const ShardAssignment last = MakeAssignment(model, 1, 2);
  const auto own = Build(model, last);
  ASSERT_TRUE(own.ok()) << own.status();
  EXPECT_EQ((*own)->head.weight->n(), 61);
  EXPECT_EQ(Build(model, last, {"lm_head.weight"}).status().code(),
            absl::StatusCode::kFailedPrecondition);
}

TEST_F(ShardTest, NamesWhatIsMissing) {
  const SmallModel model = MakeLlama(1);
  const auto shard = Build(model, MakeAssignment(model, 0, 1),
                           {"layers.1.self_attn.k_proj.weight", "layers.2.mlp.up_proj.bias"});
  EXPECT_EQ(shard.status().code(), absl::StatusCode::kFailedPrecondition);
  const std::string message(shard.status().message());
  EXPECT_THAT(message, HasSubstr("layers.1.self_attn.k_proj.weight"));
  EXPECT_THAT(message, HasSubstr("layers.2.mlp.up_proj.bias"));
  EXPECT_THAT(message, Not(HasSubstr("q_proj")));
}

TEST_F(ShardTest, RefusesTensorsOfNoOrAnotherShard) {
  const SmallModel model = MakeLlama(1);
  ShardBuilder builder(MakeAssignment(model, 1, 3), backend_.get());
  for (const char* name :
       {"layers.0.mlp.down_proj.weight", "layers.2.mlp.down_proj.weight", "embed_tokens.weight",
        "norm.weight", "lm_head.weight", "layers.1.mlp.fc1.weight",
        "layers.1.self_attn.rotary_emb.inv_freq", ""}) {
    RefusalOf(&builder, name, ToMatrix(model.at("layers.1.mlp.down_proj.weight")));
  }
}

TEST_F(ShardTest, RefusesATensorGivenTwice) {
  const SmallModel model = MakeLlama(1);
  ShardBuilder builder(MakeAssignment(model, 0, 1), backend_.get());
  for (const char* name : {"norm.weight", "layers.0.self_attn.q_proj.weight"}) {
    ASSERT_TRUE(builder.Add(name, ToMatrix(model.at(name))).ok());
    EXPECT_THAT(RefusalOf(&builder, name, ToMatrix(model.at(name))), HasSubstr("twice"));
  }
}

TEST_F(ShardTest, RefusesWrongShapesAndValues) {
  const SmallModel model = MakeLlama(1);
  ShardBuilder builder(MakeAssignment(model, 0, 1), backend_.get());
  const std::string name = "layers.0.self_attn.k_proj.weight";
  SmallTensor turned = model.at(name);
  std::swap(turned.n, turned.k);
  EXPECT_THAT(RefusalOf(&builder, name, ToMatrix(turned)), HasSubstr("[20, 32]"));

  QuantizedMatrix truncated = ToMatrix(model.at(name));
  truncated.planes = Buffer(truncated.planes.size() - 1);
  RefusalOf(&builder, name, std::move(truncated));

  QuantSpec spec{.format = QuantFormat::kInt4Zero, .n = 20, .k = 32, .group_size = 16};
  spec.has_perm = true;  // All zero: no permutation
  EXPECT_THAT(RefusalOf(&builder, name, QuantizedMatrix(spec)), HasSubstr("perm"));
  RefusalOf(&builder, name, QuantizedMatrix());

  QuantSpec vector{.format = QuantFormat::kInt8, .n = 1, .k = 20, .group_size = 20};
  EXPECT_THAT(RefusalOf(&builder, "layers.0.self_attn.k_proj.bias", QuantizedMatrix(vector)),
              HasSubstr("plain"));
  // A refused tensor may come again in its right form.
  EXPECT_TRUE(builder.Add(name, ToMatrix(model.at(name))).ok());
}

TEST_F(ShardTest, BiasesMustBeInTheConfig) {
  SmallModel model = MakeLlama(1);
  model.config.set_mlp_bias(false);
  ShardBuilder builder(MakeAssignment(model, 0, 1), backend_.get());
  RefusalOf(&builder, "layers.0.mlp.up_proj.bias", ToMatrix(model.at("layers.0.mlp.up_proj.bias")));
}

}  // namespace
}  // namespace sluice::worker
