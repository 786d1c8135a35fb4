#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kiln/error.h"

namespace kiln {

// Whether control and user-defined tokens are recognized in a text. Text from a user is never parsed (None).
enum class ParseSpecial { None, All };

struct Vocabulary;

// A tokenizer read from tokenizer.json, of one of the kinds that docs/ARTIFACT.md names. Immutable: any number of threads may share one,
// and copies share what they know.
class Tokenizer {
 public:
  // Throws Error when the file is not a tokenizer of the kinds written by the exporter.
  static Tokenizer load(const std::string& path);
  static Tokenizer parse(std::string json, const std::string& name);  // the text of such a file; `name` stands at the head of messages

  // Token ids of `text` (UTF-8, or any bytes). Where the tokenizer has a BOS, ids with add_bos start with exactly one; likewise EOS at the
  // end, which a text that is to be continued does not have.
  std::vector<int64_t> encode(std::string_view text, ParseSpecial parse = ParseSpecial::None, bool add_bos = true, bool add_eos = false) const;

  // One user turn: prefix and suffix are template text, parsed for special tokens; `user` is not, and loses the white space around it
  // where the template takes it off.
  std::vector<int64_t> encode_chat(std::string_view prefix, std::string_view user, std::string_view suffix, bool trimmed = true) const;

  // Texts one after the other.
  using Segment = std::pair<std::string_view, ParseSpecial>;
  std::vector<int64_t> encode_segments(const std::vector<Segment>& segments, bool add_bos = true) const;

  // UTF-8 text; bytes that do not form UTF-8 become U+FFFD. A space that encoding puts in front is taken off, which StreamDecoder does not.
  // Throws Error on an id outside of the vocabulary.
  std::string decode(const std::vector<int64_t>& ids, bool skip_special = true) const;

  // The raw bytes of one token, "" for a control token when skip_special.
  std::string_view piece(int64_t id, bool skip_special = true) const;

  int64_t size() const;
  int64_t bos() const;  // what goes in front of a text, -1: nothing

 private:
  std::shared_ptr<const Vocabulary> vocabulary_;
};

// Text from a stream of tokens: holds back the bytes of a character that is not complete yet.
class StreamDecoder {
 public:
  explicit StreamDecoder(const Tokenizer& tokenizer, bool skip_special = true) : tokenizer_(&tokenizer), skip_special_(skip_special) {}

  std::string push(int64_t id);  // the text that is complete now, possibly ""
  std::string finish();          // what was held back, as U+FFFD

 private:
  const Tokenizer* tokenizer_;
  bool skip_special_;
  std::string pending_;
};

}  // namespace kiln
