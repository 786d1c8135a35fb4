#pragma once
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kiln/json.h"
#include "kiln/tokenizer.h"
#include "text/utf8.h"

namespace kiln::fuzz {

// How text becomes tokens: docs/ARTIFACT.md.
enum class Kind { Spelled, Bytes, Scored };
constexpr Kind kKinds[] = {Kind::Spelled, Kind::Bytes, Kind::Scored};

constexpr char kQwen[] =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

// A small vocabulary of each kind the exporter writes: bytes, letters, merges that compete, special tokens that share beginnings.
struct Vocabulary {
  Kind kind;
  std::vector<std::string> texts;  // by id
  std::vector<std::string> specials = {"<bos>", "<|turn>", "<turn|>", "<|t", "<eos>"};
  std::vector<std::string> anywhere;  // the specials after those: cut out of any text
  std::vector<std::pair<std::string, std::string>> merges;  // by rank
  std::map<std::string, int64_t> ids;

  // Bytes of which Kind::Bytes has no token, as some real ones.
  static bool lacks(uint8_t b) { return b == 0x04 || b == 0xF1; }
  // GPT-2's character for a byte.
  static std::string spelled(uint8_t b) {
    static const std::vector<std::string> alphabet = [] {
      std::vector<std::string> made;
      uint32_t next = 0x100;
      for (uint32_t c = 0; c < 256; ++c) {
        uint32_t u = (c >= 0x21 && c <= 0x7E) || (c >= 0xA1 && c != 0xAD) ? c : next++;
        made.push_back(u < 0x80 ? std::string(1, static_cast<char>(u)) : std::string{static_cast<char>(0xC0 | u >> 6), static_cast<char>(0x80 | (u & 0x3F))});
      }
      return made;
    }();
    return alphabet[b];
  }
  static std::string spelled(std::string_view text) {
    std::string out;
    for (char c : text) out += spelled(static_cast<uint8_t>(c));
    return out;
  }

  explicit Vocabulary(Kind which) : kind(which) {
    auto add = [&](const std::string& text) {
      if (ids.emplace(text, static_cast<int64_t>(texts.size())).second) texts.push_back(text);
    };
    if (kind == Kind::Scored) anywhere = {"\n\n", "\n", "  ", "<b>"};
    for (const auto* list : {&specials, &anywhere})
      for (const std::string& special : *list) add(special);
    for (int b = 0; b < 256; ++b) {
      char text[8];
      std::snprintf(text, sizeof text, "<0x%02X>", b);
      if (kind != Kind::Bytes)
        add(text);
      else if (!lacks(static_cast<uint8_t>(b)))
        add(spelled(static_cast<uint8_t>(b)));
    }
    auto form = [&](const char* text) { return kind == Kind::Bytes ? spelled(std::string_view(text) == "\xE2\x96\x81" ? " " : text) : std::string(text); };
    if (kind != Kind::Bytes)
      for (const char* text : {"\xE2\x96\x81", "\n", "a", "b", "c", "<", "|", "t", ">", "\xC3\xA9", "\xF0\x9F\xA6\x8A"}) add(text);
    for (auto [left, right] : {std::pair("a", "b"), {"b", "c"}, {"a", "a"}, {"aa", "aa"}, {"ab", "c"}, {"a", "bc"}, {"\xE2\x96\x81", "a"}, {"\xE2\x96\x81", "\xE2\x96\x81"},
                               {"\n", "\n"}, {"<", "|"}, {"<|", "t"}, {"c", "c"}, {"b", "b"}, {"aaaa", "aaaa"}, {"'", "s"}, {"1", "2"}}) {
      if (kind == Kind::Scored && std::string_view(left) == "\n") continue;
      if (kind != Kind::Bytes) add(left), add(right);
      merges.emplace_back(form(left), form(right));
      add(form(left) + form(right));
    }
    if (kind == Kind::Bytes) {
      for (auto [left, right] : {std::pair("\xC3", "\xA9"), {"\xC3\xA9", "a"}, {"\xEF", "\xBF"}, {"\xEF\xBF", "\xBD"}, {"\xF0", "\x9F"}, {"\xCC", "\x81"}}) {
        merges.emplace_back(spelled(left), spelled(right));
        add(spelled(left) + spelled(right));
      }
    } else {
      merges.emplace_back("\xC3\xA9", "\xF0\x9F\xA6\x8A");
      add("\xC3\xA9\xF0\x9F\xA6\x8A");
      merges.emplace_back("\xE2\x96\x81" "a", "b");
      add("\xE2\x96\x81" "ab");
      if (kind == Kind::Scored) add("n\xC3\xB1");  // neither part is a token
    }
  }

