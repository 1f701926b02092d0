#include "services/checkpoint/pickle.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "kernels/core/status_macros.h"

namespace sluice::checkpoint {
namespace {

constexpr size_t kMaxValues = 300'000;
constexpr size_t kMaxReferences = 1'000'000;
constexpr size_t kMaxStack = 100'000;
constexpr size_t kMaxMarks = 64;
constexpr uint8_t kMaxDepth = 64;
constexpr size_t kMaxTextBytes = 4096;

// All names that a pickle may hold.
constexpr const char* kCallable[] = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2",
                                     "torch._utils _rebuild_parameter", "torch Size"};
constexpr const char* kStorages[] = {
    "torch FloatStorage", "torch HalfStorage", "torch BFloat16Storage", "torch DoubleStorage",
    "torch IntStorage",   "torch LongStorage", "torch ShortStorage",    "torch CharStorage",
    "torch ByteStorage",  "torch BoolStorage"};

template <typename List>
bool Contains(const List& list, const std::string& name) {
  return std::any_of(std::begin(list), std::end(list),
                     [&name](const char* entry) { return name == entry; });
}

std::string Printable(const std::string& text) {
  std::string out = text.substr(0, 80);
  for (char& c : out) {
    if (static_cast<unsigned char>(c) < 0x20 || static_cast<unsigned char>(c) > 0x7E) c = '?';
  }
  return out;
}

using Kind = PickleValue::Kind;

// The stack machine. A method that finds a broken rule returns its status; the machine is then
// thrown away.
class Machine {
 public:
  Machine(const std::string& bytes, const std::string& what) : bytes_(bytes), what_(what) {}

  absl::StatusOr<PickleGraph> Run() {
    if (bytes_.size() > kMaxPickleBytes) {
      return Bad(
          absl::StrCat("pickle of ", bytes_.size(), " bytes, allowed are ", kMaxPickleBytes));
    }
    if (!absl::StartsWith(bytes_, "\x80\x02")) {
      return Bad("does not start as a pickle of protocol 2, torch.save's default");
    }
    at_ = 2;
    for (;;) {
      begin_ = at_;
      SLUICE_ASSIGN_OR_RETURN(const auto op, Take<uint8_t>());
      if (op == '.') break;
      SLUICE_RETURN_IF_ERROR(Step(op));
    }
    if (at_ != bytes_.size()) return Bad("bytes after its end");
    if (stack_.size() != 1 || !marks_.empty()) return Bad("must leave one value");
    graph_.root = stack_[0];
    return std::move(graph_);
  }

 private:
  absl::Status Bad(const std::string& rule) const {
    return absl::InvalidArgumentError(absl::StrCat(
        what_, ", byte ", begin_, ": ", rule,
        "; nothing of the file was executed. Save the weights again with torch.save(state_dict), "
        "or as safetensors"));
  }

  // --- Reading the bytes

  template <typename T>
  absl::StatusOr<T> Take() {
    T value;
    if (bytes_.size() - at_ < sizeof(T)) return Bad("is cut off");
    std::memcpy(&value, bytes_.data() + at_, sizeof(T));
    at_ += sizeof(T);
    return value;
  }

  absl::StatusOr<std::string> TakeText(uint64_t size) {
    if (size > bytes_.size() - at_) {
      return Bad(absl::StrCat("a string of ", size, " bytes is cut off"));
    }
    if (size > kMaxTextBytes) {
      return Bad(absl::StrCat("a string of ", size, " bytes, allowed are ", kMaxTextBytes));
    }
    at_ += size;
    return bytes_.substr(at_ - size, size);
  }

  absl::StatusOr<std::string> TakeLine() {
    const size_t end = bytes_.find('\n', at_);
    if (end == std::string::npos) return Bad("is cut off");
    SLUICE_ASSIGN_OR_RETURN(std::string line, TakeText(end - at_));
    ++at_;
    return line;
  }

  // --- The stack

  absl::Status PushIndex(uint32_t index) {
    if (stack_.size() >= kMaxStack) {
      return Bad(absl::StrCat("more than ", kMaxStack, " values on the stack"));
    }
    stack_.push_back(index);
    return absl::OkStatus();
  }

  absl::Status Push(PickleValue value) {
    if (graph_.values.size() >= kMaxValues) {
      return Bad(absl::StrCat("more than ", kMaxValues, " values"));
    }
    SLUICE_RETURN_IF_ERROR(Count(value.items.size()));
    for (const uint32_t item : value.items) SLUICE_RETURN_IF_ERROR(Nest(item, &value));
    graph_.values.push_back(std::move(value));
    return PushIndex(static_cast<uint32_t>(graph_.values.size() - 1));
  }

  absl::Status PushNumber(Kind kind, int64_t number) {
    PickleValue value;
    value.kind = kind;
    value.number = number;
    return Push(std::move(value));
  }

  absl::Status PushItems(Kind kind, std::vector<uint32_t> items) {
    PickleValue value;
    value.kind = kind;
    value.items = std::move(items);
    return Push(std::move(value));
  }

