#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kiln/error.h"

namespace kiln {

// Whether control and user-defined tokens are recognized in a text. Text from a user is never parsed (None).
enum class ParseSpecial { None, All };

// A byte-fallback BPE tokenizer read from tokenizer.json. Immutable: any number of threads may share one.
class Tokenizer {
 public:
  // Throws Error when the file is not a tokenizer of the kind written by the exporter.
  static Tokenizer load(const std::string& path);
  static Tokenizer parse(std::string json, const std::string& name);  // the text of such a file; `name` stands at the head of messages

  // Token ids of `text` (UTF-8; bytes that are not become byte tokens). With add_bos the ids start with exactly one BOS.
  std::vector<int64_t> encode(std::string_view text, ParseSpecial parse = ParseSpecial::None, bool add_bos = true) const;

  // One user turn: prefix and suffix are template text, parsed for special tokens; `user` is not, and loses the white space around it
  // where the template takes it off.
  std::vector<int64_t> encode_chat(std::string_view prefix, std::string_view user, std::string_view suffix, bool trimmed = true) const;

  // UTF-8 text; bytes that do not form UTF-8 become U+FFFD. Throws Error on an id outside of the vocabulary.
  std::string decode(const std::vector<int64_t>& ids, bool skip_special = true) const;

  // The raw bytes of one token, "" for a control token when skip_special.
  std::string_view piece(int64_t id, bool skip_special = true) const;

  int64_t size() const { return static_cast<int64_t>(pieces_.size()); }
  int64_t bos() const { return bos_; }  // -1: none

 private:
  struct Piece {
    uint32_t offset = 0, length = 0;  // into text_
    bool control = false;
  };
  struct Special {
    std::string text;
    int32_t id;
  };
  struct Merge {
    uint64_t pair = UINT64_MAX;  // left id << 32 | right id
    uint32_t rank = 0;
    int32_t id = 0;
  };
  using Segment = std::pair<std::string_view, ParseSpecial>;

  std::vector<int64_t> encode_segments(const std::vector<Segment>& segments, bool add_bos) const;
  void encode_plain(std::string_view text, std::vector<int64_t>& ids) const;
  void encode_run(std::string_view run, std::vector<int64_t>& ids) const;
  const Special* special_at(std::string_view text) const;
  const Merge* find_merge(int32_t left, int32_t right) const;
  void add_merge(int32_t left, int32_t right, uint32_t rank, int32_t id);

  std::string text_;                  // the bytes of all pieces
  std::vector<Piece> pieces_;         // by id
  std::vector<int32_t> code_points_;  // code point -> id, -1: falls back to bytes
  int32_t bytes_[256];                // byte -> id, -1: absent
  std::vector<Special> specials_[256];  // by first byte, longest first
  std::vector<Merge> merges_;         // open addressing, a power of two
  int64_t bos_ = -1;
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
