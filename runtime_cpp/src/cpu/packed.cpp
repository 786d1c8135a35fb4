// Packed weights as float32, bit-equal to `layouts.dequantize` of the exporter: every element is made of the same roundings in the same order,
// so this file is compiled without contraction to fused multiply-adds. Columns lie beside each other, so loops go along them, in vectors.
#include "cpu/packed.h"

#include <immintrin.h>

#include <cstring>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#define KILN_NO_OVERLAP
#else
#pragma GCC push_options
#pragma GCC target("avx2,f16c")
#define KILN_NO_OVERLAP _Pragma("GCC ivdep")  // what a loop writes is not what it reads
#endif

namespace kiln {

namespace {

constexpr int kMost = PackedMatrix::kMostColumns;
constexpr int8_t kIq4Levels[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
constexpr int8_t kE2m1Levels[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};  // doubled

// One block's columns: row w of its words is words + w * words_row.
struct Block {
  const uint32_t* words;
  const uint16_t* halves;
  int64_t words_row, halves_row;
  int n;       // columns
  float* to;   // element i of column c is to[i * stride + c]
  int64_t stride;

  const uint32_t* word(int w) const { return words + w * words_row; }
  const uint16_t* half(int h) const { return halves + h * halves_row; }
};

// Where item i of a word of `bits`-bit items begins: item i is item i / 4 of byte i % 4.
constexpr int shift_of(int i, int bits) { return (i & 3) * 8 + (i >> 2) * bits; }

void float16(const Block& b, int h, float* out) {
  const uint16_t* from = b.half(h);
  int c = 0;
  for (; c + 8 <= b.n; c += 8) _mm256_storeu_ps(out + c, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + c))));
  for (; c < b.n; ++c) out[c] = _cvtsh_ss(from[c]);
}

int signed_byte(uint32_t byte) { return static_cast<int>(byte ^ 128) - 128; }

// value(c, i): quant i of a word of column c, as an integer. scale and minimum are the columns'.
template <int Items, typename Value>
inline __attribute__((always_inline)) void scaled(const Block& b, int first, const float* scale, const Value& value) {
  float* const to = b.to + first * b.stride;
  KILN_NO_OVERLAP
  for (int c = 0; c < b.n; ++c)
#pragma GCC unroll 32
    for (int i = 0; i < Items; ++i) to[i * b.stride + c] = static_cast<float>(value(c, i)) * scale[c];
}
template <int Items, typename Value>
inline __attribute__((always_inline)) void offset(const Block& b, int first, const float* scale, const float* minimum, float sign, const Value& value) {
  float* const to = b.to + first * b.stride;
  KILN_NO_OVERLAP
  for (int c = 0; c < b.n; ++c)
#pragma GCC unroll 32
    for (int i = 0; i < Items; ++i) {
      const float product = static_cast<float>(value(c, i)) * scale[c];
      to[i * b.stride + c] = product + sign * minimum[c];
    }
}
// Eight nibbles of each word of a row, which stand for numbers of a table.
void levels(const Block& b, int first, const uint32_t* word, const float* scale, const int8_t* table) {
  float* const to = b.to + first * b.stride;
  const __m128i levels = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
  int c = 0;
  for (; c + 4 <= b.n; c += 4) {  // four words: low nibbles are items 0 .. 3, high ones 4 .. 7
    const __m128i w = _mm_loadu_si128(reinterpret_cast<const __m128i*>(word + c)), mask = _mm_set1_epi8(15);
    const __m128 s = _mm_loadu_ps(scale + c);
    const __m128i half[2] = {_mm_shuffle_epi8(levels, _mm_and_si128(w, mask)), _mm_shuffle_epi8(levels, _mm_and_si128(_mm_srli_epi16(w, 4), mask))};
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const __m128i level = _mm_srai_epi32(_mm_slli_epi32(half[i / 4], 24 - 8 * (i & 3)), 24);
      _mm_storeu_ps(to + i * b.stride + c, _mm_mul_ps(_mm_cvtepi32_ps(level), s));
    }
  }
  for (; c < b.n; ++c)
    for (int i = 0; i < 8; ++i) to[i * b.stride + c] = static_cast<float>(table[word[c] >> shift_of(i, 4) & 15]) * scale[c];
}

