#include "artifact/packing.h"

#include <algorithm>
#include <charconv>
#include <cstring>

#include "kiln/error.h"

namespace kiln {

namespace {

constexpr uint64_t kMaxBlock = 1 << 12, kMaxUnits = 1 << 10, kRows = 128;  // kRows: packed at a time, which stays in the L1 cache
constexpr size_t kMaxTerms = 64;                                          // of a unit

uint64_t size_at(const Json& object, std::string_view key) {
  int64_t n = object.at(key).as_int();
  if (n < 1 || static_cast<uint64_t>(n) > kMaxBlock) fail("'", key, "' is ", n);
  return static_cast<uint64_t>(n);
}

template <typename T>
bool number(std::string_view& text, T* value, int base) {
  auto r = std::from_chars(text.data(), text.data() + text.size(), *value, base);
  if (r.ec != std::errc()) return false;
  text.remove_prefix(static_cast<size_t>(r.ptr - text.data()));
  return true;
}
bool word(std::string_view& text, std::string_view want) {
  if (text.substr(0, want.size()) != want) return false;
  text.remove_prefix(want.size());
  return true;
}

// "16&0f0f0f0f|20&0f0f0f0f<<4", of a plane of elements of `width` bits.
Packing::Unit parse_unit(std::string_view text, int width, uint64_t block) {
  Packing::Unit unit;
  for (std::string_view rest = text;;) {
    Packing::Term t{0, 0, 0, 0};
    bool good = number(rest, &t.offset, 10) && word(rest, "&") && number(rest, &t.mask, 16);
    if (good && word(rest, "<<"))
      good = number(rest, &t.shift, 10) && t.shift > 0;
    else if (good && word(rest, ">>"))
      good = number(rest, &t.shift, 10) && t.shift > 0, t.shift = -t.shift;
    const uint32_t all = width == 32 ? UINT32_MAX : 0xFFFF;
    if (!good || std::abs(t.shift) >= width || t.mask > all || uint64_t{t.offset} + static_cast<uint64_t>(width / 8) > block || unit.size() == kMaxTerms)
      fail("'", text, "' is no part of a block of ", block, " bytes");
    unit.push_back(t);
    if (rest.empty()) return unit;
    if (!word(rest, "|")) fail("'", text, "' is no part of a block of ", block, " bytes");
  }
}

Packing::Plane parse_plane(const Json& array, int width, uint64_t block) {
  Packing::Plane plane;
  if (array.size() < 1 || array.size() > kMaxUnits) fail("a block of ", array.size(), " words or halves");
  for (const Json& unit : array) plane.units.push_back(parse_unit(unit.as_string(), width, block));
  for (Packing::Unit& unit : plane.units)
    for (Packing::Term& t : unit) {
      auto it = std::find(plane.offsets.begin(), plane.offsets.end(), t.offset);
      t.source = static_cast<size_t>(it - plane.offsets.begin());
      if (it == plane.offsets.end()) plane.offsets.push_back(t.offset);
    }
  return plane;
}

// One group of `count` rows, at most kRows of them. `at` is the group's place in the first row; `out` the plane's, [units, n]. `from` is scratch.
template <typename T>
inline __attribute__((always_inline)) void pack_rows(const Packing::Plane& plane, const char* at, uint64_t row_bytes, uint64_t count, T* out, uint64_t n,
                                                     T* from) {
  for (size_t k = 0; k < plane.offsets.size(); ++k) {
    const char* source = at + plane.offsets[k];
    for (uint64_t r = 0; r < count; ++r) std::memcpy(&from[k * kRows + r], source + r * row_bytes, sizeof(T));
  }
  alignas(64) T sum[kRows];
  for (const Packing::Unit& unit : plane.units) {
    for (size_t i = 0; i < unit.size(); ++i) {
      const Packing::Term& t = unit[i];
      const T* f = from + t.source * kRows;
      const auto mask = static_cast<T>(t.mask);
      const int left = std::max(t.shift, 0), right = std::max(-t.shift, 0);
      if (i == 0)
        for (uint64_t r = 0; r < kRows; ++r) sum[r] = static_cast<T>(((f[r] & mask) << left) >> right);
      else
        for (uint64_t r = 0; r < kRows; ++r) sum[r] = static_cast<T>(sum[r] | (((f[r] & mask) << left) >> right));
    }
    std::memcpy(out, sum, count * sizeof(T));
    out += n;
  }
}

struct Rows {
  const char* at;
  uint64_t row_bytes, count, n;
};
inline __attribute__((always_inline)) void pack_block(const Packing& p, const Rows& in, uint32_t* words, uint16_t* halves, uint32_t* scratch) {
  pack_rows<uint32_t>(p.words(), in.at, in.row_bytes, in.count, words, in.n, scratch);
  pack_rows<uint16_t>(p.halves(), in.at, in.row_bytes, in.count, halves, in.n, reinterpret_cast<uint16_t*>(scratch));
}
__attribute__((target("avx2"))) void pack_block_avx2(const Packing& p, const Rows& in, uint32_t* words, uint16_t* halves, uint32_t* scratch) {
  pack_block(p, in, words, halves, scratch);
}
void pack_block_plain(const Packing& p, const Rows& in, uint32_t* words, uint16_t* halves, uint32_t* scratch) { pack_block(p, in, words, halves, scratch); }

}  // namespace

Packing::Packing(const Json& object)
    : elements_(size_at(object, "elements")),
      bytes_(size_at(object, "bytes")),
      words_(parse_plane(object.at("words"), 32, bytes_)),
      halves_(parse_plane(object.at("halves"), 16, bytes_)) {}

void Packing::pack(const char* rows, uint64_t row_bytes, uint64_t count, uint64_t groups, uint32_t* words, uint16_t* halves, uint64_t n) const {
  static const bool avx2 = __builtin_cpu_supports("avx2") != 0;
  std::vector<uint32_t> scratch(kRows * std::max(words_.offsets.size(), halves_.offsets.size()));
  for (uint64_t first = 0; first < count; first += kRows)
    for (uint64_t g = 0; g < groups; ++g) {
      const Rows in{rows + first * row_bytes + g * bytes_, row_bytes, std::min(kRows, count - first), n};
      uint32_t* w = words + g * words_.units.size() * n + first;
      uint16_t* h = halves + g * halves_.units.size() * n + first;
      (avx2 ? pack_block_avx2 : pack_block_plain)(*this, in, w, h, scratch.data());
    }
}

}  // namespace kiln
