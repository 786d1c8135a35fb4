#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "kiln/json.h"

namespace kiln {

// How the blocks of one type become packed planes: which bits of a block are which bits of its words and halves. It is data of the artifact;
// what a block type means is not known here.
class Packing {
 public:
  // Bits of a block: those of `mask` in the 32 bits (of a half: 16) at byte `offset`, moved up by `shift`, down if that is negative.
  struct Term {
    uint32_t offset;
    uint32_t mask;
    int shift;
    size_t source;  // where `offset` stands in the plane's `offsets`
  };
  using Unit = std::vector<Term>;  // one word or half: the terms joined
  struct Plane {
    std::vector<Unit> units;
    std::vector<uint32_t> offsets;  // that terms read at, each once
  };

  // `object`: {"elements": 256, "bytes": 144, "words": ["16&0f0f0f0f|20&0f0f0f0f<<4", ..], "halves": [..]}. Error where a term leaves the block.
  explicit Packing(const Json& object);

  uint64_t elements() const { return elements_; }
  uint64_t bytes() const { return bytes_; }
  const Plane& words() const { return words_; }
  const Plane& halves() const { return halves_; }

  // Rows of `groups` blocks, `row_bytes` apart, into planes words [groups, W, N] and halves [groups, H, N], at their first rows' places.
  void pack(const char* rows, uint64_t row_bytes, uint64_t count, uint64_t groups, uint32_t* words, uint16_t* halves, uint64_t n) const;

 private:
  uint64_t elements_, bytes_;
  Plane words_, halves_;
};

}  // namespace kiln
