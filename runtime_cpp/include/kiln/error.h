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

// Throws Error with the arguments joined.
template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream line;
  (line << ... << parts);
  throw Error(line.str());
}

}  // namespace kiln
