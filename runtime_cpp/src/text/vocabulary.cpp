#include "text/vocabulary.h"

#include <algorithm>
#include <functional>

#include "kiln/json.h"
#include "text/utf8.h"

namespace kiln {

namespace {

constexpr int32_t kNone = -1;

uint64_t pair_key(int32_t left, int32_t right) { return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right); }

size_t slots_for(size_t n) {
  size_t slots = 64;
  while (slots < 2 * n) slots *= 2;
  return slots;
}

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

// The byte that a character of GPT-2's alphabet stands for, -1 for any other. Bytes that Latin-1 prints stand for themselves, the others
// follow from U+0100 on.
int byte_of_alphabet(uint32_t c) {
  static const std::vector<int> table = [] {
    std::vector<int> made(0x200, -1);
    uint32_t next = 0x100;
    for (int b = 0; b < 256; ++b) {
      bool printed = (b >= 0x21 && b <= 0x7E) || (b >= 0xA1 && b != 0xAD);
      made[printed ? static_cast<uint32_t>(b) : next++] = b;
    }
    return made;
  }();
  return c < table.size() ? table[c] : -1;
}

// A token's bytes in GPT-2's alphabet; false where it has other characters.
bool from_alphabet(std::string_view text, std::string& out) {
  out.clear();
  while (!text.empty()) {
    Utf8Step step = utf8_step(text);
    int byte = step.valid ? byte_of_alphabet(step.code_point) : -1;
    if (byte < 0) return false;
    out += static_cast<char>(byte);
    text.remove_prefix(step.length);
  }
  return true;
}

}  // namespace

int32_t Vocabulary::find(std::string_view wanted) const {
  size_t mask = table_.size() - 1;
  for (size_t slot = std::hash<std::string_view>()(wanted) & mask; table_[slot] != kNone; slot = (slot + 1) & mask)
    if (piece(table_[slot]) == wanted) return table_[slot];
  return kNone;
}

void Vocabulary::add_text(int32_t id) {
  size_t mask = table_.size() - 1, slot = std::hash<std::string_view>()(piece(id)) & mask;
  for (; table_[slot] != kNone; slot = (slot + 1) & mask)
    if (piece(table_[slot]) == piece(id)) return;  // the lowest id serves encoding
  table_[slot] = id;
}

void Vocabulary::add_merge(int32_t left, int32_t right, uint32_t rank, int32_t id) {
  uint64_t key = pair_key(left, right), mask = merges_.size() - 1;
  uint64_t slot = (key * 0x9E3779B97F4A7C15ull) >> 32 & mask;
  while (merges_[slot].pair != UINT64_MAX) {
    if (merges_[slot].pair == key) return;  // the first rank of a pair holds
    slot = (slot + 1) & mask;
  }
  merges_[slot] = {key, rank, id};
}

const Vocabulary::Merge* Vocabulary::find_merge(int32_t left, int32_t right) const {
  if (left < 0 || right < 0) return nullptr;
  uint64_t key = pair_key(left, right), mask = merges_.size() - 1;
  uint64_t slot = (key * 0x9E3779B97F4A7C15ull) >> 32 & mask;
  for (; merges_[slot].pair != UINT64_MAX; slot = (slot + 1) & mask)
    if (merges_[slot].pair == key) return &merges_[slot];
  return nullptr;
}

class VocabularyReader {
 public:
  VocabularyReader(const Json& root, Vocabulary& out) : root_(root), model_(root.at("model")), out_(out) {}

  void read() {
    read_kind();
    read_steps();
    read_texts();
    read_pieces();
    if (out_.scored) {
      read_ranks();
      out_.merges_.resize(slots_for(0));
    } else {
      read_merges();
    }
    read_specials();
    read_ends();
  }

 private:
  // Refuses what this class does not implement: another normalizer would give other ids without any error.
  void read_kind() {
    std::string_view type = model_.at("type").as_string();
    out_.scored = type == "ScoredBPE";
    if (!out_.scored && type != "BPE") fail("model.type is '", type, "', this runner reads BPE and ScoredBPE");
    out_.bytewise = !model_.at("byte_fallback").as_bool();
    if (out_.bytewise && out_.scored) fail("model.byte_fallback is off, joins by score need it");
    for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix", "dropout"})
      if (const Json* v = model_.find(key); v && !v->is_null()) fail("model.", key, " is not supported");
    if (const Json* v = model_.find("ignore_merges")) out_.whole = v->as_bool();
    if (out_.whole && !out_.bytewise) fail("model.ignore_merges is not supported with byte_fallback");
  }

  static bool is(const Json& step, std::string_view type) { return !step.is_null() && step.at("type").as_string() == type; }

