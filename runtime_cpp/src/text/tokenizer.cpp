#include "kiln/tokenizer.h"

#include <algorithm>
#include <functional>

#include "artifact/file.h"
#include "text/utf8.h"
#include "text/vocabulary.h"

namespace kiln {

namespace {

constexpr uint64_t kMaxText = 1'000'000'000;  // of a tokenizer.json
constexpr int32_t kUnknown = -1, kMerged = -2;  // symbol states beside ids
constexpr std::string_view kReplacement = "\xEF\xBF\xBD";

// Text with what replaces a token's text undone, and where a tokenizer knows only characters, U+FFFD for each byte that is none.
std::string characters_only(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  while (!text.empty()) {
    Utf8Step step = utf8_step(text);
    size_t length = is_surrogate(text) ? 3 : step.length;
    if (step.valid || is_surrogate(text))
      out += text.substr(0, length);
    else
      for (size_t i = 0; i < length; ++i) out += kReplacement;
    text.remove_prefix(length);
  }
  return out;
}

// The length of a character that begins with this byte, 1 for a byte that cannot begin one.
uint32_t announced(char first) {
  auto b = static_cast<uint8_t>(first);
  return b < 0xC0 ? 1 : b < 0xE0 ? 2 : b < 0xF0 ? 3 : 4;
}

class Encoding {
 public:
  Encoding(const Vocabulary& vocabulary, std::vector<int64_t>& ids) : v_(vocabulary), ids_(ids) {}

  // A text without special tokens, which begins the whole or follows one.
  void plain(std::string_view text) {
    if (text.empty()) return;
    if (text.size() > INT32_MAX) fail("a text of ", text.size(), " bytes is too long to tokenize");
    std::string spelled;
    if (!v_.bytewise && (v_.space_prefix || text.find(kSpace) != std::string_view::npos)) {
      if (v_.space_prefix) spelled = " ";
      for (size_t at = 0; at < text.size();) {
        bool space = text.substr(at, kSpace.size()) == kSpace;
        spelled += space ? ' ' : text[at];
        at += space ? kSpace.size() : 1;
      }
      text = spelled;
    }
    for (std::string_view piece : isolated(v_.split, text)) run(piece);
  }

 private:
  struct Symbol {
    int32_t id;
    int32_t prev, next;       // -1: none
    uint32_t offset, length;  // bytes of the run
  };
  struct Join {
    uint32_t rank;
    int32_t id;
  };

  // What a symbol and the next become, false: they stay apart.
  bool join(std::string_view run, const Symbol& a, const Symbol& b, Join& out) const {
    if (v_.scored) {
      int32_t id = v_.find(run.substr(a.offset, a.length + b.length));
      if (id >= 0) out = {v_.ranks[static_cast<size_t>(id)], id};
      return id >= 0;
    }
    const Vocabulary::Merge* merge = v_.find_merge(a.id, b.id);
    if (merge) out = {merge->rank, merge->id};
    return merge;
  }

  // Byte pair encoding of a run: symbols in a linked list, candidates in a heap by (rank, position). O(n log n).
  void run(std::string_view run) {
    if (v_.whole) {
      if (int32_t id = v_.find(run); id >= 0) {
        ids_.push_back(id);
        return;
      }
    }
    symbols_.clear();
    for (size_t at = 0; at < run.size();) {
      Utf8Step step = v_.bytewise ? Utf8Step{0, 1, true, false} : utf8_step(run.substr(at));
      // What is not UTF-8 has as many bytes as its first announces, as in SentencePiece.
      if (!step.valid && v_.scored) step.length = static_cast<uint32_t>(std::min<size_t>(announced(run[at]), run.size() - at));
      auto i = static_cast<int32_t>(symbols_.size());
      symbols_.push_back({step.valid ? v_.find(run.substr(at, step.length)) : kUnknown, i - 1, i + 1, static_cast<uint32_t>(at), step.length});
      at += step.length;
    }
    symbols_.back().next = -1;

    heap_.clear();
    Join found{};
    auto offer = [&](int32_t left) {
      if (left < 0 || symbols_[left].next < 0 || !join(run, symbols_[left], symbols_[symbols_[left].next], found)) return;
      heap_.push_back(static_cast<uint64_t>(found.rank) << 32 | static_cast<uint32_t>(left));
      std::push_heap(heap_.begin(), heap_.end(), std::greater<>());
    };
    for (size_t i = 0; i + 1 < symbols_.size(); ++i) offer(static_cast<int32_t>(i));
    while (!heap_.empty()) {
      uint64_t top = heap_.front();
      std::pop_heap(heap_.begin(), heap_.end(), std::greater<>());
      heap_.pop_back();
      auto left = static_cast<int32_t>(top & UINT32_MAX);
      Symbol& a = symbols_[left];
      if (a.id == kMerged || a.next < 0) continue;
      Symbol& b = symbols_[a.next];
      if (!join(run, a, b, found) || found.rank != top >> 32) continue;  // an older candidate: one of the two has changed since
      a.id = found.id;
      a.length += b.length;
      b.id = kMerged;
      a.next = b.next;
      if (a.next >= 0) symbols_[a.next].prev = left;
      offer(a.prev);
      offer(left);
    }

    for (int32_t i = 0; i >= 0; i = symbols_[i].next) {
      const Symbol& s = symbols_[i];
      if (s.id >= 0)
        ids_.push_back(s.id);
      else if (!v_.bytewise)  // a byte that the vocabulary of the other kind lacks has no token at all
        for (char c : run.substr(s.offset, s.length)) ids_.push_back(v_.bytes[static_cast<uint8_t>(c)]);
    }
  }