// ---- blocks of 32 ----

void q4_0(const Block& b) {
  float d[kMost];
  float16(b, 0, d);
  for (int w = 0; w < 4; ++w) {
    const uint32_t* q = b.word(w);
    scaled<8>(b, 8 * w, d, [q](int c, int i) { return static_cast<int>(q[c] >> shift_of(i, 4) & 15) - 8; });
  }
}
void q4_1(const Block& b) {
  float d[kMost], m[kMost];
  float16(b, 0, d), float16(b, 1, m);
  for (int w = 0; w < 4; ++w) {
    const uint32_t* q = b.word(w);
    offset<8>(b, 8 * w, d, m, 1.0f, [q](int c, int i) { return static_cast<int>(q[c] >> shift_of(i, 4) & 15); });
  }
}
// The fifth bit of item 8 w + i of a group of 32.
inline __attribute__((always_inline)) int fifth(uint32_t bits, int w, int i) { return static_cast<int>(bits >> ((i & 3) * 8 + 2 * w + (i >> 2)) & 1) << 4; }
void q5_0(const Block& b) {
  float d[kMost];
  float16(b, 0, d);
  const uint32_t* high = b.word(4);
  for (int w = 0; w < 4; ++w) {
    const uint32_t* q = b.word(w);
    scaled<8>(b, 8 * w, d, [q, high, w](int c, int i) { return (static_cast<int>(q[c] >> shift_of(i, 4) & 15) | fifth(high[c], w, i)) - 16; });
  }
}
void q5_1(const Block& b) {
  float d[kMost], m[kMost];
  float16(b, 0, d), float16(b, 1, m);
  const uint32_t* high = b.word(4);
  for (int w = 0; w < 4; ++w) {
    const uint32_t* q = b.word(w);
    offset<8>(b, 8 * w, d, m, 1.0f, [q, high, w](int c, int i) { return static_cast<int>(q[c] >> shift_of(i, 4) & 15) | fifth(high[c], w, i); });
  }
}
void q8_0(const Block& b) {
  float d[kMost];
  float16(b, 0, d);
  for (int w = 0; w < 8; ++w) {
    const uint32_t* q = b.word(w);
    scaled<4>(b, 4 * w, d, [q](int c, int i) { return signed_byte(q[c] >> shift_of(i, 8) & 255); });
  }
}
void iq4_nl(const Block& b) {
  float d[kMost];
  float16(b, 0, d);
  for (int w = 0; w < 4; ++w) levels(b, 8 * w, b.word(w), d, kIq4Levels);
}
// The bits of 2^(e - 128), for its levels are doubled; below 2^-126 it is no normal number.
uint32_t e8m0(uint32_t e) { return e < 2 ? 0x00200000u * (e + 1) : (e - 1) << 23; }
void mxfp4(const Block& b) {
  uint32_t bits[kMost];
  float scale[kMost];
  const uint16_t* pair = b.half(0);
  for (int g = 0; g < 2; ++g) {
    for (int c = 0; c < b.n; ++c) bits[c] = e8m0(pair[c] >> 8 * g & 255);
    std::memcpy(scale, bits, static_cast<size_t>(b.n) * sizeof *scale);
    for (int w = 0; w < 4; ++w) levels(b, 32 * g + 8 * w, b.word(4 * g + w), scale, kE2m1Levels);
  }
}

// ---- blocks of 256 ----

