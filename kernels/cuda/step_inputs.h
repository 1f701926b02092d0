// DeviceStep: what the kernels of a step read that changes from step to step: token ids, positions,
// block tables, and which rows belong together. All of it lies in device memory at addresses that
// stay the same from step to step, so that a recorded graph finds the values of the step it is
// replayed for; the counts are those the graph was recorded with.
//
// Rows beyond those of the real step fill up a batch bucket: their position is kPaddingPosition;
// they read token 0, write nothing to the KV cache and get attention output 0.
#pragma once

#include <cstdint>

namespace sluice {

inline constexpr int32_t kPaddingPosition = -1;

// Rows of one sequence that are attended together by the prefill kernel: rows [row_begin, row_begin
// + num_rows) of the step, the first of which has position start_pos. At most kPrefillTileRows.
struct PrefillTile {
  int32_t sequence = 0;
  int32_t row_begin = 0;
  int32_t num_rows = 0;
  int32_t start_pos = 0;
};
inline constexpr int kPrefillTileRows = 64;

// Plain data, passed to kernels by value. Arrays are device memory, at least as long as said.
struct DeviceStep {
  int32_t rows = 0;                            // M, padding included
  const uint32_t* token_ids = nullptr;         // [rows]
  const uint32_t* table_rows = nullptr;        // [rows]: row of the table of learned positions
  const int32_t* positions = nullptr;          // [rows]: position in the sequence, or padding
  const int32_t* sequences = nullptr;          // [rows]: row of block_tables, 0 for padding
  const int32_t* block_tables = nullptr;       // [num_sequences, block_table_stride]
  int64_t block_table_stride = 0;              // Block ids a sequence has room for
  int32_t num_decode_rows = 0;                 // Rows that are alone in their sequence, and padding
  const int32_t* decode_rows = nullptr;        // [num_decode_rows]: row numbers
  int32_t num_prefill_tiles = 0;               // All other rows
  const PrefillTile* prefill_tiles = nullptr;  // [num_prefill_tiles]
  // Rotary embedding: row m turns by cos[m * half_dim + i], sin[...]; null without one.
  const float* cos = nullptr;
  const float* sin = nullptr;
  int32_t half_dim = 0;
};

}  // namespace sluice
