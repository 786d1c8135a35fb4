// Any bytes as a prompt: the ids are those of byte pair encoding done naively, and give the text back.
#include "fuzz.h"
#include "text/utf8.h"
#include "vocabulary.h"

namespace {

using kiln::fuzz::Vocabulary;

const std::string kSpace = "\xE2\x96\x81";

// The definition: of all neighbours the pair of lowest rank, leftmost first, until there is none.
std::vector<int64_t> naive(std::string_view text) {
  const Vocabulary& v = Vocabulary::get();
  std::vector<int64_t> ids;
  static const std::map<std::pair<std::string, std::string>, size_t> ranks = [&v] {
    std::map<std::pair<std::string, std::string>, size_t> made;
    for (size_t i = 0; i < v.merges.size(); ++i)  // text alone never becomes a special token
      if (v.ids.at(v.merges[i].first + v.merges[i].second) >= static_cast<int64_t>(v.specials.size())) made.emplace(v.merges[i], i);
    return made;
  }();
  for (size_t from = 0, to; from < text.size(); from = to) {
    to = from + 1;
    while (to < text.size() && (text[to] == '\n') == (text[from] == '\n')) ++to;
    std::vector<std::string> parts;
    for (size_t at = from; at < to;) {
      auto step = kiln::utf8_step(text.substr(at, to - at));
      std::string part(text.substr(at, step.length));
      parts.push_back(part == " " ? kSpace : part);
      at += step.length;
    }
    for (;;) {
      size_t best = SIZE_MAX, place = 0;
      for (size_t i = 0; i + 1 < parts.size(); ++i)
        if (auto it = ranks.find({parts[i], parts[i + 1]}); it != ranks.end() && it->second < best) best = it->second, place = i;
      if (best == SIZE_MAX) break;
      parts[place] += parts[place + 1];
      parts.erase(parts.begin() + static_cast<ptrdiff_t>(place) + 1);
    }
    for (const std::string& part : parts) {
      if (auto it = v.ids.find(part); it != v.ids.end()) {
        ids.push_back(it->second);
        continue;
      }
      for (char c : part) ids.push_back(static_cast<int64_t>(v.specials.size()) + static_cast<uint8_t>(c));
    }
  }
  return ids;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace kiln;
  std::string_view text = fuzz::text(data, size);
  const Tokenizer& tokenizer = Vocabulary::tokenizer();
  std::vector<int64_t> ids = tokenizer.encode(text, ParseSpecial::None, false);
  if (size <= 200) fuzz::demand(ids == naive(text), "byte pair encoding as it is defined");

  std::string bytes(text), want;
  for (size_t at = 0; (at = bytes.find(kSpace, at)) != std::string::npos;) bytes.replace(at, kSpace.size(), " ");
  std::string whole = utf8_take(bytes, true), streamed;
  fuzz::demand(tokenizer.decode(ids) == whole, "a text comes back");
  StreamDecoder stream(tokenizer);
  for (int64_t id : ids) streamed += stream.push(id);
  fuzz::demand(streamed + stream.finish() == whole, "a stream of pieces is the whole");
  std::string again = whole;
  fuzz::demand(utf8_take(again, false) == whole && again.empty(), "what was made UTF-8 is");

  std::string_view inner = trim(text);
  fuzz::demand(inner.empty() || (inner.data() >= text.data() && inner.data() + inner.size() <= text.data() + text.size()), "trim stays inside");
  fuzz::demand(trim(inner) == inner, "trim is done");
  fuzz::demand(one_line(one_line(std::string(text))) == one_line(std::string(text)), "one line is one line");
  return 0;
}