void q2_k(const Block& b) {
  float d[kMost], dmin[kMost], scale[kMost], minimum[kMost];
  float16(b, 0, d), float16(b, 1, dmin);
  for (int g = 0; g < 16; ++g) {
    const uint32_t *packed = b.word(16 + g / 4), *q = b.word(g);
    const int shift = (g & 3) * 8;
    for (int c = 0; c < b.n; ++c) {
      scale[c] = static_cast<float>(static_cast<int>(packed[c] >> shift & 15)) * d[c];
      minimum[c] = static_cast<float>(static_cast<int>(packed[c] >> (shift + 4) & 15)) * dmin[c];
    }
    offset<16>(b, 16 * g, scale, minimum, -1.0f, [q](int c, int i) { return static_cast<int>(q[c] >> shift_of(i, 2) & 3); });
  }
}
void q3_k(const Block& b) {
  float d[kMost], scale[kMost];
  float16(b, 0, d);
  const uint32_t *low[2] = {b.word(24), b.word(25)}, *top = b.word(26);
  for (int g = 0; g < 16; ++g) {
    const uint32_t *four = low[g / 4 & 1], *q = b.word(g), *high = b.word(16 + g / 2);
    const int byte = (g & 3) * 8, nibble = 4 * (g / 8), pair = 2 * (g / 4);
    for (int c = 0; c < b.n; ++c) {
      const uint32_t s = (four[c] >> (byte + nibble) & 15) | (top[c] >> (byte + pair) & 3) << 4;
      scale[c] = static_cast<float>(static_cast<int>(s) - 32) * d[c];
    }
    const int above = 4 * (g & 1);  // the third bits of items 16 (g & 1) .. of their word
    scaled<16>(b, 16 * g, scale, [q, high, above](int c, int i) {
      return static_cast<int>((q[c] >> shift_of(i, 2) & 3) | (high[c] >> ((i & 3) * 8 + above + (i >> 2)) & 1) << 2) - 4;
    });
  }
}
// 6-bit scale and minimum of group g of Q4_K and Q5_K, whose three words of scales begin at `w`.
void k_scales(const Block& b, int w, int g, const float* d, const float* dmin, float* scale, float* minimum) {
  const uint32_t *s = b.word(w), *m = b.word(w + 1), *high = b.word(w + 2);
  const int byte = (g & 3) * 8;
  for (int c = 0; c < b.n; ++c) {
    const uint32_t six = g < 4 ? s[c] >> byte & 63 : (high[c] >> byte & 15) | (s[c] >> (byte + 6) & 3) << 4;
    const uint32_t least = g < 4 ? m[c] >> byte & 63 : (high[c] >> (byte + 4) & 15) | (m[c] >> (byte + 6) & 3) << 4;
    scale[c] = static_cast<float>(static_cast<int>(six)) * d[c];
    minimum[c] = static_cast<float>(static_cast<int>(least)) * dmin[c];
  }
}
void q4_k(const Block& b) {
  float d[kMost], dmin[kMost], scale[kMost], minimum[kMost];
  float16(b, 0, d), float16(b, 1, dmin);
  for (int g = 0; g < 8; ++g) {
    k_scales(b, 32, g, d, dmin, scale, minimum);
    for (int w = 0; w < 4; ++w) {
      const uint32_t* q = b.word(4 * g + w);
      offset<8>(b, 32 * g + 8 * w, scale, minimum, -1.0f, [q](int c, int i) { return static_cast<int>(q[c] >> shift_of(i, 4) & 15); });
    }
  }
}
void q5_k(const Block& b) {
  float d[kMost], dmin[kMost], scale[kMost], minimum[kMost];
  float16(b, 0, d), float16(b, 1, dmin);
  for (int g = 0; g < 8; ++g) {
    k_scales(b, 40, g, d, dmin, scale, minimum);
    const uint32_t* high = b.word(32 + g);
    for (int w = 0; w < 4; ++w) {
      const uint32_t* q = b.word(4 * g + w);
      offset<8>(b, 32 * g + 8 * w, scale, minimum, -1.0f,
                [q, high, w](int c, int i) { return static_cast<int>(q[c] >> shift_of(i, 4) & 15) | fifth(high[c], w, i); });
    }
  }
}
void q6_k(const Block& b) {
  float d[kMost], scale[kMost];
  float16(b, 0, d);
  for (int g = 0; g < 16; ++g) {
    const uint32_t *packed = b.word(48 + g / 4), *high = b.word(32 + g);
    for (int c = 0; c < b.n; ++c) scale[c] = static_cast<float>(signed_byte(packed[c] >> (g & 3) * 8 & 255)) * d[c];
    for (int w = 0; w < 2; ++w) {
      const uint32_t* q = b.word(2 * g + w);
      scaled<8>(b, 16 * g + 8 * w, scale, [q, high, w](int c, int i) {
        return static_cast<int>((q[c] >> shift_of(i, 4) & 15) | (high[c] >> ((i & 3) * 8 + 4 * w + 2 * (i >> 2)) & 3) << 4) - 32;
      });
    }
  }
}
void iq4_xs(const Block& b) {
  float d[kMost], scale[kMost];
  float16(b, 0, d);
  const uint32_t* low = b.word(32);
  const uint16_t* high = b.half(1);
  for (int g = 0; g < 8; ++g) {
    for (int c = 0; c < b.n; ++c)
      scale[c] = static_cast<float>(static_cast<int>((low[c] >> 4 * g & 15) | (static_cast<uint32_t>(high[c]) >> 2 * g & 3) << 4) - 32) * d[c];
    for (int w = 0; w < 4; ++w) levels(b, 32 * g + 8 * w, b.word(4 * g + w), scale, kIq4Levels);
  }
}

}  // namespace

