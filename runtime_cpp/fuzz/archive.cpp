// The directory of a code package: what is listed lies in the archive, apart from one another.
#include "artifact/archive.h"

#include <algorithm>
#include <vector>

#include "fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace kiln;
  std::string_view archive = fuzz::text(data, size);
  fuzz::accepts([&] {
    std::vector<std::string_view> parts;
    for (const auto& [name, bytes] : list_archive(archive, "model.pt2")) parts.push_back(bytes);
    std::sort(parts.begin(), parts.end(), [](std::string_view a, std::string_view b) { return a.data() < b.data(); });
    const char* from = archive.data();
    for (std::string_view part : parts) {
      fuzz::demand(part.data() >= from && part.size() <= size && part.data() + part.size() <= archive.data() + size, "a file lies in the archive, behind the one before it");
      from = part.data() + part.size();
    }
  });
  return 0;
}
