// Bad PyTorch files, by name (rules F9 to F13): each is refused with an error that names the file
// and the rule.
#include <gtest/gtest.h>

#include "tests/bad_files/bad_file.h"
#include "tests/services/checkpoint/torch_builder.h"

namespace sluice::bad_files {
namespace {

using namespace checkpoint;  // NOLINT(google-build-using-namespace)

// A pytorch_model.bin beside a sound config.json.
struct TorchCase {
  const char* name;
  std::string bytes;
  std::string word;  // A part of the message, beside the file's name
  absl::StatusCode code = kInvalid;
};

void ExpectTorchRefused(const char* container, const char* rule,
                        const std::vector<TorchCase>& cases) {
  std::vector<BadFile> bad;
  for (const TorchCase& torch : cases) {
    bad.push_back({rule,
                   torch.name,
                   [bytes = torch.bytes](const TempDir& dir) {
                     dir.Write("config.json", TinyModel::Llama().config.dump());
                     dir.Write("pytorch_model.bin", bytes);
                   },
                   {"pytorch_model.bin", torch.word},
                   torch.code});
  }
  ExpectRefused(container, bad);
}

// --- Zip

const std::string kStorage(12, '\1');

std::string GoodPickle() { return Pickle(Dict({Text("a"), PickledTensor().Code()})); }

// The sound archive's members, for a test to break one.
std::vector<ZipEntry> Members() {
  return {{"m/data.pkl", GoodPickle()}, {"m/data/0", kStorage}, {"m/version", "3\n"}};
}

template <typename Change>
std::string With(Change change) {
  std::vector<ZipEntry> entries = Members();
  change(entries);
  return ZipFile(entries);
}

// The sound archive with `bytes` in its last 22.
std::string WithEnd(size_t at, const std::string& bytes) {
  std::string file = ZipFile(Members());
  return file.replace(file.size() - 22 + at, bytes.size(), bytes);
}

TEST(BadFilesTest, TheSoundTorchFilesAreAccepted) {
  const TempDir dir;
  const absl::StatusOr<ModelDir> model = ModelDir::Open(dir.path());
  for (const std::string& file :
       {ZipFile(Members()), Zip64File(Members(), 3), TorchFile(GoodPickle(), {kStorage})}) {
    dir.Write("pytorch_model.bin", file);
    EXPECT_TRUE(TensorSet::Open(*model).ok()) << TensorSet::Open(*model).status();
  }
}

TEST(BadFilesTest, TorchArchives) {
  const std::string good = ZipFile(Members());
  std::string second_end = good + good.substr(good.size() - 22);
  second_end[good.size() - 2] = 22;  // As the first one's comment.
  std::string bad_locator = Zip64File(Members(), 3);
  bad_locator[bad_locator.size() - 22 - 12] ^= 1;
  ExpectTorchRefused(
      "zip", "F12",
      {
          {"empty", "", "shorter than a zip"},
          {"text", std::string(100, 'x'), "not a zip archive"},
          {"LFS pointer", "version https://git-lfs.github.com/spec/v1\n", "git lfs pull"},
          {"bare pickle", GoodPickle(), "before 1.6", absl::StatusCode::kUnimplemented},
          {"start only", "PK\x03\x04", "shorter than a zip"},
          {"no end", good.substr(0, good.size() - 22), "does not end as a zip"},
          {"bytes after the end", good + "x", "does not end as a zip"},
          {"second end in a comment", second_end, "does not end at the zip end"},
          {"comment", WithEnd(20, Bytes<uint16_t>({1})), "without a comment"},
          {"two disks", WithEnd(4, Bytes<uint16_t>({1})), "several disks"},
          {"counts differ", WithEnd(8, Bytes<uint16_t>({2})), "several disks"},
          {"no members", WithEnd(8, Bytes<uint16_t>({0, 0})), "0 members"},
          {"more members than there are", WithEnd(8, Bytes<uint16_t>({4, 4})),
           "entry 3: is missing"},
          {"fewer members than there are", WithEnd(8, Bytes<uint16_t>({2, 2})),
           "longer than it says"},
          {"directory past the end", WithEnd(16, Bytes<uint32_t>({0x7FFFFFFF})), "does not end at"},
          {"directory of another size", WithEnd(12, Bytes<uint32_t>({1})), "does not end at"},
          {"2^63 members", Zip64File(Members(), uint64_t{1} << 63), "members in"},
          {"50,000 members", Zip64File(Members(), 50'000), "50000 members"},
          {"zip64 locator elsewhere", bad_locator, "zip64 locator"},
      });
}

// picklescan CVE-2025-1944, -1945, -10156: names, flags and checksums that differ between the two
// headers of a member. Ollama CVE-2024-45436: names that leave the archive.
TEST(BadFilesTest, TorchMembers) {
  const std::string huge = Bytes<uint16_t>({1, 16}) + Bytes<uint64_t>({1ULL << 63, 1ULL << 63});
  ExpectTorchRefused(
      "zip", "F12",
      {
          {"compressed", With([](auto& e) { e[1].method = 8; }), "compressed (method 8)"},
          {"encrypted", With([](auto& e) { e[1].flags = 1; }), "encrypted"},
          {"flags differ", With([](auto& e) { e[1].local_flags = 1; }), "disagree"},
          {"names differ", With([](auto& e) { e[1].local_name = "m/data/1"; }), "another name"},
          {"sizes differ", With([](auto& e) { e[1].local_size = 4; }), "disagree"},
          {"another checksum", With([](auto& e) { e[0].crc = 1; }), "checksum"},
          {"two sizes", With([](auto& e) { e[1].unpacked_size = 4096; }), "its two sizes"},
          {"size past the end", With([](auto& e) { e[2].size = 5000; }), "outside the archive"},
          {"size into the next", With([](auto& e) { e[1].size = e[1].local_size = 20; }),
           "overlaps"},
          {"header past the end", With([](auto& e) { e[1].offset = 1 << 30; }),
           "outside the archive"},
          {"header inside the data", With([](auto& e) { e[1].offset = 40; }), "no header"},
          {"two on one place", With([](auto& e) {
             e.push_back(e[2]);
             e[3].offset = e[0].data.size() + e[1].data.size() + 2 * 30 + 18;
           }),
           "is there twice"},
          {"a name twice", With([](auto& e) { e.push_back(e[2]); }), "is there twice"},
          {"bytes between", With([](auto& e) { e[1].gap = std::string(25, 'x'); }),
           "belong to none"},
          {"zip64 size of 2^63", With([&](auto& e) {
             e[1].size = 0xFFFFFFFF;
             e[1].extra = huge;
           }),
           "outside the archive"},
          {"zip64 field missing", With([](auto& e) { e[1].size = 0xFFFFFFFF; }), "incomplete"},
          {"zip64 field cut off", With([&](auto& e) {
             e[1].size = 0xFFFFFFFF;
             e[1].extra = huge.substr(0, 10);
           }),
           "incomplete"},
          {"path up", With([](auto& e) { e[1].name = "m/../../data/0"; }), "plain relative path"},
          {"absolute path", With([](auto& e) { e[1].name = "/etc/passwd"; }),
           "plain relative path"},
          {"backslash", With([](auto& e) { e[1].name = "m\\data"; }), "plain relative path"},
          {"NUL", With([](auto& e) { e[1].name = std::string("m/data/0\0x", 10); }),
           "plain relative"},
          {"no name", With([](auto& e) { e[1].name = ""; }), "plain relative path"},
          {"long name", With([](auto& e) { e[1].name = "m/" + std::string(600, 'n'); }),
           "plain rel"},
          {"no folder", With([](auto& e) { e[0].name = "data.pkl"; }), "one folder"},
          {"two folders", With([](auto& e) { e[1].name = "n/data/0"; }), "one folder"},
          {"no pickle", With([](auto& e) { e[0].name = "m/data.pk"; }), "m/data.pkl is missing"},
          {"big-endian", With([](auto& e) {
             e[2] = {"m/byteorder", "big"};
           }),
           "byteorder", absl::StatusCode::kUnimplemented},
          {"large pickle", With([](auto& e) { e[0].data.resize(8'000'001); }),
           "allowed are 8000000"},
      });
}

// --- Pickle

std::string Code(const std::string& pickle) { return TorchFile(pickle, {kStorage}); }
std::string Value(const std::string& code) { return Code(Pickle(Dict({Text("a"), code}))); }
std::string Times(size_t count, const std::string& code) {
  std::string out;
  for (size_t i = 0; i < count; ++i) out += code;
  return out;
}

// F9, F10: PyTorch CVE-2025-32434, -2026-24747; what deny lists let through, picklescan CVE-2025-1716,
// -1889, -10155, -10157, CVE-2026-56315, fickling CVE-2025-67748, CVE-2026-22606 to -22612, -14534,
// -14535.
TEST(BadFilesTest, TorchNothingIsExecuted) {
  const TempDir canary;
  const std::string touch = Text("touch " + canary.path() + "/canary");
  const std::string system = Global("os", "system") + Tuple({touch}) + "R";
  const std::string eval = Text("__import__('os').abort()");
  const std::string rule = "not one that a state dict needs";
  ExpectTorchRefused(
      "pickle", "F9",
      {
          {"os.system", Value(system), "the name os.system"},
          {"posix.system", Value(Global("posix", "system") + Tuple({touch}) + "R"), rule},
          {"eval", Value(Global("builtins", "eval") + Tuple({eval}) + "R"), rule},
          {"getattr", Value(Global("__builtin__", "getattr")), rule},
          {"torch.load", Value(Global("torch", "load")), rule},
          {"torch.jit", Value(Global("torch.jit", "load")), rule},
          {"numpy", Value(Global("numpy.core.multiarray", "_reconstruct")), rule},
          {"dotted name", Value(Global("torch", "_utils.os.system")), rule},
          {"sparse", Value(Global("torch._utils", "_rebuild_sparse_tensor")), rule},
          {"quantized", Value(Global("torch._utils", "_rebuild_qtensor")), rule},
          {"payload first, then broken", Code("\x80\x02" + system), "the name os.system"},
          {"STACK_GLOBAL", Value(Text("os") + Text("system") + "\x93"), "opcode 147"},
          {"INST", Value("(" + touch + "ios\nsystem\n"), "opcode 105"},
          {"OBJ", Value("(" + Global("torch", "Size") + "o"), "opcode 111"},
          {"NEWOBJ", Value(Global("torch", "Size") + ")\x81"), "opcode 129"},
          {"EXT1", Value("\x82\x01"), "opcode 130"},
          {"PERSID", Value("Pstorage\n"), "opcode 80"},
          {"call of a text", Value(Text("os.system") + Tuple({touch}) + "R"), "may not be called"},
          {"call of a storage", Value(Global("torch", "HalfStorage") + ")R"), "may not be called"},
          {"call without a tuple", Value(Global("torch", "Size") + "NR"), "other than a tuple"},
          {"filled OrderedDict", Value(Global("collections", "OrderedDict") + Tuple({touch}) + "R"),
           "made empty"},
          {"BUILD on a tensor", Value(PickledTensor().Code() + "}b"), "attributes"},
      });
  EXPECT_TRUE(*ModelDir::Open(canary.path())->List() == std::vector<std::string>());
}

// F11
TEST(BadFilesTest, TorchBombs) {
  const std::string self = Code(Pickle("}q\x01(" + Text("a") + "h\x01u"));
  ExpectTorchRefused(
      "pickle", "F11",
      {
          {"string of 2^31", Code("\x80\x02X\xFF\xFF\xFF\x7F"),
           "string of 2147483647 bytes is cut"},
          {"string over the cap", Value(Text(std::string(5000, 'x'))), "allowed are 4096"},
          {"whole number of 255 bytes", Value("\x8A\xFF" + std::string(255, '\1')), "64 bits"},
          {"LONG4", Value("\x8B\xFF\xFF\xFF\x7F"), "opcode 139"},
          {"BINUNICODE8", Value("\x8D" + std::string(7, '\0') + "\x80"), "opcode 141"},
          {"400,000 values", Code(Pickle("(" + Times(4, Times(90'000, "N") + "t(") + "t")),
           "300000 val"},
          {"deep stack", Code(Pickle(Times(100'001, "N"))), "100000 values on the stack"},
          {"tuples of one tuple", Code(Pickle(")" + Times(100, "\x85"))), "deeper than 64"},
          {"memo bomb: each holds the last twice",
           Code(Pickle(")q\x01" + Times(100, "h\x01h\x01\x86q\x01"))), "deeper than 64"},
          {"memo bomb: a list of one value",
           Code(Pickle("]N" + std::string("q\x01") + "a(" +
                       Times(11, Times(99'000, "h\x01") + "t(") + "t")),
           "1000000 values in containers"},
          {"marks", Code(Pickle(Times(65, "("))), "64 open marks"},
          {"a dict that holds itself", self, "must hold tensors only"},
      });
}

// The largest graphs that the caps let through to the error; ExpectRefused measures them.
TEST(BadFilesTest, TorchBombsStaySmall) {
  const std::string strings = Times(75'000, Text("twenty bytes of text")),
                    lists = Times(60'000, "]Na");
  ExpectTorchRefused(
      "pickle", "F11",
      {{"300,000 strings", Code(Pickle(Times(4, "(" + strings + "t") + "N")), "300000 values"},
       {"150,000 lists of one", Code(Pickle("(" + Times(5, "(" + lists + "t") + "t")),
        "300000 values"}});
}

TEST(BadFilesTest, TorchBrokenPickles) {
  const std::string a = Text("a");
  ExpectTorchRefused(
      "pickle", "F10",
      {
          {"empty", Code(""), "protocol 2"},
          {"protocol 4", Code("\x80\x04}."), "protocol 2"},
          {"protocol 0", Code("(dp0\n."), "protocol 2"},
          {"no stop", Code("\x80\x02}"), "is cut off"},
          {"cut in a number", Code("\x80\x02J\x01"), "is cut off"},
          {"cut in a name",
           Code("\x80\x02"
                "ctorch"),
           "is cut off"},
          {"bytes after the stop", Code(Pickle("}") + "x"), "bytes after its end"},
          {"nothing left", Code(Pickle("")), "one value"},
          {"two values left", Code(Pickle("}}")), "one value"},
          {"open mark", Code(Pickle("(}")), "one value"},
          {"empty stack", Code(Pickle("\x86")), "not there"},
          {"across a mark", Code(Pickle("NN(\x86")), "not there"},
          {"no mark", Code(Pickle("Nt")), "mark that is not there"},
          {"unknown memo", Code(Pickle("h\x07")), "kept value 7"},
          {"memo of nothing", Code(Pickle("q\x01")), "not there"},
          {"key without value", Code(Pickle("}(" + a + "u")), "key without a value"},
          {"items into a text", Code(Pickle(a + a + a + "s")), "no dict"},
          {"append to a dict", Code(Pickle("}Na")), "no list"},
          {"a list", Code(Pickle("]")), "dict of tensors"},
          {"a tensor alone", Code(Pickle(PickledTensor().Code())), "dict of tensors"},
          {"an int for a tensor", Value(Int(3)), "tensors only"},
          {"a nested state dict", Value(Dict({a, PickledTensor().Code()})), "tensors only"},
          {"a number for a name", Code(Pickle(Dict({Int(1), PickledTensor().Code()}))),
           "tensor name"},
          {"a name of 513 bytes",
           Code(Pickle(Dict({Text(std::string(513, 'n')), PickledTensor().Code()}))),
           "tensor name"},
          {"a name twice",
           Code(Pickle(Dict({a, PickledTensor().Code(), a, PickledTensor().Code()}))), "twice"},
      });
}

// F1, F2, F13: PyTorch CVE-2026-24747, vLLM CVE-2025-62164.
std::string Broken(const PickledTensor& tensor) { return Value(tensor.Code()); }

TEST(BadFilesTest, TorchTensors) {
  const int64_t max = INT64_MAX;
  const std::string id = Tuple({Text("storage"), Global("torch", "HalfStorage"), Text("0")}) + "Q";
  const std::string rebuild = Global("torch._utils", "_rebuild_tensor_v2");
  ExpectTorchRefused(
      "pickle", "F13",
      {
          {"fewer elements", Broken({.elements = 5}), "has 12 bytes, not 5 elements"},
          {"more elements", Broken({.elements = 7}), "has 12 bytes, not 7 elements"},
          {"2^62 elements", Broken({.elements = max}), "has 12 bytes"},
          {"negative elements", Broken({.elements = -1}), "has 12 bytes"},
          {"another type", Broken({.storage = "FloatStorage"}),
           "has 12 bytes, not 6 elements of F32"},
          {"odd bytes", Broken({.storage = "DoubleStorage", .elements = 1}), "has 12 bytes"},
          {"complex", Broken({.storage = "ComplexFloatStorage"}), "not one that a state dict"},
          {"no such storage", Broken({.key = "7"}), "not in the archive"},
          {"storage outside", Broken({.key = "../data.pkl"}), "not in the archive"},
          {"offset past the end", Broken({.offset = 1}), "leave its storage of 6"},
          {"offset 2^63 - 1", Broken({.offset = max}), "leave its storage"},
          {"negative offset", Broken({.offset = -1}), "leave its storage"},
          {"larger shape", Broken({.shape = {3, 3}}), "9 elements leave its storage"},
          {"F1 shape", Broken({.shape = {4194305, 4194305, 211106198978564}, .strides = {1, 1, 1}}),
           "too many elements"},
          {"negative shape", Broken({.shape = {-2, 3}}), "shape: must hold whole numbers"},
          {"negative stride", Broken({.strides = {-3, 1}}), "strides: must hold whole numbers"},
          {"stride of 2^40", Broken({.strides = {int64_t{1} << 40, 1}}), "one piece",
           absl::StatusCode::kUnimplemented},
          {"stride of 0", Broken({.strides = {0, 1}}), "one piece",
           absl::StatusCode::kUnimplemented},
          {"too few strides", Broken({.strides = {1}}), "one stride for each"},
          {"nine dimensions", Broken({.shape = std::vector<int64_t>(9, 1)}), "at most 8"},
          {"short storage id",
           Value(rebuild + Tuple({id, Int(0), Ints({6}), Ints({1}), "\x89", "}"}) + "R"),
           "its storage must be"},
          {"no storage",
           Value(rebuild + Tuple({"N", Int(0), Ints({6}), Ints({1}), "\x89", "}"}) + "R"),
           "its storage must be"},
          {"five arguments", Value(rebuild + Ints({1, 2, 3, 4, 5}) + "R"), "tensors only"},
          {"persistent id of a text", Value(Text("0") + "Q"), "must be a tuple"},
      });
}

}  // namespace
}  // namespace sluice::bad_files
