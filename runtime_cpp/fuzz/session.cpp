// The head of a saved session: as it is, and as a header whose checksum is right. What is accepted fills the file, and reads the same when it is
// written again.
#include "caches/session_file.h"

#include <algorithm>

#include "artifact/sha256.h"
#include "fuzz.h"

namespace {

using kiln::SessionRecord;

std::string number(uint32_t value) {
  std::string bytes;
  for (int i = 0; i < 4; ++i) bytes += static_cast<char>(value >> (8 * i));
  return bytes;
}

// As a reader goes about it.
void read(std::string_view file, uint64_t file_bytes) {
  kiln::fuzz::accepts([&] {
    const uint64_t bytes = kiln::session_head_bytes(file.substr(0, kiln::kSessionPrelude), "s");
    const SessionRecord r = kiln::parse_session(file.substr(0, std::min<uint64_t>(bytes, file.size())), file_bytes, "s");
    uint64_t end = bytes;
    for (const SessionRecord::Part& part : r.parts) end += part.bytes;
    kiln::fuzz::demand(end == file_bytes && r.position >= 0 && r.next >= -1, "the parts fill the file");
    const std::string head = kiln::session_head(r);
    const SessionRecord again = kiln::parse_session(head, file_bytes - bytes + head.size(), "s");
    kiln::fuzz::demand(kiln::session_head(again) == head && again.parts.size() == r.parts.size(), "what was written reads the same");
  });
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view text = kiln::fuzz::text(data, size);
  read(text, size);
  // The first byte says how long the file is said to be behind the head.
  if (size < 1) return 0;
  const std::string_view json = text.substr(1);
  const std::string head = "kilnsess" + number(1) + number(static_cast<uint32_t>(json.size())) + kiln::sha256(json.data(), json.size()) + std::string(json);
  read(head, head.size() + data[0]);
  return 0;
}