  absl::Status Count(size_t references) {
    references_ += references;
    if (references_ <= kMaxReferences) return absl::OkStatus();
    return Bad(absl::StrCat("more than ", kMaxReferences, " values in containers"));
  }

  absl::Status Nest(uint32_t item, PickleValue* holder) const {
    const int depth = graph_[item].depth + 1;
    if (depth > kMaxDepth) return Bad(absl::StrCat("nested deeper than ", kMaxDepth, " levels"));
    holder->depth = std::max(holder->depth, static_cast<uint8_t>(depth));
    return absl::OkStatus();
  }

  // The last `count` values, which no mark separates.
  absl::StatusOr<std::vector<uint32_t>> Pop(size_t count) {
    const size_t floor = marks_.empty() ? 0 : marks_.back();
    if (stack_.size() - floor < count) return Bad("takes values that are not there");
    std::vector<uint32_t> items(stack_.end() - static_cast<ptrdiff_t>(count), stack_.end());
    stack_.resize(stack_.size() - count);
    return items;
  }

  absl::StatusOr<std::vector<uint32_t>> PopToMark() {
    if (marks_.empty()) return Bad("takes values up to a mark that is not there");
    const size_t mark = marks_.back();
    SLUICE_ASSIGN_OR_RETURN(std::vector<uint32_t> items, Pop(stack_.size() - mark));
    marks_.pop_back();
    return items;
  }

  // The container on top of the stack.
  absl::StatusOr<PickleValue*> Top(Kind kind) {
    const size_t floor = marks_.empty() ? 0 : marks_.back();
    if (stack_.size() <= floor || graph_[stack_.back()].kind != kind) {
      return Bad(kind == Kind::kDict ? "the value below is no dict" : "the value below is no list");
    }
    return &graph_.values[stack_.back()];
  }

  absl::Status AddTo(Kind kind, const std::vector<uint32_t>& items) {
    SLUICE_ASSIGN_OR_RETURN(PickleValue* const holder, Top(kind));
    if (kind == Kind::kDict && items.size() % 2 != 0) return Bad("a key without a value");
    SLUICE_RETURN_IF_ERROR(Count(items.size()));
    for (const uint32_t item : items) SLUICE_RETURN_IF_ERROR(Nest(item, holder));
    holder->items.insert(holder->items.end(), items.begin(), items.end());
    return absl::OkStatus();
  }

  // --- Opcodes

  absl::Status PushGlobal() {
    PickleValue value;
    value.kind = Kind::kGlobal;
    SLUICE_ASSIGN_OR_RETURN(const std::string module, TakeLine());
    SLUICE_ASSIGN_OR_RETURN(const std::string name, TakeLine());
    value.text = absl::StrCat(module, " ", name);
    if (!Contains(kCallable, value.text) && !Contains(kStorages, value.text)) {
      return Bad(absl::StrCat("the name ", Printable(module), ".", Printable(name),
                              " is not one that a state dict needs"));
    }
    return Push(std::move(value));
  }

  absl::Status PushCall() {
    SLUICE_ASSIGN_OR_RETURN(const std::vector<uint32_t> parts, Pop(2));
    const PickleValue& callee = graph_[parts[0]];
    const PickleValue& arguments = graph_[parts[1]];
    if (callee.kind != Kind::kGlobal || !Contains(kCallable, callee.text)) {
      return Bad("calls something that may not be called");
    }
    if (arguments.kind != Kind::kTuple) return Bad("calls with something other than a tuple");
    PickleValue value;
    value.kind = Kind::kCall;
    value.text = callee.text;
    value.items = arguments.items;
    if (callee.text == kCallable[0]) {
      if (!arguments.items.empty()) return Bad("an OrderedDict must be made empty");
      value.kind = Kind::kDict;
      value.text.clear();
    }
    return Push(std::move(value));
  }

  // The attributes of a state dict (_metadata) are of no use here.
  absl::Status Build() {
    SLUICE_RETURN_IF_ERROR(Pop(1).status());
    if (Top(Kind::kDict).ok()) return absl::OkStatus();
    return Bad("sets attributes of something other than a dict");
  }

  absl::Status PushStorage() {
    SLUICE_ASSIGN_OR_RETURN(const std::vector<uint32_t> parts, Pop(1));
    if (graph_[parts[0]].kind != Kind::kTuple) return Bad("a persistent id must be a tuple");
    return PushItems(Kind::kStorage, graph_[parts[0]].items);
  }

  absl::Status PushLong() {
    SLUICE_ASSIGN_OR_RETURN(const auto size, Take<uint8_t>());
    if (size > sizeof(int64_t)) return Bad("a whole number of more than 64 bits");
    SLUICE_ASSIGN_OR_RETURN(const std::string bytes, TakeText(size));
    uint64_t number = 0;
    for (size_t i = 0; i < bytes.size(); ++i) {
      number |= uint64_t{static_cast<uint8_t>(bytes[i])} << (8 * i);
    }
    const bool negative = !bytes.empty() && (bytes.back() & 0x80) != 0;
    if (negative && size < sizeof(number)) number |= ~uint64_t{0} << (8 * size);
    return PushNumber(Kind::kInt, static_cast<int64_t>(number));
  }

