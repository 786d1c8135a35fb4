#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "text/pattern.h"

namespace kiln {

constexpr std::string_view kSpace = "\xE2\x96\x81";  // U+2581, stands for " " in a vocabulary that does not spell bytes

// A tokenizer.json in the form that encoding needs. Texts are as they decode: a space is " ", a byte a byte.
struct Vocabulary {
  struct Piece {
    uint32_t offset = 0, length = 0;  // into text
    bool control = false;
  };
  struct Special {
    int32_t id = 0;
    bool anywhere = false;  // cut out of any text, not only of markup
  };
  struct Merge {
    uint64_t pair = UINT64_MAX;  // left id << 32 | right id
    uint32_t rank = 0;
    int32_t id = 0;
  };

  bool bytewise = false;      // merges begin with bytes, else with characters
  bool scored = false;        // neighbours are joined where their text is a token, by `ranks`; else by `merges`
  bool whole = false;         // a piece that is a token is not merged
  bool space_prefix = false;  // of a text at the start or behind a special token
  int64_t bos = -1, eos = -1;  // what goes in front of a text and behind it, -1: nothing
  std::vector<Pattern> split;

  std::string text;                // of all pieces
  std::vector<Piece> pieces;       // by id
  std::vector<uint32_t> ranks;     // by id
  int32_t bytes[256];              // byte -> id of its token, -1: absent
  std::unordered_map<std::string_view, Special> specials;
  std::vector<size_t> lengths[256];  // of specials by first byte, longest first
  bool anywhere[256] = {};           // some special that begins so is cut out of any text

  std::string_view piece(int64_t id) const {
    const Piece& p = pieces[static_cast<size_t>(id)];
    return std::string_view(text).substr(p.offset, p.length);
  }
  int32_t find(std::string_view text) const;  // the ordinary token with this text, -1: none
  const Merge* find_merge(int32_t left, int32_t right) const;

  // Throws Error that begins with `name` when the text is not a tokenizer.json of the kinds that the exporter writes.
  static std::shared_ptr<const Vocabulary> parse(std::string json, const std::string& name);

 private:
  friend class VocabularyReader;
  void add_merge(int32_t left, int32_t right, uint32_t rank, int32_t id);
  void add_text(int32_t id);

  std::vector<Merge> merges_;   // open addressing, a power of two
  std::vector<int32_t> table_;  // the same, ids of ordinary tokens by their text
};

}  // namespace kiln
