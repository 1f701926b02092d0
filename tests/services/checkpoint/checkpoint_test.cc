// Whole models in Hugging Face folders: order, names, shapes, small files, what is refused.
#include "services/checkpoint/checkpoint.h"

#include <filesystem>

#include "tests/services/checkpoint/checkpoint_builder.h"
#include "tests/services/checkpoint/fails.h"

namespace sluice::checkpoint {
namespace {

std::vector<std::string> Names(const Checkpoint& checkpoint) {
  std::vector<std::string> names;
  for (const auto& tensor : checkpoint.description().tensors()) names.push_back(tensor.name());
  return names;
}

class CheckpointTest : public testing::Test {
 protected:
  absl::Status StatusOf(const TinyModel& model) const { return model.Open(dir_).status(); }
  TempDir dir_;
};

TEST_F(CheckpointTest, ReadsPlainLlama) {
  const TinyModel model = TinyModel::Llama();
  const auto checkpoint = model.Open(dir_);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  EXPECT_EQ(Names(**checkpoint),
            (std::vector<std::string>{
                "embed_tokens.weight", "layers.0.input_layernorm.weight",
                "layers.0.self_attn.q_proj.weight", "layers.0.self_attn.k_proj.weight",
                "layers.0.self_attn.v_proj.weight", "layers.0.self_attn.o_proj.weight",
                "layers.0.post_attention_layernorm.weight", "layers.0.mlp.gate_proj.weight",
                "layers.0.mlp.up_proj.weight", "layers.0.mlp.down_proj.weight", "norm.weight"}));
  const absl::StatusOr<QuantizedMatrix> matrix =
      ReadNamed(**checkpoint, "layers.0.mlp.up_proj.weight");
  const std::string& data = model.tensors.at("model.layers.0.mlp.up_proj.weight").data;
  EXPECT_EQ(std::memcmp(matrix->codes(), data.data(), data.size()), 0);
  std::string slab(101, '\0');
  ASSERT_TRUE((*checkpoint)->ReadPlain(8, 33, 101, reinterpret_cast<uint8_t*>(slab.data())).ok());
  EXPECT_EQ(slab, data.substr(33, 101));
  const auto& description = (*checkpoint)->description();
  EXPECT_EQ(description.quant().method(), "none");
  EXPECT_EQ(description.quant().bits(), 16U);
  EXPECT_EQ(description.source_tensors_size(), 11);
  EXPECT_EQ(description.warnings_size(), 0);
}

TEST_F(CheckpointTest, ReadsOptWithEitherPrefix) {
  TinyModel model = TinyModel::Opt();
  auto checkpoint = model.Open(dir_);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  const std::vector<std::string> names = Names(**checkpoint);
  EXPECT_EQ(names[1], "embed_positions.weight");
  EXPECT_EQ(names.back(), "final_layer_norm.bias");
  const std::string digest = (*checkpoint)->description().model_digest();
  TensorMap renamed;
  for (const auto& [name, tensor] : model.tensors)
    renamed[name.substr(6)] = tensor;  // Without "model.".
  model.tensors = renamed;
  checkpoint = model.Open(dir_);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  EXPECT_EQ(Names(**checkpoint), names);
  EXPECT_EQ((*checkpoint)->description().source_tensors(0).name().rfind("model.decoder.", 0), 0U);
  EXPECT_NE((*checkpoint)->description().model_digest(), digest);
}

TEST_F(CheckpointTest, TiedHeadIsNotListed) {
  TinyModel model = TinyModel::Llama();
  model.tensors["lm_head.weight"] = model.tensors["model.embed_tokens.weight"];
  auto checkpoint = model.Open(dir_);
  ASSERT_TRUE(checkpoint.ok());
  EXPECT_EQ(Names(**checkpoint).back(), "norm.weight");
  model.config["tie_word_embeddings"] = false;
  checkpoint = model.Open(dir_);
  ASSERT_TRUE(checkpoint.ok());
  EXPECT_EQ(Names(**checkpoint).back(), "lm_head.weight");
  model.tensors.erase("lm_head.weight");
  EXPECT_TRUE(Invalid(StatusOf(model), {"lm_head.weight is missing"}));
}

TEST_F(CheckpointTest, DigestFollowsConfigurationAndHeaders) {
  TinyModel model = TinyModel::Llama();
  const std::string first = (*model.Open(dir_))->description().model_digest();
  EXPECT_EQ((*model.Open(dir_))->description().model_digest(), first);
  model.config["rope_theta"] = 20000;
  const std::string second = (*model.Open(dir_))->description().model_digest();
  EXPECT_NE(second, first);
  model.tensors["extra"] = {"U8", {1}, "x"};
  const auto checkpoint = model.Open(dir_);
  EXPECT_NE((*checkpoint)->description().model_digest(), second);
  EXPECT_EQ((*checkpoint)->description().warnings_size(), 1);  // Names the unused tensor.
}

TEST_F(CheckpointTest, ServesSmallFiles) {
  dir_.Write("tokenizer.json", "{}");
  dir_.Write("secret.txt", "x");
  const auto checkpoint = TinyModel::Llama().Open(dir_);
  ASSERT_TRUE(checkpoint.ok());
  EXPECT_EQ((*checkpoint)->description().files_size(), 2);
  EXPECT_EQ(*(*checkpoint)->ReadFile("tokenizer.json"), "{}");
  EXPECT_EQ((*checkpoint)->ReadFile("secret.txt").status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ((*checkpoint)->ReadFile("../x").status().code(), absl::StatusCode::kNotFound);
}

TEST_F(CheckpointTest, TakesTheDtypeFromTheTensorsWhenTheConfigDoesNotTell) {
  TinyModel model = TinyModel::Llama();
  model.config.erase("torch_dtype");
  EXPECT_EQ((*model.Open(dir_))->description().config().dtype(), "float16");
}

// F16
TEST_F(CheckpointTest, ShapesMustBeThoseOfTheConfiguration) {
  TinyModel model = TinyModel::Llama();
  model.config["intermediate_size"] = 65;
  EXPECT_TRUE(
      Invalid(StatusOf(model), {"model.layers.0.mlp.gate_proj.weight", "[64, 32]", "[65, 32]"}));
  model = TinyModel::Llama();
  model.config["vocab_size"] = 9;
  EXPECT_TRUE(Invalid(StatusOf(model), {"embed_tokens"}));
  model = TinyModel::Llama();
  model.config["num_hidden_layers"] = 2;
  EXPECT_TRUE(Invalid(StatusOf(model), {"layers.1.", "missing"}));
  model = TinyModel::Llama();
  model.config["attention_bias"] = true;
  EXPECT_TRUE(Invalid(StatusOf(model), {"q_proj.bias is missing"}));
  model = TinyModel::Llama();
  model.tensors["model.norm.weight"].shape = {1, 32};
  EXPECT_TRUE(Invalid(StatusOf(model), {"model.norm.weight"}));
}

TEST_F(CheckpointTest, RefusesOtherDtypesAndFormatsByName) {
  TinyModel model = TinyModel::Llama();
  model.tensors["model.norm.weight"] = {"F64", {32}, std::string(256, 0)};
  EXPECT_TRUE(Unsupported(StatusOf(model), {"model.norm.weight", "F64", "float16"}));
  model = TinyModel::Llama();
  model.Quantize("mlp.up_proj", {{"weight_packed", {"I32", {64, 4}, std::string(1024, 0)}}});
  EXPECT_TRUE(Unsupported(StatusOf(model), {"weight_packed", "compressed-tensors"}));
}

// F20
TEST_F(CheckpointTest, PlainValuesMustBeFinite) {
  TinyModel model = TinyModel::Llama();
  std::string& data = model.tensors["model.layers.0.mlp.up_proj.weight"].data;
  data[2 * 77 + 1] = '\x7C';
  data[2 * 77] = '\0';
  const auto checkpoint = model.Open(dir_);
  ASSERT_TRUE(checkpoint.ok());
  EXPECT_TRUE(Invalid(ReadNamed(**checkpoint, "layers.0.mlp.up_proj.weight").status(),
                      {"layers.0.mlp.up_proj.weight", "element 77"}));
  uint8_t slab[8];  // From the middle of element 76 on.
  EXPECT_TRUE(Invalid((*checkpoint)->ReadPlain(8, 153, 8, slab), {"element 77"}));
}

// F23
TEST_F(CheckpointTest, AFileThatChangesIsDataLoss) {
  const auto checkpoint = TinyModel::Llama().Open(dir_);
  ASSERT_TRUE(checkpoint.ok());
  std::filesystem::resize_file(dir_.path() + "/model.safetensors", 3000);
  EXPECT_EQ((*checkpoint)->Read(9).status().code(), absl::StatusCode::kDataLoss);
}

TEST_F(CheckpointTest, SaysWhatIsMissing) {
  EXPECT_TRUE(Fails(Checkpoint::Open(dir_.path() + "/gone").status(), absl::StatusCode::kNotFound,
                    {"gone"}));
  EXPECT_TRUE(Fails(Checkpoint::Open(dir_.path()).status(), absl::StatusCode::kNotFound,
                    {"config.json", ".gguf"}));
  dir_.Write("x.safetensors", "x");
  EXPECT_TRUE(Invalid(Checkpoint::Open(dir_.path() + "/x.safetensors").status(), {"folder"}));
  dir_.Write("config.json", "[]");
  EXPECT_TRUE(Invalid(Checkpoint::Open(dir_.path()).status(), {"config.json"}));
}

TEST_F(CheckpointTest, AFolderWithOneGgufStandsForIt) {
  dir_.Write("model.gguf", GgufBuilder::Llama().Build());
  EXPECT_TRUE(Checkpoint::Open(dir_.path()).ok());
  dir_.Write("other.gguf", GgufBuilder::Llama().Build());
  EXPECT_TRUE(Fails(Checkpoint::Open(dir_.path()).status(), absl::StatusCode::kNotFound,
                    {"2 .gguf files"}));
}

// F14
TEST_F(CheckpointTest, LinksOutOfTheFolderAreRefused) {
  const TempDir outside;
  outside.Write("generation_config.json", "{}");
  TinyModel::Llama().Write(dir_);
  std::filesystem::create_symlink(outside.path() + "/generation_config.json",
                                  dir_.path() + "/generation_config.json");
  EXPECT_TRUE(
      Invalid(Checkpoint::Open(dir_.path()).status(), {"generation_config.json", "link out"}));
}

}  // namespace
}  // namespace sluice::checkpoint
