#include "kiln/json.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>

#include "text/utf8.h"

namespace kiln {

namespace {

constexpr int kMaxDepth = 64;
constexpr size_t kBlock = 1 << 16;

const char* type_name(Json::Type type) {
  static const char* const names[] = {"null", "a boolean", "an integer", "a number", "a string", "an array", "an object"};
  return names[static_cast<int>(type)];
}

}  // namespace

void Json::expect(Type type) const {
  if (type_ != type) fail("expected ", type_name(type), ", found ", type_name(type_));
}
bool Json::as_bool() const { return expect(Type::Bool), bool_; }
int64_t Json::as_int() const { return expect(Type::Int), int_; }
double Json::as_double() const { return type_ == Type::Int ? static_cast<double>(int_) : (expect(Type::Float), float_); }
std::string_view Json::as_string() const { return expect(Type::String), std::string_view(text_, size_); }
size_t Json::size() const {
  if (type_ != Type::Array) expect(Type::Object);
  return size_;
}
const Json* Json::begin() const { return expect(Type::Array), items_; }
const Json& Json::operator[](size_t i) const {
  expect(Type::Array);
  if (i >= size_) fail("element ", i, " of an array of ", size_);
  return items_[i];
}
std::string_view Json::key(size_t i) const { return expect(Type::Object), items_[2 * i].as_string(); }
const Json& Json::value(size_t i) const { return expect(Type::Object), items_[2 * i + 1]; }
const Json* Json::find(std::string_view key) const {
  expect(Type::Object);
  for (size_t i = 0; i < size_; ++i)
    if (std::string_view(items_[2 * i].text_, items_[2 * i].size_) == key) return &items_[2 * i + 1];
  return nullptr;
}
const Json& Json::at(std::string_view key) const {
  const Json* found = find(key);
  if (!found) fail("missing key '", key, "'");
  return *found;
}

class JsonParser {
 public:
  JsonParser(JsonDocument& doc, const std::string& name)
      : doc_(doc), name_(name), begin_(doc.text_.data()), p_(begin_), end_(begin_ + doc.text_.size()) {}

  Json parse() {
    Json root = value(0);
    skip_space();
    if (p_ != end_) error("more text after the value");
    return root;
  }

 private:
  [[noreturn]] void error(const char* what) {
    auto line = std::count(static_cast<const char*>(begin_), static_cast<const char*>(p_), '\n') + 1;
    const char* start = p_;
    while (start > begin_ && start[-1] != '\n') --start;
    fail(name_, ": not valid JSON: ", what, " at line ", line, ", column ", p_ - start + 1);
  }

  void skip_space() {
    while (p_ < end_ && (*p_ == ' ' || *p_ == '\n' || *p_ == '\r' || *p_ == '\t')) ++p_;
  }

  bool take(char c) {
    skip_space();
    if (p_ >= end_ || *p_ != c) return false;
    ++p_;
    return true;
  }

  Json value(int depth) {
    if (depth > kMaxDepth) error("nested too deeply");
    skip_space();
    if (p_ >= end_) error("unexpected end");
    Json v;
    switch (*p_) {
      case '{': return object(depth);
      case '[': return array(depth);
      case '"': return string();
      case 't': return word("true"), v.type_ = Json::Type::Bool, v.bool_ = true, v;
      case 'f': return word("false"), v.type_ = Json::Type::Bool, v.bool_ = false, v;
      case 'n': return word("null"), v;
      default: return number();
    }
  }

  void word(std::string_view w) {
    if (static_cast<size_t>(end_ - p_) < w.size() || std::memcmp(p_, w.data(), w.size()) != 0) error("unknown word");
    p_ += w.size();
  }

