// Any bytes as a prompt, to a tokenizer of each kind: the ids are those of the definition done naively, and give the text back.
#include <functional>
#include <map>

#include "fuzz.h"
#include "text/pattern.h"
#include "text/utf8.h"
#include "vocabulary.h"

namespace {

using kiln::fuzz::Kind;
using kiln::fuzz::Vocabulary;
using Texts = std::vector<std::string>;

const std::string kSpace = "\xE2\x96\x81";

// Of all neighbours the pair of lowest rank, leftmost first, until there is none.
void join(Texts& parts, const std::function<size_t(const std::string&, const std::string&)>& rank) {
  for (;;) {
    size_t best = SIZE_MAX, place = 0;
    for (size_t i = 0; i + 1 < parts.size(); ++i)
      if (size_t found = rank(parts[i], parts[i + 1]); found < best) best = found, place = i;
    if (best == SIZE_MAX) return;
    parts[place] += parts[place + 1];
    parts.erase(parts.begin() + static_cast<ptrdiff_t>(place) + 1);
  }
}

size_t merge_rank(const Vocabulary& v, const std::string& left, const std::string& right) {
  static std::map<Kind, std::map<std::pair<std::string, std::string>, size_t>> all;
  auto& ranks = all[v.kind];
  if (ranks.empty())
    for (size_t i = 0; i < v.merges.size(); ++i)  // text alone never becomes a special token
      if (v.ids.at(v.merges[i].first + v.merges[i].second) >= v.special_ids()) ranks.emplace(v.merges[i], i);
  auto it = ranks.find({left, right});
  return it == ranks.end() ? SIZE_MAX : it->second;
}

// Where Qwen's pattern, read as it is written, ends a piece that begins at `at`.
size_t qwen_end(const std::vector<uint32_t>& text, size_t at) {
  static const kiln::Pattern letters("\\p{L}"), numbers("\\p{N}"), spaces("\\s");
  auto is = [&](const kiln::Pattern& what, size_t i) { return i < text.size() && what.match(&text[i], &text[i] + 1); };
  auto line_end = [&](size_t i) { return i < text.size() && (text[i] == '\r' || text[i] == '\n'); };
  auto other = [&](size_t i) { return i < text.size() && !is(letters, i) && !is(numbers, i) && !is(spaces, i); };
  auto one_of = [&](size_t i, uint32_t c) { return i < text.size() && (text[i] | 0x20) == c && text[i] < 0x80; };
  if (text[at] == '\'') {
    for (char c : {'s', 't', 'm', 'd'})
      if (one_of(at + 1, static_cast<uint8_t>(c)) || (c == 's' && at + 1 < text.size() && text[at + 1] == 0x17F)) return at + 2;
    for (const char* two : {"re", "ve", "ll"})
      if (one_of(at + 1, static_cast<uint8_t>(two[0])) && one_of(at + 2, static_cast<uint8_t>(two[1]))) return at + 3;
  }
  size_t end = at;
  if (!is(letters, end) && !is(numbers, end) && !line_end(end)) ++end;
  if (is(letters, end)) {
    while (is(letters, end)) ++end;
    return end;
  }
  if (is(numbers, at)) return at + 1;
  end = at + (text[at] == ' ');
  if (other(end)) {
    while (other(end)) ++end;
    while (line_end(end)) ++end;
    return end;
  }
  size_t run = at, last = at;  // of white space, and behind its last line end
  for (; is(spaces, run); ++run)
    if (line_end(run)) last = run + 1;
  if (last > at) return last;
  return run == text.size() || run == at + 1 ? run : run - 1;
}

void bytes(const Vocabulary& v, std::string_view text, std::vector<int64_t>& ids) {
  std::vector<uint32_t> characters;
  Texts spelled;  // by character
  for (size_t at = 0; at < text.size();) {
    auto step = kiln::utf8_step(text.substr(at));
    bool surrogate = kiln::is_surrogate(text.substr(at));
    size_t length = surrogate ? 3 : step.length;
    for (size_t i = 0; i < (surrogate || step.valid ? 1 : length); ++i) {
      characters.push_back(surrogate ? 0xD800 : step.valid ? step.code_point : 0xFFFD);
      spelled.push_back(surrogate || step.valid ? std::string(text.substr(at, length)) : "\xEF\xBF\xBD");
    }
    at += length;
  }
  for (size_t from = 0, to; from < characters.size(); from = to) {
    to = qwen_end(characters, from);
    Texts parts;
    for (size_t i = from; i < to; ++i)
      for (char c : spelled[i]) parts.push_back(Vocabulary::spelled(static_cast<uint8_t>(c)));
    join(parts, [&](const std::string& left, const std::string& right) { return merge_rank(v, left, right); });
    for (const std::string& part : parts)
      if (auto it = v.ids.find(part); it != v.ids.end()) ids.push_back(it->second);
  }
}

void emit(const Vocabulary& v, const Texts& parts, std::vector<int64_t>& ids) {
  for (const std::string& part : parts) {
    if (auto it = v.ids.find(part); it != v.ids.end() && it->second >= v.special_ids()) {
      ids.push_back(it->second);
      continue;
    }
    for (char c : part) ids.push_back(v.special_ids() + static_cast<uint8_t>(c));
  }
}

void spelled(const Vocabulary& v, std::string_view text, std::vector<int64_t>& ids) {
  for (size_t from = 0, to; from < text.size(); from = to) {
    to = from + 1;
    while (to < text.size() && (text[to] == '\n') == (text[from] == '\n')) ++to;
    Texts parts;
    for (size_t at = from; at < to;) {
      auto step = kiln::utf8_step(text.substr(at, to - at));
      std::string part(text.substr(at, step.length));
      parts.push_back(part == " " ? kSpace : part);
      at += step.length;
    }
    join(parts, [&](const std::string& left, const std::string& right) { return merge_rank(v, left, right); });
    emit(v, parts, ids);
  }
}

void scored(const Vocabulary& v, std::string_view text, std::vector<int64_t>& ids) {
  std::string plain;
  auto flush = [&] {
    std::string one_space;  // a literal U+2581 is a space, before characters are told apart
    for (size_t at = 0; at < plain.size();) {
      bool space = plain.compare(at, kSpace.size(), kSpace) == 0;
      one_space += space ? ' ' : plain[at];
      at += space ? kSpace.size() : 1;
    }
    Texts parts;
    for (size_t at = 0; at < one_space.size();) {
      auto step = kiln::utf8_step(std::string_view(one_space).substr(at));
      auto first = static_cast<uint8_t>(one_space[at]);
      size_t length = step.valid ? step.length : first < 0xC0 ? 1 : first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
      std::string part = one_space.substr(at, length);
      parts.push_back(part == " " ? kSpace : part);
      at += part.size();
    }
    join(parts, [&](const std::string& left, const std::string& right) {
      auto it = v.ids.find(left + right);
      bool byte = it != v.ids.end() && it->second < v.special_ids() + 256;
      return it == v.ids.end() || byte ? SIZE_MAX : static_cast<size_t>(v.rank(it->second));
    });
    emit(v, parts, ids);
    plain.clear();
  };
  for (size_t at = 0; at < text.size();) {
    const std::string* best = nullptr;
    for (const std::string& s : v.anywhere)
      if (text.substr(at, s.size()) == s && (!best || s.size() > best->size())) best = &s;
    if (!best) {
      plain += text[at++];
      continue;
    }
    flush();
    ids.push_back(v.ids.at(*best));
    at += best->size();
  }
  flush();
}

void check(Kind kind, std::string_view text) {
  using namespace kiln;
  const Vocabulary& v = Vocabulary::get(kind);
  const Tokenizer& tokenizer = Vocabulary::tokenizer(kind);
  std::vector<int64_t> ids = tokenizer.encode(text, ParseSpecial::None, false), naive;
  if (text.size() <= 200) {
    (kind == Kind::Spelled ? spelled : kind == Kind::Bytes ? bytes : scored)(v, text, naive);
    fuzz::demand(ids == naive, "encoding as it is defined");
  }
  std::string bytes = v.kept(text);
  std::string whole = utf8_take(bytes, true), streamed;
  fuzz::demand(tokenizer.decode(ids) == whole, "a text comes back");
  StreamDecoder stream(tokenizer);
  for (int64_t id : ids) streamed += stream.push(id);
  fuzz::demand(streamed + stream.finish() == whole, "a stream of pieces is the whole");
  std::string again = whole;
  fuzz::demand(utf8_take(again, false) == whole && again.empty(), "what was made UTF-8 is");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace kiln;
  std::string_view text = fuzz::text(data, size);
  for (Kind kind : fuzz::kKinds) check(kind, text);
  std::string_view inner = trim(text);
  fuzz::demand(inner.empty() || (inner.data() >= text.data() && inner.data() + inner.size() <= text.data() + text.size()), "trim stays inside");
  fuzz::demand(trim(inner) == inner, "trim is done");
  fuzz::demand(one_line(one_line(std::string(text))) == one_line(std::string(text)), "one line is one line");
  return 0;
}
