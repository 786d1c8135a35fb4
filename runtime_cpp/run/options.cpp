#include "options.h"

#include <algorithm>
#include <charconv>

namespace kiln {

std::string excerpt(std::string_view value) {
  constexpr size_t kMost = 60;
  return value.size() <= kMost ? std::string(value) : std::string(value.substr(0, kMost)) + "... (" + std::to_string(value.size()) + " characters)";
}

std::vector<std::string> parse_options(int argc, char** argv, const std::vector<Option>& options) {
  std::vector<std::string> positional;
  bool only_positional = false;
  for (int i = 1; i < argc; ++i) {
    std::string arg = argv[i];
    if (arg == "--" && !only_positional) {
      only_positional = true;
      continue;
    }
    if (only_positional || arg.size() < 2 || arg[0] != '-') {
      positional.push_back(arg);
      continue;
    }
    size_t equals = arg.rfind("--", 0) == 0 ? arg.find('=') : std::string::npos;
    std::string name = arg == "-h" ? "--help" : arg.substr(0, equals);
    auto it = std::find_if(options.begin(), options.end(), [&](const Option& o) { return name == o.name; });
    if (it == options.end()) usage("unknown option ", excerpt(name), "; see --help");
    if (!it->argument) {
      if (equals != std::string::npos) usage(name, " takes no value");
      it->set("");
    } else if (equals != std::string::npos) {
      it->set(arg.substr(equals + 1));
    } else {
      if (i + 1 >= argc) usage(name, " needs a value: ", it->argument);
      it->set(argv[++i]);
    }
  }
  return positional;
}

std::string options_help(const std::vector<Option>& options) {
  std::string out;
  for (const Option& o : options) {
    std::string left = std::string("  ") + o.name + (o.argument ? std::string(" ") + o.argument : "");
    left.resize(std::max<size_t>(left.size() + 2, 28), ' ');
    out += left + o.help + "\n";
  }
  return out;
}

std::function<void(const std::string&)> flag(bool& target) {
  return [&target](const std::string&) { target = true; };
}

std::function<void(const std::string&)> text(std::string& target) {
  return [&target](const std::string& value) { target = value; };
}

std::function<void(const std::string&)> text(std::optional<std::string>& target) {
  return [&target](const std::string& value) { target = value; };
}

std::function<void(const std::string&)> integer(const char* name, int64_t& target, int64_t least, int64_t most) {
  return [=, &target](const std::string& value) {
    auto r = std::from_chars(value.data(), value.data() + value.size(), target);
    if (r.ec != std::errc() || r.ptr != value.data() + value.size() || target < least || target > most)
      usage(name, " ", excerpt(value), ": must be an integer from ", least, " to ", most);
  };
}

std::function<void(const std::string&)> real(const char* name, float& target, float least, float most) {
  return [=, &target](const std::string& value) {
    auto r = std::from_chars(value.data(), value.data() + value.size(), target);
    if (r.ec != std::errc() || r.ptr != value.data() + value.size() || !(target >= least && target <= most)) {
      if (most == FLT_MAX) usage(name, " ", excerpt(value), ": must be a number of ", least, " or more");
      usage(name, " ", excerpt(value), ": must be a number from ", least, " to ", most);
    }
  };
}

}  // namespace kiln