  void read_steps() {
    const Json& normalizer = root_.at("normalizer");
    auto replaces = [](const Json& step) {
      return is(step, "Replace") && step.at("pattern").at("String").as_string() == " " && step.at("content").as_string() == kSpace;
    };
    if (out_.bytewise) {
      if (!normalizer.is_null()) fail("the normalizer of a tokenizer over bytes is not supported");
    } else if (out_.scored && is(normalizer, "Sequence")) {
      const Json& steps = normalizer.at("normalizers");
      out_.space_prefix = steps.size() == 2 && is(steps[0], "Prepend") && steps[0].at("prepend").as_string() == kSpace && replaces(steps[1]);
      if (!out_.space_prefix) fail("the normalizer is not Prepend \"", kSpace, "\" and Replace \" \" -> \"", kSpace, "\"");
    } else if (!replaces(normalizer)) {
      fail("the normalizer is not Replace \" \" -> \"", kSpace, "\"");
    }

    const Json& pre = root_.at("pre_tokenizer");
    auto split = [this](const Json& step) {
      if (!is(step, "Split") || step.at("behavior").as_string() != "Isolated") fail("the pre-tokenizer is not a Split with behavior Isolated");
      if (const Json* inverted = step.find("invert"); inverted && inverted->as_bool()) fail("the pre-tokenizer's Split is inverted");
      out_.split.emplace_back(step.at("pattern").at("Regex").as_string());
    };
    if (out_.scored) {
      if (!pre.is_null()) fail("joins by score have no pre-tokenizer");
    } else if (!out_.bytewise) {
      split(pre);
    } else {
      if (!is(pre, "Sequence") || pre.at("pretokenizers").size() == 0) fail("the pre-tokenizer of a tokenizer over bytes is not a Sequence");
      const Json& steps = pre.at("pretokenizers");
      for (size_t i = 0; i + 1 < steps.size(); ++i) split(steps[i]);
      const Json& level = steps[steps.size() - 1];
      if (!is(level, "ByteLevel") || level.at("add_prefix_space").as_bool() || level.at("use_regex").as_bool())
        fail("the last pre-tokenizer is not ByteLevel without prefix space and regex");
    }
  }

  void read_texts() {
    const Json& vocab = model_.at("vocab");
    const Json& added = root_.at("added_tokens");
    size_t n = vocab.size();
    for (const Json& token : added) {
      if (token.at("id").as_int() < 0) fail("an added token has id ", token.at("id").as_int());
      n = std::max(n, static_cast<size_t>(token.at("id").as_int()) + 1);
    }
    for (size_t i = 0; i < vocab.size(); ++i) n = std::max(n, static_cast<size_t>(std::max<int64_t>(vocab.value(i).as_int(), -1)) + 1);
    // Ids whose text a lower id has: they decode to it, and no text encodes to them.
    const Json* duplicates = model_.find("duplicates");
    size_t twice = duplicates ? duplicates->size() : 0;
    for (size_t i = 0; i < twice; ++i) {
      int64_t id = (*duplicates)[i].at("id").as_int();
      if (id < 0) fail("a duplicate token has id ", id);
      n = std::max(n, static_cast<size_t>(id) + 1);
    }
    if (n > vocab.size() + added.size() + twice) fail("the token ids have gaps: ", vocab.size(), " tokens, the largest id is ", n - 1);

    texts_.resize(n);
    special_.resize(n);
    encoded_.resize(n);
    out_.pieces.resize(n);
    ids_.reserve(n);
    for (size_t i = 0; i < vocab.size(); ++i) {
      int64_t id = vocab.value(i).as_int();
      if (id < 0 || static_cast<size_t>(id) >= n) fail("token '", vocab.key(i), "' has id ", id, ", the vocabulary has ", n, " tokens");
      if (texts_[static_cast<size_t>(id)].data()) fail("two tokens have the id ", id);
      texts_[static_cast<size_t>(id)] = vocab.key(i);
      encoded_[static_cast<size_t>(id)] = true;
      ids_[vocab.key(i)] = static_cast<int32_t>(id);
    }
    for (const Json& token : added) {
      auto id = static_cast<size_t>(token.at("id").as_int());
      std::string_view text = token.at("content").as_string();
      if (text.empty()) fail("added token ", id, " has no text");
      texts_[id] = text;
      special_[id] = true;
      out_.pieces[id].control = token.at("special").as_bool();
    }
    for (size_t i = 0; i < twice; ++i) {
      const Json& token = (*duplicates)[i];
      auto id = static_cast<size_t>(token.at("id").as_int());
      if (texts_[id].data()) fail("two tokens have the id ", id);
      texts_[id] = token.at("content").as_string();
      out_.pieces[id].control = token.at("special").as_bool();
    }
  }

