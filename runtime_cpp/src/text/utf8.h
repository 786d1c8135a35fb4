#pragma once
#include <cstdint>
#include <string>
#include <string_view>

namespace kiln {

// One step through UTF-8. length: bytes of the character, or of the longest bad prefix (>= 1) when not valid.
struct Utf8Step {
  uint32_t code_point = 0;
  uint32_t length = 1;
  bool valid = false;
  bool cut_short = false;  // not valid only because the text ends: more bytes could complete it
};

inline Utf8Step utf8_step(std::string_view text) {
  auto byte = [&](size_t i) { return static_cast<uint8_t>(text[i]); };
  uint8_t lead = byte(0);
  if (lead < 0x80) return {lead, 1, true, false};
  if (lead < 0xC2 || lead > 0xF4) return {};
  uint32_t need = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
  uint32_t code = lead & (0xFF >> (need + 1));
  // The second byte is narrower after E0, ED, F0, F4: no overlong forms, no surrogates, nothing above U+10FFFF.
  uint8_t low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
  uint8_t high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
  for (uint32_t i = 1; i < need; ++i) {
    if (i >= text.size()) return {0, i, false, true};
    uint8_t b = byte(i);
    if (b < low || b > high) return {0, i, false, false};
    code = code << 6 | (b & 0x3F);
    low = 0x80, high = 0xBF;
  }
  return {code, need, true, false};
}

// The three bytes of a surrogate, which UTF-8 forbids.
inline bool is_surrogate(std::string_view text) {
  auto byte = [&](size_t i) { return static_cast<uint8_t>(text[i]); };
  return text.size() >= 3 && byte(0) == 0xED && byte(1) >= 0xA0 && byte(1) <= 0xBF && byte(2) >= 0x80 && byte(2) <= 0xBF;
}

// Moves complete text from the front of `bytes`; bad bytes become U+FFFD. Unless `final`, an unfinished character stays.
inline std::string utf8_take(std::string& bytes, bool final) {
  std::string out;
  size_t at = 0;
  while (at < bytes.size()) {
    Utf8Step step = utf8_step(std::string_view(bytes).substr(at));
    if (step.cut_short && !final) break;
    if (step.valid)
      out.append(bytes, at, step.length);
    else
      out += "\xEF\xBF\xBD";
    at += step.length;
  }
  bytes.erase(0, at);
  return out;
}

// As Python's str.isspace.
inline bool is_space(uint32_t c) {
  return (c >= 0x09 && c <= 0x0D) || (c >= 0x1C && c <= 0x20) || c == 0x85 || c == 0xA0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

inline std::string_view trim(std::string_view text) {
  while (!text.empty()) {
    Utf8Step step = utf8_step(text);
    if (!step.valid || !is_space(step.code_point)) break;
    text.remove_prefix(step.length);
  }
  while (!text.empty()) {
    size_t start = text.size() - 1;
    while (start > 0 && text.size() - start < 4 && (static_cast<uint8_t>(text[start]) & 0xC0) == 0x80) --start;
    Utf8Step step = utf8_step(text.substr(start));
    if (!step.valid || step.length != text.size() - start || !is_space(step.code_point)) break;
    text.remove_suffix(step.length);
  }
  return text;
}

}  // namespace kiln
