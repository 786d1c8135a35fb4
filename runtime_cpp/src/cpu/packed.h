#pragma once
#include <cstdint>

namespace kiln {

// A GGML block type by its name in `exporter`'s layouts, as "Q4_K"; null for another.
struct BlockType;
const BlockType* block_type(const char* name);
int64_t elements(const BlockType& type);  // of a block
int64_t words(const BlockType& type);
int64_t halves(const BlockType& type);

// A packed matrix [k, n]: word w of a block of column c is words[block * words_block + w * words_row + c], halves likewise.
struct PackedMatrix {
  static constexpr int kMostColumns = 256;  // unpacked at once
  const BlockType* type;
  const int32_t* words;
  const uint16_t* halves;
  int64_t words_block, words_row, halves_block, halves_row;
};

// Rows k .. k + length - 1 of columns column .. column + columns - 1 in float32: element (i, c) of them to to[i * stride + c]. k and length are
// multiples of the block's elements.
void unpack(const PackedMatrix& b, int64_t k, int64_t length, int64_t column, int columns, float* to, int64_t stride);

}  // namespace kiln
