// Every truncation and every flipped bit of small files, one container after the other, all in one
// process. A truncated file is refused. A file with a flipped bit is refused or loads: what loads
// must be readable to the end. Neither may crash, hang or take more than 64 MiB.
//
// A flipped bit can leave a file that nobody can tell from a sound one: another epsilon, another
// file's checksum that was never written. Those are counted apart: `another` in the totals.
#include <gtest/gtest.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <filesystem>

#include "tests/bad_files/bad_file.h"
#include "tests/bad_files/heap_meter.h"
#include "tests/fuzz/quantized_models.h"
#include "tests/fuzz/small_tokenizer.h"
#include "tests/services/checkpoint/torch_builder.h"

namespace sluice::bad_files {
namespace {

using checkpoint::Checkpoint;
using checkpoint::GgufBuilder;
using checkpoint::TinyModel;

constexpr int64_t kMostBytes = 64 << 20;
constexpr int kLeastCases = 20'000;

// A message that names a case costs more than the case: only failures make one.
struct Case {
  const char* container;
  const char* kind;
  size_t at;
};
Case g_case;
int g_cases = 0;

void OnHang(int) {
  char text[128];
  const int size = std::snprintf(text, sizeof(text), "hangs: %s, %s at %zu\n", g_case.container,
                                 g_case.kind, g_case.at);
  (void)!write(STDERR_FILENO, text, static_cast<size_t>(size));
  _exit(1);
}

// Everything a load gives, as one text.
using Load = std::function<absl::StatusOr<std::string>()>;

absl::StatusOr<std::string> Everything(const absl::StatusOr<std::unique_ptr<Checkpoint>>& opened) {
  if (!opened.ok()) return opened.status();
  internal::v1::PlanShardsResponse description = (*opened)->description();
  description.clear_model_digest();  // Covers the header's bytes.
  std::string all = description.SerializeAsString();
  for (int i = 0; i < description.tensors_size(); ++i) {
    const auto matrix = (*opened)->Read(i);
    if (!matrix.ok()) return matrix.status();
    all.append(reinterpret_cast<const char*>(matrix->planes.data()), matrix->planes.size());
  }
  return all;
}

// Mutates one file of a folder that loads as it is.
class Mutated {
 public:
  // The first `header` bytes are flipped, bit by bit; all of the file when 0.
  Mutated(const char* container, const std::string& file, std::string content, size_t header,
          Load load)
      : container_(container),
        file_(file),
        content_(std::move(content)),
        header_(header == 0 ? content_.size() : header),
        load_(std::move(load)) {}

  void Run() {
    Write(content_);
    const absl::StatusOr<std::string> sound = load_();
    ASSERT_TRUE(sound.ok()) << container_ << sound.status();
    sound_ = *sound;
    // Data is cut page by page: each cut there runs into the same rule.
    for (size_t size = 0; size < content_.size();
         size += size < header_ + 64 ? 1 : std::min<size_t>(4096, content_.size() - size)) {
      Check("cut", size, content_.substr(0, size));
    }
    EXPECT_EQ(loaded_, 0) << container_ << ": cut at byte " << last_loaded_;
    std::string flipped = content_;
    for (size_t bit = 0; bit < header_ * 8; ++bit) {
      flipped[bit / 8] = static_cast<char>(content_[bit / 8] ^ (1 << bit % 8));
      Check("flipped bit", bit, flipped);
      flipped[bit / 8] = content_[bit / 8];
    }
    EXPECT_GT(refused_, cases_ / 4) << container_;
    std::printf("%-16s %6d cases: %d refused, %d identical, %d another; most memory %.1f MiB\n",
                container_, cases_, refused_, identical_, loaded_,
                static_cast<double>(peak_) / (1 << 20));
  }

 private:
  void Write(const std::string& content) const {
    FILE* const file = std::fopen(file_.c_str(), "wb");
    ASSERT_NE(file, nullptr) << file_;
    ASSERT_EQ(std::fwrite(content.data(), 1, content.size(), file), content.size());
    std::fclose(file);
  }

  void Check(const char* kind, size_t at, const std::string& content) {
    Write(content);
    g_case = {container_, kind, at};
    alarm(30);
    const HeapMeter meter;
    const absl::StatusOr<std::string> result = load_();
    peak_ = std::max(peak_, meter.peak_bytes());
    alarm(0);
    ++cases_;
    ++g_cases;
    if (meter.peak_bytes() > kMostBytes) ADD_FAILURE() << container_ << ", " << kind << " " << at;
    if (!result.ok()) {
      ++refused_;
      if (result.status().message().empty() || absl::IsInternal(result.status())) {
        ADD_FAILURE() << container_ << ", " << kind << " " << at << ": " << result.status();
      }
    } else if (*result == sound_) {
      ++identical_;
    } else {
      ++loaded_;
      last_loaded_ = at;
    }
  }

  const char* const container_;
  const std::string file_;
  const std::string content_;
  const size_t header_;
  const Load load_;
  std::string sound_;
  int cases_ = 0, refused_ = 0, identical_ = 0, loaded_ = 0;
  size_t last_loaded_ = 0;
  int64_t peak_ = 0;
};

// In memory where that is possible: this writes 70,000 small files.
class MutationsTest : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    if (access("/dev/shm", W_OK) == 0) setenv("TMPDIR", "/dev/shm", 0);
    std::signal(SIGALRM, OnHang);
  }

