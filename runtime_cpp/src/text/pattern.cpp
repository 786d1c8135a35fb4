#include "text/pattern.h"

#include <algorithm>

#include "kiln/error.h"
#include "text/utf8.h"

namespace kiln {

namespace {

constexpr uint32_t kCodePoints = 0x110000, kEndless = UINT32_MAX;
constexpr size_t kMostRepeats = 4;  // in one alternative: matching takes as many nested loops
enum Property : uint8_t { LETTER = 1, NUMBER = 2, MARK = 4, SPACE = 8 };

struct Range {
  Property property;
  uint32_t first, last;
};
constexpr Range kRanges[] = {
#define RANGE(property, first, last) {property, first, last},
#include "unicode.def"
#undef RANGE
};

const std::vector<uint8_t>& properties() {
  static const std::vector<uint8_t> table = [] {
    std::vector<uint8_t> made(kCodePoints);
    for (const Range& range : kRanges)
      for (uint32_t c = range.first; c <= range.last; ++c) made[c] |= range.property;
    return made;
  }();
  return table;
}

// As utf8_step, and a surrogate is a character.
Utf8Step character(std::string_view text) {
  Utf8Step step = utf8_step(text);
  if (is_surrogate(text)) step = {0xD000u | (text[1] & 0x3F) << 6 | (text[2] & 0x3F), 3, true, false};
  if (!step.valid) step.code_point = kCodePoints;
  return step;
}

}  // namespace

class PatternParser {
 public:
  PatternParser(std::string_view text, std::vector<Pattern::Alternative>& out) : text_(text), out_(out) {}

  void parse() {
    do {
      bool group = take("(?:"), folded = !group && take("(?i:");
      if (!group && !folded) {
        alternative(false);
        continue;
      }
      do alternative(folded);
      while (take("|"));
      if (!take(")")) refuse("')' is missing");
    } while (take("|"));
    if (!text_.empty()) refuse("this cannot stand here");
  }

 private:
  using Class = Pattern::Class;

  [[noreturn]] void refuse(const char* why) const { fail("a pattern is not of the kind that this runner reads, before '", text_.substr(0, 40), "': ", why); }

  bool take(std::string_view token) {
    if (text_.substr(0, token.size()) != token) return false;
    text_.remove_prefix(token.size());
    return true;
  }

  uint32_t code_point() {
    if (text_.empty()) refuse("it ends too early");
    Utf8Step step = utf8_step(text_);
    if (!step.valid) refuse("it is not UTF-8");
    text_.remove_prefix(step.length);
    return step.code_point;
  }

  static void add(Class& to, uint32_t first, uint32_t last, bool folded) {
    to.ranges.emplace_back(first, last);
    if (!folded || first != last) return;
    uint32_t other = first ^ 0x20;
    if ((first >= 'a' && first <= 'z') || (first >= 'A' && first <= 'Z')) to.ranges.emplace_back(other, other);
    if (first == 's' || first == 'S') to.ranges.emplace_back(0x17F, 0x17F);    // long s
    if (first == 'k' || first == 'K') to.ranges.emplace_back(0x212A, 0x212A);  // Kelvin
  }

