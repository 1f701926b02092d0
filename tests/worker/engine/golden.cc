#include "tests/worker/engine/golden.h"

#include <algorithm>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <utility>

#include "kernels/core/check.h"
#include "tests/worker/engine/small_model.h"
#include "tests/worker/engine/test_pipeline.h"

namespace sluice::worker {

using checkpoint::Checkpoint;
using internal::v1::ShardAssignment;

std::filesystem::path CheckpointFolder() {
  return std::filesystem::path(SLUICE_TESTDATA) / "checkpoints";
}

std::vector<std::string> CheckpointNames() {
  std::vector<std::string> names;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(CheckpointFolder(), error)) {
    if (std::filesystem::exists(entry.path() / "golden.json")) {
      names.push_back(entry.path().filename().string());
    }
  }
  std::sort(names.begin(), names.end());
  return names;
}

Golden ReadGolden(const std::filesystem::path& folder) {
  std::ifstream file(folder / "golden.json");
  const nlohmann::json json = nlohmann::json::parse(file);
  Golden golden;
  golden.prompt_ids = json.at("prompt_ids").get<std::vector<uint32_t>>();
  golden.greedy_ids = json.at("greedy_ids").get<std::vector<uint32_t>>();
  golden.gaps = json.at("gaps").get<std::vector<float>>();
  golden.positions = json.at("logit_positions").get<std::vector<uint32_t>>();
  const auto path = folder / "golden_logits.bin";
  golden.logits.resize(std::filesystem::file_size(path) / sizeof(float));
  std::ifstream logits(path, std::ios::binary);
  logits.read(reinterpret_cast<char*>(golden.logits.data()),
              static_cast<std::streamsize>(golden.logits.size() * sizeof(float)));
  return golden;
}

namespace {

QuantizedMatrix Convert(const QuantizedMatrix& stored, WeightForm form) {
  QuantSpec spec;
  spec.plain_dtype = form == WeightForm::kFloat32 ? DType::kF32 : DType::kF16;
  spec.n = stored.spec.n;
  spec.k = stored.spec.k;
  QuantizedMatrix plain(spec);
  std::vector<float> row(static_cast<size_t>(spec.k));
  for (int64_t n = 0; n < spec.n; ++n) {
    DequantizeRow(stored, n, row.data());
    for (int64_t k = 0; k < spec.k; ++k) {
      const int64_t at = n * spec.k + k;
      if (form == WeightForm::kFloat32) {
        plain.planes.as<float>()[at] = row[static_cast<size_t>(k)];
      } else {
        plain.planes.as<uint16_t>()[at] = FloatToHalf(row[static_cast<size_t>(k)]);
      }
    }
  }
  return plain;
}

std::unique_ptr<StageEngine> LoadFrom(const Checkpoint& source, WeightForm form,
                                      const ShardAssignment& assignment, Backend* backend) {
  auto loader = StageEngine::NewLoader(assignment, backend);
  SLUICE_CHECK(loader.ok()) << loader.status();
  const auto add = [&](const std::string& name, int index) {
    auto tensor = source.Read(index);
    SLUICE_CHECK(tensor.ok()) << tensor.status();
    const bool convert =
        form != WeightForm::kAsStored && tensor->spec.format != QuantFormat::kPlain;
    if (convert) *tensor = Convert(*tensor, form);
    const absl::Status status = (*loader)->Add(name, *std::move(tensor));
    SLUICE_CHECK(status.ok()) << status;
  };
  for (int i = 0; i < source.description().tensors_size(); ++i) {
    const std::string& name = source.description().tensors(i).name();
    if (IsPartOf(name, assignment)) add(name, i);
    // The loader sends a tied table as the head.
    const bool is_head = name == "embed_tokens.weight" && assignment.has_head() &&
                         assignment.config().tie_word_embeddings();
    if (is_head) add("lm_head.weight", i);
  }
  auto engine = (*loader)->Finish();
  SLUICE_CHECK(engine.ok()) << engine.status();
  return *std::move(engine);
}

}  // namespace

Outcome RunGolden(const Checkpoint& source, const Golden& golden, uint32_t stages, uint32_t chunk,
                  WeightForm form,
                  const std::function<std::unique_ptr<Backend>(size_t)>& make_backend) {
  const auto& config = source.description().config();
  std::vector<ShardAssignment> assignments;
  for (uint32_t stage = 0; stage < stages; ++stage) {
    assignments.push_back(MakeAssignment(config, stage, stages));
    assignments.back().set_max_model_len(golden.max_model_len);
  }
  const TestPipeline::Load load = [&](const ShardAssignment& assignment, Backend* backend) {
    return LoadFrom(source, form, assignment, backend);
  };
  TestPipeline pipeline(assignments, load, make_backend);
  TestSequence sequence = MakeSequence(1, golden.prompt_ids);
  Outcome run;
  const size_t inputs = golden.prompt_ids.size() + golden.greedy_ids.size() - 1;
  while (sequence.pos < inputs) {
    const bool prefill = sequence.pos < sequence.prompt_len;
    const uint32_t count = prefill ? std::min(chunk, sequence.prompt_len - sequence.pos) : 1;
    const bool sample = sequence.pos + count >= sequence.prompt_len;
    pipeline.RunSlice(&sequence, count, sample);
    if (sample) {
      run.sampled.push_back(sequence.tokens.back());
      sequence.tokens.back() = golden.greedy_ids.at(run.sampled.size() - 1);
    }
    const std::vector<float> rows = pipeline.last().LogitsForTest();
    for (auto row = rows.begin(); row != rows.end(); row += config.vocab_size()) {
      run.logits.emplace_back(row, row + config.vocab_size());
    }
  }
  return run;
}

}  // namespace sluice::worker
