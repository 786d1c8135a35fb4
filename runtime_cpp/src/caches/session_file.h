#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "kiln/error.h"

namespace kiln {

// What stands at the head of a saved session (docs/RUNTIME.md): 8 bytes of magic, version and bytes of the header as uint32, little-endian, the
// header's SHA-256 in 64 hex digits, the header in JSON. Behind it the parts' bytes follow one another to the end of the file.
struct SessionRecord {
  struct Part {
    std::string name;
    uint64_t bytes = 0;
    std::string sha256;
  };
  std::string artifact, target;  // Model::identity(), "cpu"
  int64_t position = 0, next = -1;
  bool handed_out = false;
  int64_t written = 0;  // how far the rings had been written, at least to the position
  std::vector<Part> parts;
};

constexpr uint64_t kSessionPrelude = 80, kSessionHeaderMost = 64 << 20;

std::string session_head(const SessionRecord& record);
// Bytes of prelude and header, of the prelude. Error for anything but a saved session of this version; `where` begins each.
uint64_t session_head_bytes(std::string_view prelude, const std::string& where);
// `head`: as many bytes. Error where it is damaged or its parts do not fill a file of `file_bytes`.
SessionRecord parse_session(std::string_view head, uint64_t file_bytes, const std::string& where);

}  // namespace kiln