  template <typename Size>
  absl::Status PushString() {
    PickleValue value;
    value.kind = Kind::kString;
    SLUICE_ASSIGN_OR_RETURN(const auto size, Take<Size>());
    SLUICE_ASSIGN_OR_RETURN(value.text, TakeText(size));
    return Push(std::move(value));
  }

  template <typename Int>
  absl::Status PushInt() {
    SLUICE_ASSIGN_OR_RETURN(const auto number, Take<Int>());
    return PushNumber(Kind::kInt, number);
  }

  template <typename Key>
  absl::Status Remember() {
    SLUICE_ASSIGN_OR_RETURN(const auto key, Take<Key>());
    const size_t floor = marks_.empty() ? 0 : marks_.back();
    if (stack_.size() <= floor) return Bad("keeps a value that is not there");
    // A map, so that a large key is no reason to allocate.
    if (memo_.size() >= kMaxValues) return Bad("keeps too many values");
    memo_[key] = stack_.back();
    return absl::OkStatus();
  }

  template <typename Key>
  absl::Status Recall() {
    SLUICE_ASSIGN_OR_RETURN(const auto key, Take<Key>());
    const auto it = memo_.find(key);
    if (it == memo_.end())
      return Bad(absl::StrCat("takes kept value ", key, ", which is not there"));
    return PushIndex(it->second);
  }

  absl::Status PushTuple(size_t count) {
    SLUICE_ASSIGN_OR_RETURN(std::vector<uint32_t> items, Pop(count));
    return PushItems(Kind::kTuple, std::move(items));
  }

  absl::Status Mark() {
    if (marks_.size() >= kMaxMarks)
      return Bad(absl::StrCat("more than ", kMaxMarks, " open marks"));
    marks_.push_back(stack_.size());
    return absl::OkStatus();
  }

  absl::Status AddPopped(Kind kind, absl::StatusOr<std::vector<uint32_t>> items) {
    if (!items.ok()) return items.status();
    return AddTo(kind, *items);
  }

  absl::Status Step(uint8_t op);
  absl::Status StepContainer(uint8_t op);

  const std::string& bytes_;
  const std::string& what_;
  size_t at_ = 0;
  size_t begin_ = 0;  // Of the opcode at hand.
  PickleGraph graph_;
  std::vector<uint32_t> stack_;
  std::vector<size_t> marks_;  // Heights of the stack.
  absl::flat_hash_map<uint32_t, uint32_t> memo_;
  size_t references_ = 0;
};

absl::Status Machine::Step(uint8_t op) {
  switch (op) {
    case 'c':
      return PushGlobal();
    case 'R':
      return PushCall();
    case 'b':
      return Build();
    case 'Q':
      return PushStorage();
    case 'N':
      return PushNumber(Kind::kNone, 0);
    case 0x88:
      return PushNumber(Kind::kBool, 1);
    case 0x89:
      return PushNumber(Kind::kBool, 0);
    case 'J':
      return PushInt<int32_t>();
    case 'K':
      return PushInt<uint8_t>();
    case 'M':
      return PushInt<uint16_t>();
    case 0x8A:
      return PushLong();
    case 'G':
      SLUICE_RETURN_IF_ERROR(Take<uint64_t>().status());
      return PushNumber(Kind::kFloat, 0);
    case 'X':
      return PushString<uint32_t>();
    case 'U':
      return PushString<uint8_t>();
    case 'q':
      return Remember<uint8_t>();
    case 'r':
      return Remember<uint32_t>();
    case 'h':
      return Recall<uint8_t>();
    case 'j':
      return Recall<uint32_t>();
    default:
      return StepContainer(op);
  }
}

absl::Status Machine::StepContainer(uint8_t op) {
  switch (op) {
    case '(':
      return Mark();
    case 't': {
      SLUICE_ASSIGN_OR_RETURN(std::vector<uint32_t> items, PopToMark());
      return PushItems(Kind::kTuple, std::move(items));
    }
    case ')':
    case 0x85:
    case 0x86:
    case 0x87:
      return PushTuple(op == ')' ? 0 : op - 0x84);
    case ']':
      return PushItems(Kind::kList, {});
    case '}':
      return PushItems(Kind::kDict, {});
    case 'a':
      return AddPopped(Kind::kList, Pop(1));
    case 'e':
      return AddPopped(Kind::kList, PopToMark());
    case 's':
      return AddPopped(Kind::kDict, Pop(2));
    case 'u':
      return AddPopped(Kind::kDict, PopToMark());
    default:
      return Bad(absl::StrCat("opcode ", op, " is not one that a state dict needs"));
  }
}

}  // namespace

absl::StatusOr<PickleGraph> ReadPickle(const std::string& bytes, const std::string& what) {
  return Machine(bytes, what).Run();
}

}  // namespace sluice::checkpoint
