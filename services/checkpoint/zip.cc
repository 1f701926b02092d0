#include "services/checkpoint/zip.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "kernels/core/status_macros.h"
#include "services/checkpoint/tensor_set.h"

namespace sluice::checkpoint {
namespace {

constexpr uint64_t kMaxDirectoryBytes = 4'000'000;
constexpr uint64_t kMaxMembers = 40'000;
constexpr size_t kMaxNameBytes = 512;
constexpr uint32_t kLocalMagic = 0x04034B50, kEntryMagic = 0x02014B50, kEndMagic = 0x06054B50;
constexpr uint32_t kEnd64Magic = 0x06064B50, kLocator64Magic = 0x07064B50;
constexpr uint64_t kLocalBytes = 30, kEntryBytes = 46, kEndBytes = 22;
constexpr uint64_t kEnd64Bytes = 56, kLocator64Bytes = 20;
constexpr uint64_t kMaxDescriptorBytes = 24;
constexpr uint16_t kDescriptorFlag = 1 << 3, kUtf8Flag = 1 << 11;
constexpr uint16_t kZip64Extra = 1;
constexpr uint32_t kIn64 = 0xFFFFFFFF;  // The true value is in the zip64 field.
constexpr uint16_t kIn64Short = 0xFFFF;

template <typename T>
T Get(const std::string& bytes, size_t at) {
  T value;
  std::memcpy(&value, bytes.data() + at, sizeof(value));
  return value;
}

absl::StatusOr<std::string> ReadRange(const File& file, uint64_t offset, uint64_t size) {
  std::string bytes(size, '\0');
  SLUICE_RETURN_IF_ERROR(file.ReadAt(offset, size, bytes.data()));
  return bytes;
}

struct Directory {
  uint64_t offset = 0, size = 0, count = 0;
};

// The zip64 record replaces what the short end holds; where the short end has a value, both agree.
absl::StatusOr<Directory> ReadEnd64(const File& file, const Directory& shorter) {
  const uint64_t locator_at = file.size() - kEndBytes - kLocator64Bytes;
  SLUICE_ASSIGN_OR_RETURN(const std::string locator, ReadRange(file, locator_at, kLocator64Bytes));
  const auto at = Get<uint64_t>(locator, 8);
  if (locator_at < kEnd64Bytes || at != locator_at - kEnd64Bytes) {
    return BrokenFile(file.name(), "the zip64 locator does not lead to the record before it");
  }
  SLUICE_ASSIGN_OR_RETURN(const std::string end, ReadRange(file, at, kEnd64Bytes));
  if (Get<uint32_t>(end, 0) != kEnd64Magic || Get<uint64_t>(end, 4) != kEnd64Bytes - 12) {
    return BrokenFile(file.name(), "no zip64 record where the locator says");
  }
  const Directory full = {Get<uint64_t>(end, 48), Get<uint64_t>(end, 40), Get<uint64_t>(end, 32)};
  const bool one_disk = Get<uint32_t>(end, 16) == 0 && Get<uint32_t>(end, 20) == 0 &&
                        Get<uint64_t>(end, 24) == full.count;
  const auto agrees = [](uint64_t in_short, uint64_t marker, uint64_t in_full) {
    return in_short == marker || in_short == in_full;
  };
  if (!one_disk || !agrees(shorter.offset, kIn64, full.offset) ||
      !agrees(shorter.size, kIn64, full.size) || !agrees(shorter.count, kIn64Short, full.count)) {
    return BrokenFile(file.name(), "the zip end and the zip64 record disagree");
  }
  if (full.offset > at || full.size != at - full.offset) {
    return BrokenFile(file.name(), "the zip directory does not end at the zip64 record");
  }
  return full;
}

absl::StatusOr<Directory> FindDirectory(const File& file) {
  if (file.size() < kEndBytes) return BrokenFile(file.name(), "shorter than a zip archive");
  const uint64_t end_at = file.size() - kEndBytes;
  SLUICE_ASSIGN_OR_RETURN(const std::string end, ReadRange(file, end_at, kEndBytes));
  if (Get<uint32_t>(end, 0) != kEndMagic || Get<uint16_t>(end, 20) != 0) {
    return BrokenFile(file.name(), "does not end as a zip archive without a comment does");
  }
  Directory directory = {Get<uint32_t>(end, 16), Get<uint32_t>(end, 12), Get<uint16_t>(end, 10)};
  if (Get<uint16_t>(end, 4) != 0 || Get<uint16_t>(end, 6) != 0 ||
      Get<uint16_t>(end, 8) != Get<uint16_t>(end, 10)) {
    return BrokenFile(file.name(), "a zip archive over several disks");
  }
  bool has_locator = false;
  if (end_at >= kLocator64Bytes) {
    uint32_t magic;
    SLUICE_RETURN_IF_ERROR(file.ReadAt(end_at - kLocator64Bytes, sizeof(magic), &magic));
    has_locator = magic == kLocator64Magic;
  }
  if (has_locator) {
    SLUICE_ASSIGN_OR_RETURN(directory, ReadEnd64(file, directory));
  } else if (directory.offset > end_at || directory.size != end_at - directory.offset) {
    return BrokenFile(file.name(), "the zip directory does not end at the zip end");
  }
  if (directory.count == 0 || directory.count > kMaxMembers ||
      directory.size > kMaxDirectoryBytes) {
    return BrokenFile(
        file.name(),
        absl::StrCat("zip directory of ", directory.count, " members in ", directory.size,
                     " bytes, allowed are 1 to ", kMaxMembers, " in ", kMaxDirectoryBytes));
  }
  return directory;
}

bool IsPlainPath(const std::string& name) {
  if (name.empty() || name.size() > kMaxNameBytes) return false;
  for (const char c : name) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7F || c == '\\' || c == ':') return false;
  }
  for (const absl::string_view part : absl::StrSplit(name, '/')) {
    if (part.empty() || part == "." || part == "..") return false;
  }
  return true;
}

