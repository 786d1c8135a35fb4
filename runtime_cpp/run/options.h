#pragma once
#include <functional>
#include <string>
#include <vector>

#include "kiln/error.h"

namespace kiln {

// Wrong use of the command line: exit code 2.
class UsageError : public Error {
 public:
  using Error::Error;
};

struct Option {
  const char* name;      // "--prompt"
  const char* argument;  // "TEXT"; nullptr: a flag
  const char* help;
  std::function<void(const std::string&)> set;  // "" for a flag
};

// Runs the options' setters in the order of the command line; returns the arguments that are no options.
std::vector<std::string> parse_options(int argc, char** argv, const std::vector<Option>& options);
std::string options_help(const std::vector<Option>& options);

// Setters. Out of range or not a number: UsageError.
std::function<void(const std::string&)> flag(bool& target);
std::function<void(const std::string&)> text(std::string& target);
std::function<void(const std::string&)> integer(const char* name, int64_t& target, int64_t least, int64_t most);
std::function<void(const std::string&)> real(const char* name, float& target);

}  // namespace kiln
