#pragma once
#include <cstdint>
#include <string_view>
#include <vector>

namespace kiln {

// A regular expression of a pre-tokenizer, of the few forms that exporter/text/pattern.py lists: alternatives of character classes with
// greedy repeats. Matching backs up through them.
class Pattern {
 public:
  // Throws Error on what is of another form.
  explicit Pattern(std::string_view text);

  // How many of the code points [at, end) it matches, 0: none. One that is not a character, as in text that is not UTF-8, is in no class.
  size_t match(const uint32_t* at, const uint32_t* end) const;

 private:
  friend class PatternParser;
  struct Class {
    uint8_t properties = 0;  // of exporter/text/unicode.def, a bit each
    bool negated = false;
    std::vector<std::pair<uint32_t, uint32_t>> ranges;
    bool has(uint32_t code_point) const;
  };
  struct Item {
    Class what;
    uint32_t least = 1, most = 1;
    bool barred = false;  // `(?!X)`: no such character follows, and none is taken
  };
  using Alternative = std::vector<Item>;
  static const uint32_t* match(const Alternative& items, size_t from, const uint32_t* at, const uint32_t* end);

  std::vector<Alternative> alternatives_;
};

// The pieces of a text: what each pattern matches and what lies between, pattern after pattern.
std::vector<std::string_view> isolated(const std::vector<Pattern>& patterns, std::string_view text);

}  // namespace kiln