// One side's copy of what a member is: the directory's, or that before the content.
struct Header {
  uint16_t flags = 0, method = 0;
  uint32_t crc = 0;
  uint64_t packed = 0, size = 0, offset = 0;
};

// Takes the values that are marked as too large from the zip64 part of the extra field. False when
// they are not there.
bool ApplyZip64(const std::string& extra, Header* header) {
  uint64_t* const fields[] = {&header->size, &header->packed, &header->offset};
  size_t at = 0;
  while (extra.size() - at >= 4) {
    const size_t size = Get<uint16_t>(extra, at + 2);
    if (size > extra.size() - at - 4) return false;
    if (Get<uint16_t>(extra, at) != kZip64Extra) {
      at += 4 + size;
      continue;
    }
    size_t from = at + 4;
    for (uint64_t* field : fields) {
      if (*field != kIn64) continue;
      if (from + 8 > at + 4 + size) return false;
      *field = Get<uint64_t>(extra, from);
      from += 8;
    }
    return true;
  }
  return header->size != kIn64 && header->packed != kIn64 && header->offset != kIn64;
}

absl::Status CheckHeader(const Header& header, const std::string& what) {
  if (header.method != 0) {
    return BrokenFile(what, absl::StrCat("is compressed (method ", header.method,
                                         "); torch.save stores members as they are"));
  }
  if ((header.flags & ~(kDescriptorFlag | kUtf8Flag)) != 0) {
    return BrokenFile(what, absl::StrCat("flags ", header.flags,
                                         " (encrypted or otherwise special) are not allowed"));
  }
  if (header.packed != header.size) {
    return BrokenFile(what, absl::StrCat("is stored, but its two sizes are ", header.packed,
                                         " and ", header.size));
  }
  return absl::OkStatus();
}

// Reads the copy before the content, compares, and returns where the content starts.
absl::StatusOr<uint64_t> CheckLocal(const File& file, const Header& entry, const std::string& name,
                                    uint64_t data_end) {
  const std::string what = absl::StrCat(file.name(), ": zip member ", name);
  if (entry.offset > data_end || data_end - entry.offset < kLocalBytes + name.size()) {
    return BrokenFile(what, "lies outside the archive");
  }
  SLUICE_ASSIGN_OR_RETURN(const std::string fixed,
                          ReadRange(file, entry.offset, kLocalBytes + name.size()));
  const uint64_t extra_size = Get<uint16_t>(fixed, 28);
  if (Get<uint32_t>(fixed, 0) != kLocalMagic || Get<uint16_t>(fixed, 26) != name.size() ||
      fixed.substr(kLocalBytes) != name) {
    return BrokenFile(what, "has another name, or no header, where the directory says");
  }
  const uint64_t extra_at = entry.offset + fixed.size();
  if (extra_size > data_end - extra_at || entry.size > data_end - extra_at - extra_size) {
    return BrokenFile(what, absl::StrCat("of ", entry.size, " bytes lies outside the archive"));
  }
  SLUICE_ASSIGN_OR_RETURN(const std::string extra, ReadRange(file, extra_at, extra_size));
  Header local = {Get<uint16_t>(fixed, 6),  Get<uint16_t>(fixed, 8),  Get<uint32_t>(fixed, 14),
                  Get<uint32_t>(fixed, 18), Get<uint32_t>(fixed, 22), 0};
  if (!ApplyZip64(extra, &local)) return BrokenFile(what, "its zip64 field is incomplete");
  // With a data descriptor, the sizes were not known yet when this header was written.
  const bool later = (local.flags & kDescriptorFlag) != 0 && local.size == 0 && local.packed == 0 &&
                     local.crc == 0;
  if (local.flags != entry.flags || local.method != entry.method ||
      (!later &&
       (local.size != entry.size || local.packed != entry.packed || local.crc != entry.crc))) {
    return BrokenFile(what, "the header before its content and the directory disagree");
  }
  return extra_at + extra_size;
}

