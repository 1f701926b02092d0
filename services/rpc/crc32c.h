// CRC32C (Castagnoli), the checksum of activation pieces and weight parts. With SSE4.2's
// instruction where the build has it, else with a table.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sluice::rpc {

// Checksum of data[0, size); "123456789" gives 0xE3069283. `crc` is the checksum of the bytes
// before it, so that Crc32c(b, Crc32c(a)) is that of a followed by b.
uint32_t Crc32c(const void* data, size_t size, uint32_t crc = 0);

// The same, always by the table: what the tests compare the fast one with.
uint32_t Crc32cByTable(const void* data, size_t size, uint32_t crc = 0);

}  // namespace sluice::rpc
