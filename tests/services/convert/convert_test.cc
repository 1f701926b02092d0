// Whole conversions: every pair of formats reads back as what it was, in one piece or not at all.
#include "services/convert/convert.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>

#include "services/checkpoint/json.h"
#include "services/convert/output_folder.h"
#include "services/text/tokenizer.h"
#include "tests/services/checkpoint/checkpoint_builder.h"
#include "tests/services/checkpoint/fails.h"
#include "tests/services/convert/stored_parts.h"

namespace sluice::convert {
namespace {

namespace fs = std::filesystem;
using checkpoint::Checkpoint;
using checkpoint::Fails;
using checkpoint::Invalid;
using checkpoint::Json;
using checkpoint::TempDir;
using checkpoint::TinyModel;

std::string ContentOf(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  EXPECT_TRUE(file.good()) << path;
  return {std::istreambuf_iterator<char>(file), {}};
}

Json ParsedFile(const std::string& path) { return Json::parse(ContentOf(path)); }

class ConvertTest : public testing::Test {
 protected:
  absl::StatusOr<ConvertResult> To(const Checkpoint& source, const ConvertOptions& options,
                                   const std::string& name) const {
    return Convert(source, options, Path(name), [](uint64_t, uint64_t) { return true; });
  }
  absl::StatusOr<ConvertResult> To(const Checkpoint& source, Format format,
                                   const std::string& name) const {
    ConvertOptions options;
    options.format = format;
    options.group_size = 32;
    return To(source, options, name);
  }
  std::string Path(const std::string& name) const { return dir_.path() + "/" + name; }
  std::unique_ptr<Checkpoint> Opened(const std::string& path) const {
    auto opened = Checkpoint::Open(path);
    EXPECT_TRUE(opened.ok()) << opened.status();
    return opened.ok() ? *std::move(opened) : nullptr;
  }
  // What lies in the output's folder.
  std::vector<std::string> Entries() const {
    std::vector<std::string> names;
    for (const auto& entry : fs::directory_iterator(dir_.path())) {
      names.push_back(entry.path().filename().string());
    }
    std::sort(names.begin(), names.end());
    return names;
  }
  TempDir dir_;
};

// The farthest a weight may be from what it was, of the largest in its tensor: half a step. A step is
// at most 2 max|w| / 15 (GPTQ, AWQ; float16 scales: int4.h), or the table's widest gap.
double RelativeBound(Format format) {
  switch (format) {
    case Format::kGptq:
    case Format::kAwq:
      return 2.0 / 15 * (0.5 + 15 * std::exp2(-11));
    case Format::kNf4:
      return (1 - 0.6961928009986877) / 2 + 1e-6;
    case Format::kFp4:
      return (1 - 2.0 / 3) / 2 + 1e-6;
    default:
      return 0;
  }
}

void ExpectClose(const Checkpoint& before, const Checkpoint& after, double bound) {
  ASSERT_EQ(before.description().tensors_size(), after.description().tensors_size());
  for (int i = 0; i < before.description().tensors_size(); ++i) {
    const std::string& name = before.description().tensors(i).name();
    ASSERT_EQ(after.description().tensors(i).name(), name);
    const auto one = before.Read(i), two = after.Read(i);
    ASSERT_TRUE(one.ok() && two.ok()) << one.status() << two.status();
    const bool plain = two->spec.format == QuantFormat::kPlain;
    const bool in_layer_linear = name.find("_proj.weight") != std::string::npos;
    EXPECT_EQ(plain, bound == 0 || !in_layer_linear) << name;
    const std::vector<float> from = checkpoint::Dequantize(*one), to = checkpoint::Dequantize(*two);
    float absmax = 0;
    for (const float w : from) absmax = std::max(absmax, std::abs(w));
    for (size_t j = 0; j < from.size(); ++j) {
      ASSERT_LE(std::abs(from[j] - to[j]), plain ? 0 : bound * absmax) << name << " " << j;
    }
  }
}

bool AllZerosAre8(const QuantizedMatrix& matrix) {
  const int64_t count = matrix.spec.n * matrix.spec.groups();
  return std::all_of(matrix.zeros(), matrix.zeros() + count, [](uint8_t z) { return z == 8; });
}

TEST_F(ConvertTest, AwqHasZeroPoints) {
  ASSERT_TRUE(To(*Opened(Stored("llama-fp16")), Format::kAwq, "x").ok());
  EXPECT_FALSE(AllZerosAre8(*Opened(Path("x"))->Read(2)));
}

TEST_F(ConvertTest, EveryFormatReadsBackWithinItsBound) {
  const auto source = Opened(Stored("llama-fp16"));
  ASSERT_NE(source, nullptr);
  for (const Format format : {Format::kFloat16, Format::kFloat32, Format::kGptq, Format::kAwq,
                              Format::kNf4, Format::kFp4}) {
    SCOPED_TRACE(NameOf(format));
    const auto result = To(*source, format, NameOf(format));
    ASSERT_TRUE(result.ok()) << result.status();
    const auto written = Opened(Path(NameOf(format)));
    ExpectClose(*source, *written, RelativeBound(format));
    EXPECT_EQ(written->description().warnings_size(), 0);
    EXPECT_EQ(ContentOf(Path(NameOf(format)) + "/tokenizer.json"),
              ContentOf(Stored("llama-fp16") + "/tokenizer.json"));
  }
}

TEST_F(ConvertTest, Float16IsTheSameFile) {
  const auto source = Opened(Stored("llama-fp16"));
  ASSERT_TRUE(To(*source, Format::kFloat16, "x").ok());
  const StoredParts before(Stored("llama-fp16")), after(Path("x"));
  ASSERT_EQ(before.set().tensors().size(), after.set().tensors().size());
  for (const auto& tensor : before.set().tensors()) {
    EXPECT_TRUE(before.Read(tensor.name) == after.Read(tensor.name)) << tensor.name;
  }
}

TEST_F(ConvertTest, BFloat16RoundsToNearest) {
  const auto source = Opened(Stored("llama-fp16"));
  ASSERT_TRUE(To(*source, Format::kBFloat16, "x").ok());
  const auto written = Opened(Path("x"));
  EXPECT_EQ(written->description().config().dtype(), "bfloat16");
  const auto from = checkpoint::Dequantize(*source->Read(2)),
             to = checkpoint::Dequantize(*written->Read(2));
  for (size_t i = 0; i < from.size(); ++i)
    EXPECT_EQ(to[i], BFloat16ToFloat(FloatToBFloat16(from[i])));
}

TEST_F(ConvertTest, GroupsAndZerosOfGptq) {
  const auto source = Opened(Stored("llama-fp16"));
  for (const int64_t group : {-1, 128, 64, 32}) {
    for (const bool symmetric : {true, false}) {
      const std::string name = std::to_string(group) + (symmetric ? "s" : "a");
      ConvertOptions options;
      options.format = Format::kGptq;
      options.group_size = group;
      options.symmetric = symmetric;
      ASSERT_TRUE(To(*source, options, name).ok()) << name;
      const auto written = Opened(Path(name));
      EXPECT_EQ(written->description().quant().detail(), symmetric ? "v1" : "v2");
      EXPECT_EQ(written->description().quant().symmetric(), symmetric);
      EXPECT_EQ(written->description().warnings_size(), 0);
      const auto matrix = written->Read(2);  // q_proj, 128 columns
      EXPECT_EQ(matrix->spec.group_size, group == -1 ? 128 : group);
      EXPECT_EQ(AllZerosAre8(*matrix), symmetric);
      ExpectClose(*source, *written, RelativeBound(Format::kGptq));
    }
  }
}

TEST_F(ConvertTest, ConfigSaysWhatLibrariesNeed) {
  const auto source = Opened(Stored("llama-gptq-v1-g128"));  // Its own quantization must go
  ASSERT_TRUE(To(*source, Format::kFloat16, "fp16").ok());
  EXPECT_FALSE(ParsedFile(Path("fp16/config.json")).contains("quantization_config"));
  ASSERT_TRUE(To(*source, Format::kGptq, "gptq").ok());
  Json config = ParsedFile(Path("gptq/config.json"));
  EXPECT_EQ(config["torch_dtype"], "float16");
  EXPECT_EQ(config["quantization_config"]["quant_method"], "gptq");
  EXPECT_EQ(config["quantization_config"]["checkpoint_format"], "gptq");
  EXPECT_EQ(config["quantization_config"]["group_size"], 32);
  EXPECT_EQ(config["quantization_config"]["desc_act"], false);
  EXPECT_EQ(config["quantization_config"], ParsedFile(Path("gptq/quantize_config.json")));
  ASSERT_TRUE(To(*source, Format::kAwq, "awq").ok());
  config = ParsedFile(Path("awq/config.json"));
  EXPECT_EQ(config["quantization_config"]["version"], "gemm");
  EXPECT_EQ(config["quantization_config"]["zero_point"], true);
  ConvertOptions options;
  options.format = Format::kFp4;
  options.double_quant = true;
  ASSERT_TRUE(To(*source, options, "fp4").ok());
  config = ParsedFile(Path("fp4/config.json"));
  EXPECT_EQ(config["quantization_config"]["load_in_4bit"], true);
  EXPECT_EQ(config["quantization_config"]["bnb_4bit_quant_type"], "fp4");
  EXPECT_EQ(config["quantization_config"]["bnb_4bit_use_double_quant"], true);
  EXPECT_EQ(Opened(Path("fp4"))->description().quant().detail(), "fp4+nested");
}

TEST_F(ConvertTest, AQuantizedSourceIsSaid) {
  const auto plain = To(*Opened(Stored("llama-fp16")), Format::kNf4, "a");
  ASSERT_TRUE(plain.ok());
  EXPECT_TRUE(plain->notes.empty());
  const auto again = To(*Opened(Stored("llama-nf4")), Format::kAwq, "b");
  ASSERT_TRUE(again.ok()) << again.status();
  ASSERT_EQ(again->notes.size(), 1U);
  EXPECT_NE(again->notes[0].find("bitsandbytes nf4"), std::string::npos);
}

TEST_F(ConvertTest, UntiedHeadStaysPlainAndTiedIsLeftOut) {
  const auto untied = Opened(Stored("llama-fp16"));
  ASSERT_TRUE(To(*untied, Format::kNf4, "untied").ok());
  EXPECT_NE(StoredParts(Path("untied")).set().Find("lm_head.weight"), nullptr);
  EXPECT_EQ(StoredParts(Path("untied")).set().Find("lm_head.weight")->dtype.name, "F16");
  const auto tied = Opened(Stored("llama-tied-fp32"));
  ASSERT_TRUE(To(*tied, Format::kNf4, "tied").ok());
  EXPECT_EQ(StoredParts(Path("tied")).set().Find("lm_head.weight"), nullptr);
  EXPECT_EQ(StoredParts(Path("tied")).set().Find("model.embed_tokens.weight")->dtype.name, "F16");
}

TEST_F(ConvertTest, OptKeepsBiasesAndProjections) {
  const auto source = Opened(Stored("opt-350m-style"));
  for (const Format format : {Format::kGptq, Format::kAwq, Format::kNf4, Format::kFloat16}) {
    SCOPED_TRACE(NameOf(format));
    const auto result = To(*source, format, NameOf(format));
    ASSERT_TRUE(result.ok()) << result.status();
    const auto written = Opened(Path(NameOf(format)));
    if (format == Format::kAwq) {  // Else transformers makes AWQ linears of them, without weights
      const Json config = ParsedFile(Path("awq/config.json"))["quantization_config"];
      EXPECT_EQ(config["modules_to_not_convert"], Json({"lm_head", "project_in", "project_out"}));
    }
    for (int i = 0; i < source->description().tensors_size(); ++i) {
      const auto& spec = written->description().tensors(i);
      const bool bias = spec.name().find(".bias") != std::string::npos;
      const bool project = spec.name().find("project_") == 0;
      if (bias || project) {
        const bool plain = static_cast<QuantFormat>(spec.format()) == QuantFormat::kPlain;
        EXPECT_EQ(plain, bias || format != Format::kNf4) << spec.name();  // As transformers does it
      }
      if (bias) {
        EXPECT_EQ(checkpoint::Dequantize(*source->Read(i)),
                  checkpoint::Dequantize(*written->Read(i)));
      }
    }
  }
}

// The container of the source does not show in the result.
TEST_F(ConvertTest, BinAndShardedSources) {
  const fs::path testdata = SLUICE_TESTDATA "/torch_bin/llama";
  ASSERT_TRUE(To(*Opened(testdata.string()), Format::kNf4, "safetensors").ok());
  for (const char* kind : {"single", "sharded"}) {  // .bin
    const TempDir folder;
    fs::copy(testdata / kind, folder.path());
    fs::copy(testdata / "config.json", folder.path());
    const std::string output = std::string("bin-") + kind;
    ASSERT_TRUE(To(*Opened(folder.path()), Format::kNf4, output).ok());
    EXPECT_TRUE(ContentOf(Path(output) + "/model.safetensors") ==
                ContentOf(Path("safetensors/model.safetensors")))
        << kind;
  }
  const auto sharded = Opened(Stored("llama-bf16-sharded"));
  ASSERT_TRUE(To(*sharded, Format::kBFloat16, "sharded").ok());
  ExpectClose(*sharded, *Opened(Path("sharded")), 0);
}

TEST_F(ConvertTest, ShardsHaveAnIndexAndTheSameTensors) {
  const auto source = Opened(Stored("llama-fp16"));
  ConvertOptions options;
  options.format = Format::kNf4;
  options.max_shard_bytes = 100'000;
  const auto result = To(*source, options, "many");
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_GE(result->files, 4U);
  ASSERT_TRUE(To(*source, Format::kNf4, "one").ok());
  const StoredParts one(Path("one")), many(Path("many"));
  ASSERT_EQ(one.set().tensors().size(), many.set().tensors().size());
  for (const auto& tensor : one.set().tensors()) {
    EXPECT_TRUE(one.Read(tensor.name) == many.Read(tensor.name)) << tensor.name;
    // Alignment: libraries that map a file look at elements in place.
    const auto* place = one.set().Find(tensor.name);
    EXPECT_EQ(place->offset % std::max<uint64_t>(place->dtype.block_bytes, 1), 0U) << tensor.name;
  }
  const Json index = ParsedFile(Path("many/model.safetensors.index.json"));
  EXPECT_EQ(index["metadata"]["total_size"], result->weight_bytes);
  std::map<std::string, uint64_t> bytes;
  for (const auto& tensor : many.set().tensors()) bytes[tensor.file->name()] += tensor.bytes;
  EXPECT_EQ(bytes.size(), result->files);
  for (const auto& [file, size] : bytes) {
    // The two tables of 512 x 128 float16 are larger than a shard: alone in theirs.
    EXPECT_TRUE(size <= 100'000 || size == 131'072) << file << " " << size;
  }
}

TEST_F(ConvertTest, GroupSizeThatDoesNotDivideIsRefusedByName) {
  const auto source = Opened(Stored("llama-tied-fp32"));  // hidden 64
  ConvertOptions options;
  options.format = Format::kGptq;
  EXPECT_TRUE(Invalid(To(*source, options, "x").status(),
                      {"model.layers.0.self_attn.q_proj.weight", "[64, 64]", "128",
                       "--group-size 64 or --group-size 32 or --group-size -1"}));
  for (const int64_t group : {0, -2, 12, 7}) {
    options.group_size = group;
    EXPECT_TRUE(Invalid(To(*source, options, "x").status(), {"--group-size"})) << group;
  }
  EXPECT_TRUE(Entries().empty());
}

TEST_F(ConvertTest, WeightThatDoesNotFitIsRefusedByName) {
  TinyModel model = TinyModel::Llama();
  auto& tensor = model.tensors["model.layers.0.mlp.up_proj.weight"];
  tensor.dtype = "F32";
  std::vector<float> values(64 * 32, 1.0F);
  values[5 * 32 + 3] = 70'000;
  tensor.data = checkpoint::Bytes(values);
  const TempDir folder;
  const auto source = model.Open(folder);
  ASSERT_TRUE(source.ok()) << source.status();
  for (const Format format : {Format::kFloat16, Format::kGptq, Format::kNf4}) {
    EXPECT_TRUE(Invalid(To(**source, format, "x").status(),
                        {"layers.0.mlp.up_proj.weight[5, 3]", "70000", "float16", "--to bf16"}));
  }
  EXPECT_TRUE(Entries().empty()) << Entries()[0];
  EXPECT_TRUE(To(**source, Format::kBFloat16, "x").ok());
}

TEST_F(ConvertTest, NothingIsOverwrittenAndNothingLeftBehind) {
  const auto source = Opened(Stored("llama-tied-fp32"));
  fs::create_directory(Path("there"));
  EXPECT_TRUE(Fails(To(*source, Format::kNf4, "there").status(), absl::StatusCode::kAlreadyExists,
                    {"there", "not overwritten"}));
  EXPECT_TRUE(fs::is_empty(Path("there")));
  EXPECT_TRUE(Fails(To(*source, Format::kNf4, "no/x").status(), absl::StatusCode::kNotFound,
                    {"no folder"}));
  int calls = 0;
  ConvertOptions options;
  options.format = Format::kNf4;
  const auto stopped =
      Convert(*source, options, Path("x"), [&calls](uint64_t, uint64_t) { return ++calls < 3; });
  EXPECT_TRUE(Fails(stopped.status(), absl::StatusCode::kCancelled, {"nothing was written"}));
  EXPECT_EQ(Entries(), std::vector<std::string>{"there"});
}

TEST_F(ConvertTest, FolderTakenMeanwhileIsNotReplaced) {
  auto folder = OutputFolder::Create(Path("x"), 0);
  ASSERT_TRUE(folder.ok()) << folder.status();
  ASSERT_TRUE(folder->WriteFile("a", "new").ok());
  fs::create_directory(Path("x"));
  EXPECT_TRUE(Fails(folder->Commit(), absl::StatusCode::kAlreadyExists, {"not overwritten"}));
  EXPECT_TRUE(fs::is_empty(Path("x")));
  EXPECT_TRUE(Fails(OutputFolder::Create(Path("y"), uint64_t{1} << 60).status(),
                    absl::StatusCode::kResourceExhausted, {"the disk has", "another disk"}));
}

// Counts what is asked for at a time.
class CountingCheckpoint : public Checkpoint {
 public:
  explicit CountingCheckpoint(const Checkpoint& inner) : inner_(inner) {
    description_ = inner.description();
  }
  absl::StatusOr<QuantizedMatrix> Read(int index) const override {
    whole_reads_++;
    return inner_.Read(index);
  }
  absl::Status ReadPlain(int index, uint64_t offset, uint64_t size, uint8_t* out) const override {
    largest_ = std::max(largest_, size);
    return inner_.ReadPlain(index, offset, size, out);
  }
  absl::StatusOr<std::string> ReadFile(const std::string& name) const override {
    return inner_.ReadFile(name);
  }
  uint64_t largest() const { return largest_; }
  int whole_reads() const { return whole_reads_; }

 private:
  const Checkpoint& inner_;
  mutable uint64_t largest_ = 0;
  mutable int whole_reads_ = 0;
};

TEST_F(ConvertTest, PlainWeightsAreReadInSlabs) {
  TinyModel model = TinyModel::Llama();
  model.config["vocab_size"] = 200'000;  // The table has 6.4 million weights
  model.tensors["model.embed_tokens.weight"] = {
      "F16", {200'000, 32}, checkpoint::Repeat<uint16_t>(0x3C00, 6'400'000)};
  const TempDir folder;
  const auto inner = model.Open(folder);
  ASSERT_TRUE(inner.ok()) << inner.status();
  const CountingCheckpoint source(**inner);
  ASSERT_TRUE(To(source, Format::kGptq, "x").ok());
  EXPECT_EQ(source.whole_reads(), 0);
  EXPECT_LE(source.largest(), 2U << 20);
  EXPECT_GT(source.largest(), 1U << 20);
}

}  // namespace
}  // namespace sluice::convert