// Sorted by offset: no overlap, and nothing hidden between members.
absl::Status CheckLayout(const std::vector<std::pair<uint64_t, ZipMember>>& members,
                         const File& file, uint64_t data_end) {
  uint64_t end = 0;
  for (size_t i = 0; i <= members.size(); ++i) {
    const bool last = i == members.size();
    const uint64_t start = last ? data_end : members[i].first;
    const std::string what =
        absl::StrCat(file.name(), ": zip member ", members[last ? i - 1 : i].second.name);
    if (start < end) return BrokenFile(what, "overlaps another one");
    const uint64_t allowed = i == 0 ? 0 : kMaxDescriptorBytes;
    if (start - end > allowed) {
      return BrokenFile(what, absl::StrCat("has ", start - end, " bytes ",
                                           last ? "after" : "before", " it that belong to none"));
    }
    if (!last) end = members[i].second.offset + members[i].second.size;
  }
  return absl::OkStatus();
}

constexpr std::array<uint32_t, 256> MakeCrcTable() {
  std::array<uint32_t, 256> table{};
  for (uint32_t i = 0; i < 256; ++i) {
    uint32_t crc = i;
    for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc % 2 == 1 ? 0xEDB88320U : 0);
    table[i] = crc;
  }
  return table;
}

}  // namespace

bool ChecksumFits(const ZipMember& member, const std::string& content) {
  static constexpr std::array<uint32_t, 256> kTable = MakeCrcTable();
  uint32_t crc = ~0U;
  for (const char c : content) crc = crc >> 8 ^ kTable[(crc ^ static_cast<uint8_t>(c)) & 0xFF];
  return member.crc == 0 || member.crc == ~crc;
}

absl::StatusOr<std::vector<ZipMember>> ReadZipDirectory(const File& file) {
  SLUICE_ASSIGN_OR_RETURN(const Directory directory, FindDirectory(file));
  SLUICE_ASSIGN_OR_RETURN(const std::string bytes,
                          ReadRange(file, directory.offset, directory.size));
  std::vector<std::pair<uint64_t, ZipMember>> members;  // With the offset of the header.
  absl::flat_hash_set<std::string> names;
  size_t at = 0;
  for (uint64_t i = 0; i < directory.count; ++i) {
    const std::string broken = absl::StrCat(file.name(), ": zip directory entry ", i);
    if (bytes.size() - at < kEntryBytes || Get<uint32_t>(bytes, at) != kEntryMagic) {
      return BrokenFile(broken, "is missing");
    }
    const size_t name_size = Get<uint16_t>(bytes, at + 28);
    const size_t extra_size = Get<uint16_t>(bytes, at + 30);
    const size_t rest = name_size + extra_size + Get<uint16_t>(bytes, at + 32);
    if (bytes.size() - at - kEntryBytes < rest) return BrokenFile(broken, "is cut off");
    ZipMember member;
    member.name = bytes.substr(at + kEntryBytes, name_size);
    if (!IsPlainPath(member.name)) {
      return BrokenFile(broken, "its name is no plain relative path");
    }
    const std::string what = absl::StrCat(file.name(), ": zip member ", member.name);
    Header entry = {Get<uint16_t>(bytes, at + 8),  Get<uint16_t>(bytes, at + 10),
                    Get<uint32_t>(bytes, at + 16), Get<uint32_t>(bytes, at + 20),
                    Get<uint32_t>(bytes, at + 24), Get<uint32_t>(bytes, at + 42)};
    if (!ApplyZip64(bytes.substr(at + kEntryBytes + name_size, extra_size), &entry)) {
      return BrokenFile(what, "its zip64 field is incomplete");
    }
    SLUICE_RETURN_IF_ERROR(CheckHeader(entry, what));
    SLUICE_ASSIGN_OR_RETURN(member.offset, CheckLocal(file, entry, member.name, directory.offset));
    member.size = entry.size;
    member.crc = entry.crc;
    if (!names.insert(member.name).second) return BrokenFile(what, "is there twice");
    members.emplace_back(entry.offset, std::move(member));
    at += kEntryBytes + rest;
  }
  if (at != bytes.size())
    return BrokenFile(file.name(), "the zip directory is longer than it says");
  std::sort(members.begin(), members.end(),
            [](const auto& a, const auto& b) { return a.first < b.first; });
  SLUICE_RETURN_IF_ERROR(CheckLayout(members, file, directory.offset));
  std::vector<ZipMember> result;
  for (auto& [start, member] : members) result.push_back(std::move(member));
  return result;
}

}  // namespace sluice::checkpoint
