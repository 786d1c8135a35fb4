#pragma once
#include <cfloat>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "kiln/error.h"

namespace kiln {

// Wrong use of the command line: exit code 2.
class UsageError : public Error {
 public:
  using Error::Error;
};

template <typename... Parts>
[[noreturn]] void usage(const Parts&... parts) {
  std::ostringstream line;
  (line << ... << parts);
  throw UsageError(one_line(line.str()));
}

std::string excerpt(std::string_view value);  // as much of it as belongs in a message

struct Option {
  const char* name;      // "--prompt"
  const char* argument;  // "TEXT"; nullptr: a flag
  const char* help;
  std::function<void(const std::string&)> set;  // "" for a flag
};

// Runs the options' setters in the order of the command line; returns the arguments that are no options. What follows "--" is none.
std::vector<std::string> parse_options(int argc, char** argv, const std::vector<Option>& options);
std::string options_help(const std::vector<Option>& options);

// Setters. Out of range or not a number: UsageError.
std::function<void(const std::string&)> flag(bool& target);
std::function<void(const std::string&)> text(std::string& target);
std::function<void(const std::string&)> text(std::optional<std::string>& target);
std::function<void(const std::string&)> integer(const char* name, int64_t& target, int64_t least, int64_t most);
std::function<void(const std::string&)> real(const char* name, float& target, float least, float most = FLT_MAX);

}  // namespace kiln
