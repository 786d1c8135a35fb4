#include "kiln/tokenizer.h"

#include <algorithm>
#include <cstring>
#include <queue>
#include <unordered_map>

#include "artifact/file.h"
#include "kiln/json.h"
#include "text/utf8.h"

namespace kiln {

namespace {

constexpr std::string_view kSpace = "\xE2\x96\x81";  // U+2581, stands for " " in the vocabulary
constexpr uint32_t kSpaceCodePoint = 0x2581;
constexpr uint64_t kMaxText = 1'000'000'000;  // of a tokenizer.json
constexpr int32_t kUnknown = -1, kMerged = -2;  // symbol states beside ids

uint64_t pair_key(int32_t left, int32_t right) { return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right); }

// The byte of a token text "<0xHH>", -1 for any other text.
int byte_of(std::string_view text) {
  if (text.size() != 6 || text.substr(0, 3) != "<0x" || text[5] != '>') return -1;
  int value = 0;
  for (char c : text.substr(3, 2)) {
    if (c >= '0' && c <= '9')
      value = value * 16 + (c - '0');
    else if (c >= 'A' && c <= 'F')
      value = value * 16 + (c - 'A' + 10);
    else
      return -1;
  }
  return value;
}

// Refuses what this class does not implement: another normalizer would give other ids without any error.
void check_kind(const Json& root) {
  const Json& model = root.at("model");
  if (model.at("type").as_string() != "BPE") fail("model.type is '", model.at("type").as_string(), "', this runner reads BPE");
  if (!model.at("byte_fallback").as_bool()) fail("model.byte_fallback is off, this runner needs it");
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix", "dropout"})
    if (const Json* v = model.find(key); v && !v->is_null()) fail("model.", key, " is not supported");
  if (const Json* v = model.find("ignore_merges"); v && v->as_bool()) fail("model.ignore_merges is not supported");
  const Json& normalizer = root.at("normalizer");
  if (normalizer.is_null() || normalizer.at("type").as_string() != "Replace" || normalizer.at("pattern").at("String").as_string() != " " ||
      normalizer.at("content").as_string() != kSpace)
    fail("the normalizer is not Replace \" \" -> \"", kSpace, "\"");
  const Json& split = root.at("pre_tokenizer");
  if (split.is_null() || split.at("type").as_string() != "Split" || split.at("pattern").at("Regex").as_string() != "\n+" ||
      split.at("behavior").as_string() != "Isolated")
    fail("the pre-tokenizer is not a Split on runs of newlines");
}

int64_t bos_of(const Json& root) {
  const Json* processor = root.find("post_processor");
  if (!processor || processor->is_null()) return -1;
  if (processor->at("type").as_string() != "TemplateProcessing") fail("the post-processor is not a TemplateProcessing");
  const Json& first = processor->at("single")[0];
  const Json* special = first.find("SpecialToken");
  if (!special) return -1;
  return processor->at("special_tokens").at(special->at("id").as_string()).at("ids")[0].as_int();
}

}  // namespace

Tokenizer Tokenizer::load(const std::string& path) { return parse(read_file(path, kMaxText), path); }