  std::string Path(const std::string& name) const { return dir_->path() + "/" + name; }
  Load OpenFolder() const {
    return [this] { return Everything(Checkpoint::Open(dir_->path())); };
  }

  const std::unique_ptr<TempDir> dir_ = std::make_unique<TempDir>();
};

TEST_F(MutationsTest, Safetensors) {
  const TinyModel model = TinyModel::Llama();
  model.Write(*dir_);
  const std::string file = checkpoint::SafetensorsFile(model.tensors);
  size_t data = 0;
  for (const auto& [name, tensor] : model.tensors) data += tensor.data.size();
  Mutated("safetensors", Path("model.safetensors"), file, file.size() - data, OpenFolder()).Run();
}

TEST_F(MutationsTest, Index) {
  TinyModel::Llama().Write(*dir_);
  std::filesystem::rename(Path("model.safetensors"), Path("one.safetensors"));
  std::string map;
  for (const auto& [name, tensor] : TinyModel::Llama().tensors) {
    map += (map.empty() ? "\"" : ",\"") + name + R"(":"one.safetensors")";
  }
  Mutated("index", Path("model.safetensors.index.json"), "{\"weight_map\":{" + map + "}}", 0,
          OpenFolder())
      .Run();
}

TEST_F(MutationsTest, ZipAndPickle) {
  TinyModel::Llama().Write(*dir_);
  const auto folder = checkpoint::ModelDir::Open(dir_->path());
  const std::string file = checkpoint::TorchFile(*checkpoint::TensorSet::Open(*folder));
  std::filesystem::remove(Path("model.safetensors"));
  // The pickle comes first; the directory is at the end and is cut, not flipped, here.
  Mutated("zip, pickle", Path("pytorch_model.bin"), file, file.find("m/data/0") + 8, OpenFolder())
      .Run();
}

// Small, so that every byte of the directory is flipped, too.
TEST_F(MutationsTest, ZipDirectory) {
  using namespace checkpoint;  // NOLINT(google-build-using-namespace)
  const std::string pickle = Pickle(Dict({Text("a"), PickledTensor().Code()}));
  const auto folder = ModelDir::Open(dir_->path());
  const Load load = [&folder]() -> absl::StatusOr<std::string> {
    const auto set = TensorSet::Open(*folder);
    if (!set.ok()) return set.status();
    std::string data(set->tensors()[0].bytes, '\0');
    const absl::Status status =
        set->tensors()[0].file->ReadAt(set->tensors()[0].offset, data.size(), data.data());
    return status.ok() ? absl::StatusOr<std::string>(set->tensors()[0].name + data) : status;
  };
  const std::string file =
      Zip64File({{"m/data.pkl", pickle}, {"m/data/0", std::string(12, '\1')}}, 2);
  Mutated("zip directory", Path("pytorch_model.bin"), file, 0, load).Run();
}

TEST_F(MutationsTest, Gguf) {
  size_t header = 0;
  const std::string file = GgufBuilder::Llama().Build(&header);
  Mutated("gguf", Path("model.gguf"), file, header, [this] {
    return Everything(Checkpoint::Open(Path("model.gguf")));
  }).Run();
}

TEST_F(MutationsTest, Config) {
  const TinyModel model = TinyModel::Llama();
  model.Write(*dir_);
  Mutated("config", Path("config.json"), model.config.dump(), 0, OpenFolder()).Run();
}

TEST_F(MutationsTest, QuantizedConfigAndState) {
  for (const uint8_t kind : {1, 3, 5}) {
    const TinyModel model = fuzz::ModelOfKind(kind);
    model.Write(*dir_);
    Mutated("quantized config", Path("config.json"), model.config.dump(), 0, OpenFolder()).Run();
  }
}

TEST_F(MutationsTest, Tokenizer) {
  const auto mutate = [this](const char* container, const std::string& name,
                             const std::string& content) {
    const Load load = [&, this]() -> absl::StatusOr<std::string> {
      std::string text(std::filesystem::file_size(Path(name)), '\0');
      FILE* const file = std::fopen(Path(name).c_str(), "rb");
      const size_t got = std::fread(text.data(), 1, text.size(), file);
      std::fclose(file);
      EXPECT_EQ(got, text.size());
      const auto tokenizer = text::Tokenizer::Load({{name, text}});
      if (!tokenizer.ok()) return tokenizer.status();
      std::string all = std::to_string((*tokenizer)->vocab_size());
      for (const char* words : {"ab <s>a b",
                                "\xE2\x96\x81"
                                "ab\n"}) {
        const auto ids = (*tokenizer)->Encode(words, /*add_special_tokens=*/true);
        if (!ids.ok()) return ids.status();
        for (const uint32_t id : *ids) all += " " + std::to_string(id);
        const auto back = (*tokenizer)->Decode(*ids, /*skip_special_tokens=*/false);
        if (!back.ok()) return back.status();
        all += *back;
      }
      return all;
    };
    Mutated(container, Path(name), content, 0, load).Run();
  };
  mutate("tokenizer.json", "tokenizer.json", fuzz::SmallSentencePieceJson());
  mutate("gguf_vocab.json", "gguf_vocab.json", fuzz::SmallGgufVocabulary("llama"));
}

// Declared last, run last.
TEST_F(MutationsTest, WereEnough) {
  std::printf("%d cases\n", g_cases);
  if (testing::GTEST_FLAG(filter) == "*") {
    EXPECT_GE(g_cases, kLeastCases);
  }
}

}  // namespace
}  // namespace sluice::bad_files
