#pragma once
#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "kiln/artifact.h"

namespace kiln {

// A cache seen as [outer, slots, bytes of a slot]. Of a state one slot is in use, that of the number of tokens; a prefix's has one.
struct Slots {
  int64_t outer = 1, slots = 1;
  uint64_t width = 0;  // bytes
  int64_t behind = 0;
  bool state = false;

  // A ring's slots come first; a global cache has one for every position, wherever they stand.
  Slots(const KvSpec& spec, int64_t max_seq_len) : behind(spec.behind), state(spec.state) {
    const auto dim = spec.forgets() ? spec.shape.begin() : spec.prefix ? spec.shape.end() : std::find(spec.shape.begin(), spec.shape.end(), max_seq_len);
    for (auto d = spec.shape.begin(); d != dim; ++d) outer *= *d;
    if (dim != spec.shape.end()) slots = *dim;
    width = outer && slots ? spec.bytes / static_cast<uint64_t>(outer * slots) : 0;
  }

  // Slots that hold something that counts once `positions` tokens are in the caches: the first ones, but for a state's.
  int64_t used(int64_t positions) const { return std::min(state ? 1 : slots, std::max<int64_t>(positions - behind, 0)); }
  uint64_t bytes(int64_t positions) const { return static_cast<uint64_t>(outer * used(positions)) * width; }

  // f(offset in the cache, bytes) for each piece that those are.
  template <typename F>
  void pieces(int64_t positions, F&& f) const {
    const uint64_t row = static_cast<uint64_t>(slots) * width, part = static_cast<uint64_t>(used(positions)) * width;
    if (!part) return;
    if (state) return f(static_cast<uint64_t>(positions % kStateSlots) * width, width);
    if (part == row) return f(uint64_t{0}, row * static_cast<uint64_t>(outer));
    for (int64_t i = 0; i < outer; ++i) f(static_cast<uint64_t>(i) * row, part);
  }
};

}  // namespace kiln
