#pragma once
#include <cstdint>
#include <deque>
#include <string>
#include <string_view>
#include <vector>

#include "kiln/error.h"

namespace kiln {

// One JSON value: 16 bytes, a view into its JsonDocument.
class Json {
 public:
  enum class Type : uint8_t { Null, Bool, Int, Float, String, Array, Object };

  Type type() const { return type_; }
  bool is_null() const { return type_ == Type::Null; }
  bool is_array() const { return type_ == Type::Array; }
  bool is_object() const { return type_ == Type::Object; }
  bool is_string() const { return type_ == Type::String; }

  // Each throws Error when the value is of another type.
  bool as_bool() const;
  int64_t as_int() const;
  double as_double() const;
  std::string_view as_string() const;

  // Elements of an array, members of an object.
  size_t size() const;
  const Json& operator[](size_t i) const;           // array element
  std::string_view key(size_t i) const;             // i-th member of an object
  const Json& value(size_t i) const;
  const Json* find(std::string_view key) const;     // nullptr when absent
  const Json& at(std::string_view key) const;       // Error when absent
  // Range-for over an array's elements.
  const Json* begin() const;
  const Json* end() const { return begin() + size(); }

 private:
  friend class JsonParser;
  void expect(Type type) const;

  Type type_ = Type::Null;
  uint32_t size_ = 0;  // string: bytes; array: elements; object: members
  union {
    bool bool_;
    int64_t int_ = 0;
    double float_;
    const char* text_;
    const Json* items_;  // array: size_ values; object: size_ pairs (key, value)
  };
};

// A parsed text and the memory of its values. Strict RFC 8259, at most 64 levels deep, UTF-8, no key of an object twice.
class JsonDocument {
 public:
  // `name` stands at the head of error messages. Throws Error with line and column.
  JsonDocument(std::string text, const std::string& name);
  JsonDocument(const JsonDocument&) = delete;
  JsonDocument& operator=(const JsonDocument&) = delete;

  const Json& root() const { return root_; }

 private:
  friend class JsonParser;
  std::string text_;  // strings are unescaped in place
  std::deque<std::vector<Json>> blocks_;
  Json root_;
};

// `text` as a JSON string, with quotes. Bytes that are not UTF-8 must have been replaced before.
std::string json_quote(std::string_view text);

// `x` in a printf format; what is not finite is null, as JSON has no other word for it.
std::string json_number(double x, const char* format = "%.6g");

}  // namespace kiln