Tokenizer Tokenizer::parse(std::string json, const std::string& name) {
  JsonDocument doc(std::move(json), name);
  Tokenizer t;
  try {
    const Json& root = doc.root();
    check_kind(root);
    const Json& vocab = root.at("model").at("vocab");
    const Json& added = root.at("added_tokens");
    size_t n = vocab.size();
    for (const Json& token : added) {
      if (token.at("id").as_int() < 0) fail("an added token has id ", token.at("id").as_int());
      n = std::max(n, static_cast<size_t>(token.at("id").as_int()) + 1);
    }
    for (size_t i = 0; i < vocab.size(); ++i) n = std::max(n, static_cast<size_t>(std::max<int64_t>(vocab.value(i).as_int(), -1)) + 1);
    // Ids whose text a lower id has: they decode to it, and no text encodes to them.
    const Json* duplicates = root.at("model").find("duplicates");
    size_t twice = duplicates ? duplicates->size() : 0;
    for (size_t i = 0; i < twice; ++i) {
      int64_t id = (*duplicates)[i].at("id").as_int();
      if (id < 0) fail("a duplicate token has id ", id);
      n = std::max(n, static_cast<size_t>(id) + 1);
    }
    if (n > vocab.size() + added.size() + twice) fail("the token ids have gaps: ", vocab.size(), " tokens, the largest id is ", n - 1);

    std::vector<std::string_view> texts(n);
    std::unordered_map<std::string_view, int32_t> ids;
    ids.reserve(n);
    for (size_t i = 0; i < vocab.size(); ++i) {
      int64_t id = vocab.value(i).as_int();
      if (id < 0 || static_cast<size_t>(id) >= n) fail("token '", vocab.key(i), "' has id ", id, ", the vocabulary has ", n, " tokens");
      if (texts[static_cast<size_t>(id)].data()) fail("two tokens have the id ", id);
      texts[static_cast<size_t>(id)] = vocab.key(i);
      ids[vocab.key(i)] = static_cast<int32_t>(id);
    }
    std::vector<bool> is_special(n);
    t.pieces_.resize(n);
    for (const Json& token : added) {
      auto id = static_cast<size_t>(token.at("id").as_int());
      std::string_view text = token.at("content").as_string();
      if (text.empty()) fail("added token ", id, " has no text");
      texts[id] = text;
      is_special[id] = true;
      t.pieces_[id].control = token.at("special").as_bool();
      t.specials_[static_cast<uint8_t>(text[0])].push_back({std::string(text), static_cast<int32_t>(id)});
    }
    for (size_t i = 0; i < twice; ++i) {
      const Json& token = (*duplicates)[i];
      auto id = static_cast<size_t>(token.at("id").as_int());
      if (texts[id].data()) fail("two tokens have the id ", id);
      texts[id] = token.at("content").as_string();
      t.pieces_[id].control = token.at("special").as_bool();
    }
    for (auto& list : t.specials_)
      std::sort(list.begin(), list.end(), [](const Special& a, const Special& b) { return a.text.size() > b.text.size(); });

    std::fill(std::begin(t.bytes_), std::end(t.bytes_), kUnknown);
    t.code_points_.assign(0x110000, kUnknown);
    for (size_t id = 0; id < n; ++id) {
      std::string_view text = texts[id];
      Piece& piece = t.pieces_[id];
      piece.offset = static_cast<uint32_t>(t.text_.size());
      int byte = byte_of(text);
      if (is_special[id]) {
        t.text_ += text;
      } else if (byte >= 0) {
        if (t.bytes_[byte] == kUnknown) t.bytes_[byte] = static_cast<int32_t>(id);
        t.text_ += static_cast<char>(byte);
      } else {
        if (!text.empty()) {
          Utf8Step step = utf8_step(text);
          if (step.valid && step.length == text.size() && t.code_points_[step.code_point] == kUnknown)
            t.code_points_[step.code_point] = static_cast<int32_t>(id);
        }
        for (size_t at = 0; at < text.size();) {
          bool space = text.substr(at, kSpace.size()) == kSpace;
          t.text_ += space ? ' ' : text[at];
          at += space ? kSpace.size() : 1;
        }
      }
      piece.length = static_cast<uint32_t>(t.text_.size() - piece.offset);
    }
    for (int b = 0; b < 256; ++b)
      if (t.bytes_[b] == kUnknown) fail("the vocabulary has no token for byte ", b);

    const Json& merges = root.at("model").at("merges");
    size_t slots = 64;
    while (slots < 2 * merges.size()) slots *= 2;
    t.merges_.resize(slots);
    std::string joined;
    for (size_t rank = 0; rank < merges.size(); ++rank) {
      std::string_view left = merges[rank][0].as_string(), right = merges[rank][1].as_string();
      joined.assign(left).append(right);
      auto l = ids.find(left), r = ids.find(right), j = ids.find(joined);
      if (l == ids.end() || r == ids.end() || j == ids.end()) fail("merge ", rank, " ('", left, "' '", right, "') names a token that is not in the vocabulary");
      // Text alone must never become a special token.
      if (!is_special[static_cast<size_t>(j->second)]) t.add_merge(l->second, r->second, static_cast<uint32_t>(rank), j->second);
    }
    t.bos_ = bos_of(root);
    if (t.bos_ >= t.size()) fail("the BOS id is ", t.bos_, ", the vocabulary has ", n, " tokens");
  } catch (const Error& e) {
    fail(name, ": ", e.what());
  }
  return t;
}

void Tokenizer::add_merge(int32_t left, int32_t right, uint32_t rank, int32_t id) {
  uint64_t key = pair_key(left, right), mask = merges_.size() - 1;
  uint64_t slot = (key * 0x9E3779B97F4A7C15ull) >> 32 & mask;
  while (merges_[slot].pair != UINT64_MAX) {
    if (merges_[slot].pair == key) return;  // the first rank of a pair holds
    slot = (slot + 1) & mask;
  }
  merges_[slot] = {key, rank, id};
}

const Tokenizer::Merge* Tokenizer::find_merge(int32_t left, int32_t right) const {
  if (left < 0 || right < 0) return nullptr;
  uint64_t key = pair_key(left, right), mask = merges_.size() - 1;
  uint64_t slot = (key * 0x9E3779B97F4A7C15ull) >> 32 & mask;
  for (; merges_[slot].pair != UINT64_MAX; slot = (slot + 1) & mask)
    if (merges_[slot].pair == key) return &merges_[slot];
  return nullptr;
}

const Tokenizer::Special* Tokenizer::special_at(std::string_view text) const {
  for (const Special& s : specials_[static_cast<uint8_t>(text[0])])
    if (text.substr(0, s.text.size()) == s.text) return &s;
  return nullptr;
}

std::vector<int64_t> Tokenizer::encode(std::string_view text, ParseSpecial parse, bool add_bos) const {
  return encode_segments({{text, parse}}, add_bos);
}