  // A character, its code point; a class of its own goes to `to`, -1.
  int64_t unit(Class& to, bool inside) {
    uint32_t c = code_point();
    if (c != '\\') {
      if (!inside && c < 0x80 && std::string_view("()[]{}?*+|^$.").find(static_cast<char>(c)) != std::string_view::npos) refuse("the character before it has a meaning");
      return c;
    }
    c = code_point();
    if (c == 'r') return '\r';
    if (c == 'n') return '\n';
    if (c == 't') return '\t';
    if (c == 's') {
      to.properties |= SPACE;
    } else if (c == 'S' && !inside) {
      to.properties |= SPACE;
      to.negated = true;
    } else if (c == 'p') {
      if (take("{L}"))
        to.properties |= LETTER;
      else if (take("{N}"))
        to.properties |= NUMBER;
      else if (take("{M}"))
        to.properties |= MARK;
      else
        refuse("the property is not L, N or M");
    } else {
      if (c >= 0x80 || (c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z')) refuse("this escape is not known");
      return c;
    }
    return -1;
  }

  Class one(bool folded) {
    Class found;
    if (!take("[")) {
      if (int64_t c = unit(found, false); c >= 0) add(found, static_cast<uint32_t>(c), static_cast<uint32_t>(c), folded);
      return found;
    }
    found.negated = take("^");
    while (!take("]")) {
      int64_t first = unit(found, true);
      if (first < 0) continue;
      int64_t last = first;
      if (text_.size() > 1 && text_[0] == '-' && text_[1] != ']') {
        take("-");
        last = unit(found, true);
        if (last < first) refuse("a range ends before it begins");
      }
      add(found, static_cast<uint32_t>(first), static_cast<uint32_t>(last), folded);
    }
    return found;
  }

  uint32_t number() {
    uint32_t n = 0;
    size_t digits = 0;
    for (; digits < text_.size() && digits < 5 && text_[digits] >= '0' && text_[digits] <= '9'; ++digits) n = n * 10 + static_cast<uint32_t>(text_[digits] - '0');
    if (!digits || n > 1000) refuse("a number from 0 to 1000 was expected");
    text_.remove_prefix(digits);
    return n;
  }

  void repeat(Pattern::Item& item) {
    if (take("?")) {
      item.least = 0;
    } else if (take("*")) {
      item.least = 0, item.most = kEndless;
    } else if (take("+")) {
      item.most = kEndless;
    } else if (take("{")) {
      item.least = item.most = number();
      if (take(",")) item.most = number();
      if (!take("}") || item.most < item.least) refuse("a repeat is {m} or {m,n}");
    }
  }

  void alternative(bool folded) {
    Pattern::Alternative items;
    size_t repeats = 0;
    while (!text_.empty() && text_[0] != '|' && text_[0] != ')') {
      Pattern::Item item;
      item.barred = take("(?!");
      item.what = one(folded);
      if (item.barred) {
        if (!take(")")) refuse("after '(?!' stands one character or class");
      } else {
        repeat(item);
      }
      if ((repeats += item.least != item.most) > kMostRepeats) refuse("an alternative has too many repeats");
      items.push_back(std::move(item));
    }
    bool takes = false;
    for (const Pattern::Item& item : items) takes = takes || (item.least && !item.barred);
    if (!takes) refuse("an alternative may match nothing");
    out_.push_back(std::move(items));
  }

  std::string_view text_;
  std::vector<Pattern::Alternative>& out_;
};

Pattern::Pattern(std::string_view text) { PatternParser(text, alternatives_).parse(); }

bool Pattern::Class::has(uint32_t c) const {
  bool found = properties && c < kCodePoints && (properties & kiln::properties()[c]);
  for (const auto& [first, last] : ranges) found = found || (c >= first && c <= last);
  return found != negated;
}

const uint32_t* Pattern::match(const Alternative& items, size_t from, const uint32_t* at, const uint32_t* end) {
  if (from == items.size()) return at;
  const Item& item = items[from];
  if (item.barred) return at < end && item.what.has(*at) ? nullptr : match(items, from + 1, at, end);
  const uint32_t* last = at;
  while (last < end && static_cast<size_t>(last - at) < item.most && item.what.has(*last)) ++last;
  for (; last - at >= static_cast<ptrdiff_t>(item.least); --last)
    if (const uint32_t* found = match(items, from + 1, last, end)) return found;
  return nullptr;
}

size_t Pattern::match(const uint32_t* at, const uint32_t* end) const {
  for (const Alternative& items : alternatives_)
    if (const uint32_t* found = match(items, 0, at, end)) return static_cast<size_t>(found - at);
  return 0;
}

std::vector<std::string_view> isolated(const std::vector<Pattern>& patterns, std::string_view text) {
  if (patterns.empty()) return {text};
  std::vector<uint32_t> code_points;
  std::vector<size_t> offsets;
  code_points.reserve(text.size());
  offsets.reserve(text.size() + 1);
  for (size_t at = 0; at < text.size();) {
    Utf8Step step = character(text.substr(at));
    code_points.push_back(step.code_point);
    offsets.push_back(at);
    at += step.length;
  }
  offsets.push_back(text.size());

  std::vector<size_t> ends = {code_points.size()}, cut;  // of the pieces, in code points
  for (const Pattern& pattern : patterns) {
    size_t from = 0;
    for (size_t end : ends) {
      size_t between = from;  // where what has not been matched begins
      for (size_t at = from; at < end;) {
        size_t length = pattern.match(&code_points[at], &code_points[0] + end);
        if (!length) {
          ++at;
          continue;
        }
        if (between < at) cut.push_back(at);
        cut.push_back(between = at += length);
      }
      if (between < end) cut.push_back(end);
      from = end;
    }
    ends.swap(cut);
    cut.clear();
  }
  std::vector<std::string_view> pieces;
  pieces.reserve(ends.size());
  size_t from = 0;
  for (size_t end : ends) {
    if (from < end) pieces.push_back(text.substr(offsets[from], offsets[end] - offsets[from]));
    from = end;
  }
  return pieces;
}

}  // namespace kiln
