// Reading of the directory of a zip archive as torch.save writes it: members are stored as they
// are, so that each is a range of the file.
//
//   member ...   "PK\3\4", 26 bytes, name, extra field; the bytes; perhaps a data descriptor
//   directory    for each member "PK\1\2", 42 bytes, name, extra field, comment
//   end          zip64 record and locator if needed, then 22 bytes "PK\5\6" without a comment
//
// Every field that says the same thing twice must agree: tools that look at different copies see
// different archives. Checksums are kept for whoever reads a member as a whole: here it would need
// all the data.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "services/checkpoint/file.h"

namespace sluice::checkpoint {

struct ZipMember {
  std::string name;     // With folders: "archive/data/0". No "..", no absolute path.
  uint64_t offset = 0;  // Of the content, from the start of the file.
  uint64_t size = 0;
  uint32_t crc = 0;  // CRC-32 of the content; 0: torch.save was told to write none.
};

// Whether `content` has the checksum that the directory gives, or the directory gives none.
bool ChecksumFits(const ZipMember& member, const std::string& content);

// The members by offset. INVALID_ARGUMENT, naming file, member and rule: not a zip archive, cut
// off, several disks, more than 40,000 members or 4 MB of directory, a compressed or encrypted
// member, headers that disagree, members that overlap or leave gaps, a name twice or one that
// leaves the archive.
absl::StatusOr<std::vector<ZipMember>> ReadZipDirectory(const File& file);

}  // namespace sluice::checkpoint