std::vector<int64_t> Tokenizer::encode_chat(std::string_view prefix, std::string_view user, std::string_view suffix, bool trimmed) const {
  std::string_view text = trimmed ? trim(user) : user;
  return encode_segments({{prefix, ParseSpecial::All}, {text, ParseSpecial::None}, {suffix, ParseSpecial::All}}, true);
}

std::vector<int64_t> Tokenizer::encode_segments(const std::vector<Segment>& segments, bool add_bos) const {
  std::vector<int64_t> ids;
  std::string plain;  // text since the last special token: it may span segments, as in the rendered template
  auto flush = [&] {
    encode_plain(plain, ids);
    plain.clear();
  };
  for (const auto& [text, parse] : segments) {
    size_t from = 0;
    for (size_t at = 0; parse == ParseSpecial::All && at < text.size();) {
      const Special* special = special_at(text.substr(at));
      if (!special) {
        ++at;
        continue;
      }
      plain.append(text.substr(from, at - from));
      flush();
      ids.push_back(special->id);
      from = at += special->text.size();
    }
    plain.append(text.substr(from));
  }
  flush();
  if (add_bos && bos_ >= 0 && (ids.empty() || ids[0] != bos_)) ids.insert(ids.begin(), bos_);
  return ids;
}

void Tokenizer::encode_plain(std::string_view text, std::vector<int64_t>& ids) const {
  while (!text.empty()) {
    bool newline = text[0] == '\n';
    size_t end = newline ? text.find_first_not_of('\n') : text.find('\n');
    encode_run(text.substr(0, end), ids);
    text.remove_prefix(std::min(end, text.size()));
  }
}

// BPE over the whole run: symbols in a linked list, candidate merges in a heap by (rank, position). O(n log n).
void Tokenizer::encode_run(std::string_view run, std::vector<int64_t>& ids) const {
  struct Symbol {
    int32_t id;
    int32_t prev, next;        // -1: none
    uint32_t offset, length;  // bytes of the run, for byte fallback
  };
  if (run.size() > INT32_MAX) fail("a line of ", run.size(), " bytes is too long to tokenize");
  std::vector<Symbol> symbols;
  symbols.reserve(run.size());
  for (size_t at = 0; at < run.size();) {
    Utf8Step step = utf8_step(run.substr(at));
    uint32_t code_point = step.code_point == ' ' ? kSpaceCodePoint : step.code_point;
    auto i = static_cast<int32_t>(symbols.size());
    symbols.push_back({step.valid ? code_points_[code_point] : kUnknown, i - 1, i + 1, static_cast<uint32_t>(at), step.length});
    at += step.length;
  }
  symbols.back().next = -1;

  std::vector<uint64_t> storage;
  storage.reserve(symbols.size() * 2);
  std::priority_queue<uint64_t, std::vector<uint64_t>, std::greater<>> heap(std::greater<>(), std::move(storage));
  auto offer = [&](int32_t left) {
    if (left < 0 || symbols[left].next < 0) return;
    if (const Merge* m = find_merge(symbols[left].id, symbols[symbols[left].next].id))
      heap.push(static_cast<uint64_t>(m->rank) << 32 | static_cast<uint32_t>(left));
  };
  for (size_t i = 0; i + 1 < symbols.size(); ++i) offer(static_cast<int32_t>(i));
  while (!heap.empty()) {
    uint64_t top = heap.top();
    heap.pop();
    auto left = static_cast<int32_t>(top & UINT32_MAX);
    Symbol& a = symbols[left];
    if (a.id == kMerged || a.next < 0) continue;
    Symbol& b = symbols[a.next];
    const Merge* m = find_merge(a.id, b.id);
    if (!m || m->rank != top >> 32) continue;  // an older candidate: one of the two has changed since
    a.id = m->id;
    a.length += b.length;
    b.id = kMerged;
    a.next = b.next;
    if (a.next >= 0) symbols[a.next].prev = left;
    offer(a.prev);
    offer(left);
  }

  for (int32_t i = 0; i >= 0; i = symbols[i].next) {
    const Symbol& s = symbols[i];
    if (s.id >= 0) {
      ids.push_back(s.id);
      continue;
    }
    for (char c : run.substr(s.offset, s.length)) ids.push_back(bytes_[static_cast<uint8_t>(c)]);
  }
}

std::string_view Tokenizer::piece(int64_t id, bool skip_special) const {
  if (id < 0 || id >= size()) fail("token id ", id, " is outside of the vocabulary of ", size());
  const Piece& p = pieces_[static_cast<size_t>(id)];
  if (p.control && skip_special) return {};
  return std::string_view(text_).substr(p.offset, p.length);
}

std::string Tokenizer::decode(const std::vector<int64_t>& ids, bool skip_special) const {
  std::string bytes;
  for (int64_t id : ids) bytes += piece(id, skip_special);
  return utf8_take(bytes, true);
}

std::string StreamDecoder::push(int64_t id) {
  pending_ += tokenizer_->piece(id, skip_special_);
  return utf8_take(pending_, false);
}

std::string StreamDecoder::finish() { return utf8_take(pending_, true); }

}  // namespace kiln