  const Vocabulary& v_;
  std::vector<int64_t>& ids_;
  std::vector<Symbol> symbols_;
  std::vector<uint64_t> heap_;
};

}  // namespace

Tokenizer Tokenizer::load(const std::string& path) { return parse(read_file(path, kMaxText), path); }

Tokenizer Tokenizer::parse(std::string json, const std::string& name) {
  Tokenizer made;
  made.vocabulary_ = Vocabulary::parse(std::move(json), name);
  return made;
}

int64_t Tokenizer::size() const { return static_cast<int64_t>(vocabulary_->pieces.size()); }
int64_t Tokenizer::bos() const { return vocabulary_->bos; }

std::vector<int64_t> Tokenizer::encode(std::string_view text, ParseSpecial parse, bool add_bos, bool add_eos) const {
  std::vector<int64_t> ids = encode_segments({{text, parse}}, add_bos);
  if (int64_t eos = vocabulary_->eos; add_eos && eos >= 0 && (ids.empty() || ids.back() != eos)) ids.push_back(eos);
  return ids;
}

std::vector<int64_t> Tokenizer::encode_chat(std::string_view prefix, std::string_view user, std::string_view suffix, bool trimmed) const {
  std::string_view text = trimmed ? trim(user) : user;
  return encode_segments({{prefix, ParseSpecial::All}, {text, ParseSpecial::None}, {suffix, ParseSpecial::All}}, true);
}

std::vector<int64_t> Tokenizer::encode_segments(const std::vector<Segment>& segments, bool add_bos) const {
  const Vocabulary& v = *vocabulary_;
  std::string text;  // of all: ordinary text, and tokens that are cut out of any, may run on from one segment to the next
  std::vector<std::pair<size_t, ParseSpecial>> ends;
  for (const auto& [part, parse] : segments) {
    text += v.bytewise ? characters_only(part) : std::string(part);
    ends.emplace_back(text.size(), parse);
  }
  std::string_view whole = text;
  std::vector<int64_t> ids;
  Encoding encoding(v, ids);
  size_t from = 0, at = 0;  // what has no token yet begins; where a special token is looked for
  for (const auto& [end, parse] : ends) {
    bool all = parse == ParseSpecial::All;
    while (at < end) {
      auto first = static_cast<uint8_t>(whole[at]);
      const Vocabulary::Special* found = nullptr;
      size_t taken = 0;
      if (all || v.anywhere[first]) {
        for (size_t length : v.lengths[first]) {
          auto known = v.specials.find(whole.substr(at, length));
          if (known == v.specials.end() || !(known->second.anywhere || (all && at + length <= end))) continue;
          found = &known->second;
          taken = known->first.size();
          break;
        }
      }
      if (!found) {
        ++at;
        continue;
      }
      encoding.plain(whole.substr(from, at - from));
      ids.push_back(found->id);
      from = at += taken;
    }
  }
  encoding.plain(whole.substr(from));
  if (add_bos && v.bos >= 0 && (ids.empty() || ids[0] != v.bos)) ids.insert(ids.begin(), v.bos);
  return ids;
}

std::string_view Tokenizer::piece(int64_t id, bool skip_special) const {
  if (id < 0 || id >= size()) fail("token id ", id, " is outside of the vocabulary of ", size());
  return skip_special && vocabulary_->pieces[static_cast<size_t>(id)].control ? std::string_view() : vocabulary_->piece(id);
}

std::string Tokenizer::decode(const std::vector<int64_t>& ids, bool skip_special) const {
  std::string bytes;
  for (int64_t id : ids) bytes += piece(id, skip_special);
  if (vocabulary_->space_prefix && !bytes.empty() && bytes[0] == ' ') bytes.erase(0, 1);
  return utf8_take(bytes, true);
}

std::string StreamDecoder::push(int64_t id) {
  pending_ += tokenizer_->piece(id, skip_special_);
  return utf8_take(pending_, false);
}

std::string StreamDecoder::finish() { return utf8_take(pending_, true); }

}  // namespace kiln