  void read_pieces() {
    std::fill(std::begin(out_.bytes), std::end(out_.bytes), kNone);
    out_.table_.assign(slots_for(texts_.size()), kNone);
    std::vector<int32_t> ordinary;
    std::string spelled;
    for (size_t id = 0; id < texts_.size(); ++id) {
      std::string_view text = texts_[id];
      Vocabulary::Piece& piece = out_.pieces[id];
      piece.offset = static_cast<uint32_t>(out_.text.size());
      int byte = out_.bytewise ? -1 : byte_of(text);
      bool found = false;  // by its text, in the text of a user
      if (special_[id]) {
        out_.text += text;
      } else if (out_.bytewise) {
        found = from_alphabet(text, spelled);
        out_.text += found ? std::string_view(spelled) : text;
      } else if (byte >= 0) {
        if (encoded_[id] && out_.bytes[byte] == kNone) out_.bytes[byte] = static_cast<int32_t>(id);
        out_.text += static_cast<char>(byte);
      } else {
        found = text.find(' ') == std::string_view::npos;  // a space of text is spelled otherwise
        for (size_t at = 0; at < text.size();) {
          bool space = text.substr(at, kSpace.size()) == kSpace;
          out_.text += space ? ' ' : text[at];
          at += space ? kSpace.size() : 1;
        }
      }
      piece.length = static_cast<uint32_t>(out_.text.size() - piece.offset);
      if (found && encoded_[id]) ordinary.push_back(static_cast<int32_t>(id));
    }
    for (int32_t id : ordinary) out_.add_text(id);
    for (int b = 0; b < 256 && !out_.bytewise; ++b)
      if (out_.bytes[b] == kNone) fail("the vocabulary has no token for byte ", b);
  }

  void read_ranks() {
    const Json& ranks = model_.at("ranks");
    if (ranks.size() != texts_.size()) fail("model.ranks has ", ranks.size(), " entries, the vocabulary has ", texts_.size(), " tokens");
    for (const Json& rank : ranks) {
      if (rank.as_int() < 0 || rank.as_int() > INT32_MAX) fail("model.ranks has the rank ", rank.as_int());
      out_.ranks.push_back(static_cast<uint32_t>(rank.as_int()));
    }
  }

  void read_merges() {
    const Json& merges = model_.at("merges");
    out_.merges_.resize(slots_for(merges.size()));
    std::string joined;
    for (size_t rank = 0; rank < merges.size(); ++rank) {
      std::string_view left = merges[rank][0].as_string(), right = merges[rank][1].as_string();
      joined.assign(left).append(right);
      auto l = ids_.find(left), r = ids_.find(right), j = ids_.find(joined);
      if (l == ids_.end() || r == ids_.end() || j == ids_.end()) fail("merge ", rank, " ('", left, "' '", right, "') names a token that is not in the vocabulary");
      // Text alone must never become a special token.
      if (!special_[static_cast<size_t>(j->second)]) out_.add_merge(l->second, r->second, static_cast<uint32_t>(rank), j->second);
    }
  }

  void read_specials() {
    for (const Json& token : root_.at("added_tokens")) {
      auto id = static_cast<int32_t>(token.at("id").as_int());
      std::string_view text = out_.piece(id);
      bool anywhere = out_.scored && !token.at("special").as_bool();
      auto first = static_cast<uint8_t>(text[0]);
      if (!out_.specials.emplace(text, Vocabulary::Special{id, anywhere}).second) continue;
      out_.lengths[first].push_back(text.size());
      out_.anywhere[first] = out_.anywhere[first] || anywhere;
    }
    for (auto& lengths : out_.lengths) {
      std::sort(lengths.begin(), lengths.end(), std::greater<>());
      lengths.erase(std::unique(lengths.begin(), lengths.end()), lengths.end());
    }
  }

  void read_ends() {
    const Json* processor = root_.find("post_processor");
    if (!processor || processor->is_null()) return;
    if (processor->at("type").as_string() != "TemplateProcessing") fail("the post-processor is not a TemplateProcessing");
    bool before = true;
    for (const Json& item : processor->at("single")) {
      const Json* special = item.find("SpecialToken");
      if (!special) {
        before = false;
        continue;
      }
      int64_t id = processor->at("special_tokens").at(special->at("id").as_string()).at("ids")[0].as_int();
      if (id < 0 || static_cast<size_t>(id) >= texts_.size()) fail("the ", before ? "BOS" : "EOS", " id is ", id, ", the vocabulary has ", texts_.size(), " tokens");
      (before ? out_.bos : out_.eos) = id;
    }
  }

  const Json& root_;
  const Json& model_;
  Vocabulary& out_;
  std::vector<std::string_view> texts_;                   // by id, as in the file
  std::vector<bool> special_;                             // by id: an added token
  std::vector<bool> encoded_;                             // by id: in model.vocab
  std::unordered_map<std::string_view, int32_t> ids_;  // of model.vocab
};

std::shared_ptr<const Vocabulary> Vocabulary::parse(std::string json, const std::string& name) {
  JsonDocument doc(std::move(json), name);
  auto made = std::make_shared<Vocabulary>();
  try {
    VocabularyReader(doc.root(), *made).read();
  } catch (const Error& e) {
    fail(name, ": ", e.what());
  }
  return made;
}

}  // namespace kiln
