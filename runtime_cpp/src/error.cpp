#include "kiln/error.h"

#include "text/utf8.h"

namespace kiln {

std::string one_line(std::string text) {
  constexpr size_t kMost = 2000;
  for (char& c : text)
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7F) c = ' ';
  text = utf8_take(text, true);
  if (text.size() > kMost) {
    size_t end = kMost - 3;
    while ((static_cast<unsigned char>(text[end]) & 0xC0) == 0x80) --end;  // not in the middle of a character
    text.replace(end, std::string::npos, "...");
  }
  return text;
}

}  // namespace kiln
