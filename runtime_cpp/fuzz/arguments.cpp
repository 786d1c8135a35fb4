// The command line: arguments between NULs. And, as a list of ids, the whole input.
#include "../run/arguments.h"

#include <vector>

#include "../run/options.h"
#include "fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace kiln;
  std::string line(fuzz::text(data, size));
  std::vector<char*> argv = {const_cast<char*>("kiln-run")};
  for (size_t at = 0; at < line.size(); at = line.find('\0', at) == std::string::npos ? line.size() : line.find('\0', at) + 1) argv.push_back(&line[at]);
  std::string help;
  fuzz::accepts([&] {
    Arguments a = parse_arguments(static_cast<int>(argv.size()), argv.data(), &help);
    fuzz::demand(a.help || a.version || !a.artifact.empty() || line.find('\0') != std::string::npos || line.empty(), "an artifact");
    fuzz::demand(a.max_new_tokens >= 1 && a.top_k >= 0 && a.seed >= 0 && a.steps >= 1 && a.temperature >= 0 && a.top_p >= 0 && a.top_p <= 1, "numbers are in range");
  });
  fuzz::accepts([&] {
    std::vector<int64_t> ids = parse_ids("--tokens", fuzz::text(data, size));
    std::string again;
    for (int64_t id : ids) again += (again.empty() ? "" : ",") + std::to_string(id);
    fuzz::demand(parse_ids("--tokens", again) == ids, "ids read the same again");
  });
  return 0;
}
