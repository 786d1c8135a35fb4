#pragma once
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "kiln/json.h"
#include "kiln/tokenizer.h"

namespace kiln::fuzz {

// A small vocabulary of the kind the exporter writes: every byte, letters, merges that compete, special tokens that share beginnings.
struct Vocabulary {
  std::vector<std::string> texts;  // by id
  std::vector<std::string> specials = {"<bos>", "<|turn>", "<turn|>", "<|t", "<eos>"};
  std::vector<std::pair<std::string, std::string>> merges;  // by rank
  std::map<std::string, int64_t> ids;

  Vocabulary() {
    auto add = [&](const std::string& text) {
      if (ids.emplace(text, static_cast<int64_t>(texts.size())).second) texts.push_back(text);
    };
    for (const std::string& special : specials) add(special);
    for (int b = 0; b < 256; ++b) {
      char text[8];
      std::snprintf(text, sizeof text, "<0x%02X>", b);
      add(text);
    }
    for (const char* text : {"\xE2\x96\x81", "\n", "a", "b", "c", "<", "|", "t", ">", "\xC3\xA9", "\xF0\x9F\xA6\x8A"}) add(text);
    for (auto [left, right] : {std::pair("a", "b"), {"b", "c"}, {"a", "a"}, {"aa", "aa"}, {"ab", "c"}, {"a", "bc"}, {"\xE2\x96\x81", "a"}, {"\xE2\x96\x81", "\xE2\x96\x81"},
                               {"\xE2\x96\x81" "a", "b"}, {"\n", "\n"}, {"<", "|"}, {"<|", "t"}, {"\xC3\xA9", "\xF0\x9F\xA6\x8A"}, {"c", "c"}, {"b", "b"}, {"aaaa", "aaaa"}}) {
      merges.emplace_back(left, right);
      add(std::string(left) + right);
    }
  }

  std::string json() const {
    std::string vocab, rules, added;
    for (size_t i = 0; i < texts.size(); ++i) vocab += (i ? "," : "") + json_quote(texts[i]) + ":" + std::to_string(i);
    for (const auto& [left, right] : merges) rules += (rules.empty() ? "[" : ",[") + json_quote(left) + "," + json_quote(right) + "]";
    for (size_t i = 0; i < specials.size(); ++i)
      added += (i ? "," : "") + std::string("{\"id\":") + std::to_string(i) + ",\"content\":" + json_quote(specials[i]) + ",\"special\":true}";
    return R"({"added_tokens":[)" + added + R"(],"normalizer":{"type":"Replace","pattern":{"String":" "},"content":")" "\xE2\x96\x81" R"("},
"pre_tokenizer":{"type":"Split","pattern":{"Regex":"\n+"},"behavior":"Isolated"},
"post_processor":{"type":"TemplateProcessing","single":[{"SpecialToken":{"id":"<bos>","type_id":0}},{"Sequence":{"id":"A","type_id":0}}],
"special_tokens":{"<bos>":{"id":"<bos>","ids":[0],"tokens":["<bos>"]}}},
"model":{"type":"BPE","byte_fallback":true,"vocab":{)" + vocab + R"(},"merges":[)" + rules + "]}}";
  }

  static const Vocabulary& get() {
    static const Vocabulary vocabulary;
    return vocabulary;
  }
  static const Tokenizer& tokenizer() {
    static const Tokenizer tokenizer = Tokenizer::parse(get().json(), "vocabulary");
    return tokenizer;
  }
};

}  // namespace kiln::fuzz