struct BlockType {
  const char* name;
  int block, words, halves;
  void (*unpack)(const Block&);
};

namespace {

constexpr BlockType kTypes[] = {
    {"Q4_0", 32, 4, 1, q4_0},       {"Q4_1", 32, 4, 2, q4_1},      {"Q5_0", 32, 5, 1, q5_0},      {"Q5_1", 32, 5, 2, q5_1},
    {"Q8_0", 32, 8, 1, q8_0},       {"IQ4_NL", 32, 4, 1, iq4_nl},  {"MXFP4", 64, 8, 1, mxfp4},    {"Q2_K", 256, 20, 2, q2_k},
    {"Q3_K", 256, 27, 1, q3_k},     {"Q4_K", 256, 35, 2, q4_k},    {"Q5_K", 256, 43, 2, q5_k},    {"Q6_K", 256, 52, 1, q6_k},
    {"IQ4_XS", 256, 33, 2, iq4_xs},
};

}  // namespace

const BlockType* block_type(const char* name) {
  for (const BlockType& type : kTypes)
    if (std::strcmp(type.name, name) == 0) return &type;
  return nullptr;
}
int64_t elements(const BlockType& type) { return type.block; }
int64_t words(const BlockType& type) { return type.words; }
int64_t halves(const BlockType& type) { return type.halves; }

void unpack(const PackedMatrix& b, int64_t k, int64_t length, int64_t column, int columns, float* to, int64_t stride) {
  const BlockType& type = *b.type;
  for (int64_t g = k / type.block; length > 0; ++g, length -= type.block, to += type.block * stride) {
    const auto* words = reinterpret_cast<const uint32_t*>(b.words) + g * b.words_block + column;
    // The next block's rows are pages apart: the hardware does not guess them.
    if (length > type.block)
      for (int w = 0; w < type.words; ++w)
        for (int c = 0; c < columns; c += 16) __builtin_prefetch(words + b.words_block + w * b.words_row + c);
    type.unpack({words, b.halves + g * b.halves_block + column, b.words_row, b.halves_row, columns, to, stride});
  }
}

}  // namespace kiln

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