  Json number() {
    const char* start = p_;
    auto digits = [&] {
      const char* first = p_;
      while (p_ < end_ && *p_ >= '0' && *p_ <= '9') ++p_;
      return p_ - first;
    };
    if (p_ < end_ && *p_ == '-') ++p_;
    const char* first = p_;
    auto n = digits();
    if (n == 0) error("unexpected character");
    if (n > 1 && *first == '0') error("a number with a leading zero");
    bool integer = true;
    if (p_ < end_ && *p_ == '.') {
      ++p_, integer = false;
      if (digits() == 0) error("no digit after the point");
    }
    if (p_ < end_ && (*p_ == 'e' || *p_ == 'E')) {
      ++p_, integer = false;
      if (p_ < end_ && (*p_ == '+' || *p_ == '-')) ++p_;
      if (digits() == 0) error("no digit in the exponent");
    }
    Json v;
    std::errc code;
    if (integer) {
      v.type_ = Json::Type::Int;
      code = std::from_chars(start, p_, v.int_).ec;
    } else {
      v.type_ = Json::Type::Float;
      code = std::from_chars(start, p_, v.float_).ec;
    }
    if (code != std::errc()) error("a number out of range");
    return v;
  }

  unsigned hex4() {
    if (end_ - p_ < 4) error("a short \\u escape");
    unsigned code = 0;
    auto r = std::from_chars(p_, p_ + 4, code, 16);
    if (r.ptr != p_ + 4) error("a bad \\u escape");
    p_ += 4;
    return code;
  }

  char* utf8(unsigned c, char* out) {
    if (c < 0x80) {
      *out++ = static_cast<char>(c);
    } else if (c < 0x800) {
      *out++ = static_cast<char>(0xC0 | c >> 6);
      *out++ = static_cast<char>(0x80 | (c & 63));
    } else if (c < 0x10000) {
      *out++ = static_cast<char>(0xE0 | c >> 12);
      *out++ = static_cast<char>(0x80 | (c >> 6 & 63));
      *out++ = static_cast<char>(0x80 | (c & 63));
    } else {
      *out++ = static_cast<char>(0xF0 | c >> 18);
      *out++ = static_cast<char>(0x80 | (c >> 12 & 63));
      *out++ = static_cast<char>(0x80 | (c >> 6 & 63));
      *out++ = static_cast<char>(0x80 | (c & 63));
    }
    return out;
  }

  // Bytes of the character at p_.
  size_t character() {
    if (static_cast<unsigned char>(*p_) < 0x80) return 1;
    Utf8Step step = utf8_step(std::string_view(p_, static_cast<size_t>(end_ - p_)));
    if (!step.valid) error("bytes that are not UTF-8");
    return step.length;
  }

  Json string() {
    char* start = ++p_;
    while (p_ < end_ && *p_ != '"' && *p_ != '\\' && static_cast<unsigned char>(*p_) >= 0x20) p_ += character();
    char* out = p_;  // an escape is never shorter than what it stands for, so unescaping in place is safe
    for (;;) {
      if (p_ >= end_) error("a string without an end");
      char c = *p_;
      if (c == '"') break;
      if (static_cast<unsigned char>(c) < 0x20) error("a control character in a string");
      if (c != '\\') {
        size_t length = character();
        std::memmove(out, p_, length);
        out += length, p_ += length;
        continue;
      }
      ++p_;
      if (p_ >= end_) error("a string without an end");
      switch (*p_++) {
        case '"': *out++ = '"'; break;
        case '\\': *out++ = '\\'; break;
        case '/': *out++ = '/'; break;
        case 'b': *out++ = '\b'; break;
        case 'f': *out++ = '\f'; break;
        case 'n': *out++ = '\n'; break;
        case 'r': *out++ = '\r'; break;
        case 't': *out++ = '\t'; break;
        case 'u': {
          unsigned code = hex4();
          if (code >= 0xD800 && code < 0xE000) {
            if (code >= 0xDC00 || end_ - p_ < 6 || p_[0] != '\\' || p_[1] != 'u') error("half a surrogate pair");
            p_ += 2;
            unsigned low = hex4();
            if (low < 0xDC00 || low >= 0xE000) error("half a surrogate pair");
            code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
          }
          out = utf8(code, out);
          break;
        }
        default: error("an unknown escape");
      }
    }
    ++p_;
    Json v;
    v.type_ = Json::Type::String;
    v.text_ = start;
    v.size_ = static_cast<uint32_t>(out - start);
    return v;
  }

