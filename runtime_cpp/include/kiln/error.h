#pragma once
#include <sstream>
#include <stdexcept>
#include <string>

namespace kiln {

// Every failure of the runner: one line that says what, where and what to do.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// `text` as a message: control characters are spaces, bytes that are not UTF-8 are U+FFFD, and what is longer than a screen is cut.
std::string one_line(std::string text);

// Throws Error with the arguments joined.
template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream line;
  (line << ... << parts);
  throw Error(one_line(line.str()));
}

}  // namespace kiln