  int64_t special_ids() const { return static_cast<int64_t>(specials.size() + anywhere.size()); }
  // Of Kind::Scored: three texts to a rank, so that there are ties.
  int64_t rank(int64_t id) const { return (static_cast<int64_t>(texts.size()) - id) / 3; }

  std::string json() const {
    std::string vocab, rules, added, ranks;
    for (size_t i = 0; i < texts.size(); ++i) {
      vocab += (i ? "," : "") + json_quote(texts[i]) + ":" + std::to_string(i);
      ranks += (i ? "," : "") + std::to_string(rank(static_cast<int64_t>(i)));
    }
    for (const auto& [left, right] : merges) rules += (rules.empty() ? "[" : ",[") + json_quote(left) + "," + json_quote(right) + "]";
    for (size_t i = 0; i < static_cast<size_t>(special_ids()); ++i)
      added += (i ? "," : "") + std::string("{\"id\":") + std::to_string(i) + ",\"content\":" + json_quote(texts[i]) + ",\"special\":" + (i < specials.size() ? "true}" : "false}");
    std::string split = R"({"type":"Split","pattern":{"Regex":)" + json_quote(kind == Kind::Bytes ? kQwen : "\n+") + R"(},"behavior":"Isolated"})";
    std::string level = R"({"type":"ByteLevel","add_prefix_space":false,"use_regex":false})";
    std::string pre = kind == Kind::Scored ? "null" : kind == Kind::Bytes ? R"({"type":"Sequence","pretokenizers":[)" + split + "," + level + "]}" : split;
    std::string normalizer = kind == Kind::Bytes ? "null" : R"({"type":"Replace","pattern":{"String":" "},"content":")" "\xE2\x96\x81" R"("})";
    std::string model = kind == Kind::Scored ? R"("type":"ScoredBPE","byte_fallback":true,"ranks":[)" + ranks + "]"
                                             : R"("type":"BPE","byte_fallback":)" + std::string(kind == Kind::Bytes ? "false" : "true") + R"(,"merges":[)" + rules + "]";
    return R"({"added_tokens":[)" + added + R"(],"normalizer":)" + normalizer + R"(,"pre_tokenizer":)" + pre + R"(,
"post_processor":{"type":"TemplateProcessing","single":[{"SpecialToken":{"id":"<bos>","type_id":0}},{"Sequence":{"id":"A","type_id":0}}],
"special_tokens":{"<bos>":{"id":"<bos>","ids":[0],"tokens":["<bos>"]}}},
"model":{)" + model + R"(,"vocab":{)" + vocab + "}}}";
  }

  static const Vocabulary& get(Kind kind) {
    static const Vocabulary all[] = {Vocabulary(Kind::Spelled), Vocabulary(Kind::Bytes), Vocabulary(Kind::Scored)};
    return all[static_cast<size_t>(kind)];
  }
  static const Tokenizer& tokenizer(Kind kind) {
    static const Tokenizer all[] = {Tokenizer::parse(get(Kind::Spelled).json(), "spelled"), Tokenizer::parse(get(Kind::Bytes).json(), "bytes"),
                                    Tokenizer::parse(get(Kind::Scored).json(), "scored")};
    return all[static_cast<size_t>(kind)];
  }

  // What comes back of a text: what replaces a space is one, and where only characters have tokens, each byte that is none is U+FFFD and
  // bytes without a token are lost.
  std::string kept(std::string_view text) const {
    std::string out;
    for (size_t at = 0; at < text.size();) {
      auto step = utf8_step(text.substr(at));
      std::string_view part = text.substr(at, is_surrogate(text.substr(at)) ? 3 : step.length);
      if (kind == Kind::Bytes) {
        std::string characters;
        for (size_t i = 0; i < part.size() && !step.valid && !is_surrogate(part); ++i) characters += "\xEF\xBF\xBD";
        for (char c : step.valid || is_surrogate(part) ? part : std::string_view(characters))
          if (!lacks(static_cast<uint8_t>(c))) out += c;
      } else {
        out += part == "\xE2\x96\x81" ? " " : part;
      }
      at += part.size();
    }
    return out;
  }
};

}  // namespace kiln::fuzz