  Json array(int depth) {
    ++p_;
    size_t base = stack_.size();
    if (!take(']')) {
      do stack_.push_back(value(depth + 1));
      while (take(','));
      if (!take(']')) error("expected ',' or ']'");
    }
    return close(Json::Type::Array, base, 1);
  }

  Json object(int depth) {
    ++p_;
    size_t base = stack_.size();
    if (!take('}')) {
      do {
        skip_space();
        if (p_ >= end_ || *p_ != '"') error("expected a key");
        stack_.push_back(string());
        if (!take(':')) error("expected ':'");
        stack_.push_back(value(depth + 1));
      } while (take(','));
      if (!take('}')) error("expected ',' or '}'");
      refuse_twins(base);
    }
    return close(Json::Type::Object, base, 2);
  }

  // Two readers of an object that has a key twice could take different values.
  void refuse_twins(size_t base) {
    auto key = [&](size_t i) { return stack_[base + 2 * i].as_string(); };
    const size_t n = (stack_.size() - base) / 2;
    auto refuse = [&](size_t i) { error(("the key '" + std::string(key(i)) + "' twice").c_str()); };
    if (n <= 16) {
      for (size_t i = 1; i < n; ++i)
        for (size_t j = 0; j < i; ++j)
          if (key(i) == key(j)) refuse(i);
      return;
    }
    size_t slots = 64;
    while (slots < 2 * n) slots *= 2;
    std::vector<uint32_t> table(slots);  // 1 + number of the key, at the first free place from its hash on
    for (size_t i = 0; i < n; ++i) {
      size_t at = std::hash<std::string_view>()(key(i)) & (slots - 1);
      for (; table[at]; at = (at + 1) & (slots - 1))
        if (key(table[at] - 1) == key(i)) refuse(i);
      table[at] = static_cast<uint32_t>(i + 1);
    }
  }

  // Moves the values from stack_[base] on into the document's memory.
  Json close(Json::Type type, size_t base, size_t per_item) {
    size_t n = stack_.size() - base;
    auto& blocks = doc_.blocks_;
    if (blocks.empty() || blocks.back().capacity() - blocks.back().size() < n) {
      blocks.emplace_back();
      blocks.back().reserve(std::max(kBlock, n));  // never grows past this: values keep their addresses
    }
    auto& block = blocks.back();
    Json v;
    v.type_ = type;
    v.size_ = static_cast<uint32_t>(n / per_item);
    v.items_ = block.data() + block.size();
    block.insert(block.end(), stack_.begin() + static_cast<ptrdiff_t>(base), stack_.end());
    stack_.resize(base);
    return v;
  }

  JsonDocument& doc_;
  const std::string& name_;
  char* begin_;
  char* p_;
  char* end_;
  std::vector<Json> stack_;  // values of the arrays and objects still open
};

JsonDocument::JsonDocument(std::string text, const std::string& name) : text_(std::move(text)) {
  if (text_.size() > UINT32_MAX) fail(name, ": ", text_.size(), " bytes of JSON, the limit is ", UINT32_MAX);
  root_ = JsonParser(*this, name).parse();
}

std::string json_quote(std::string_view text) {
  static const char* const hex = "0123456789abcdef";
  std::string out = "\"";
  for (unsigned char c : text) {
    if (c == '"' || c == '\\') {
      out += '\\', out += static_cast<char>(c);
    } else if (c == '\n') {
      out += "\\n";
    } else if (c < 0x20) {
      out += "\\u00", out += hex[c >> 4], out += hex[c & 15];
    } else {
      out += static_cast<char>(c);
    }
  }
  return out += '"';
}

std::string json_number(double x, const char* format) {
  if (!std::isfinite(x)) return "null";
  char text[40];
  std::snprintf(text, sizeof text, format, x);
  return text;
}

}  // namespace kiln
