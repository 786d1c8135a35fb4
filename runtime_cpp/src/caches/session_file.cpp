#include "caches/session_file.h"

#include <cstring>

#include "artifact/sha256.h"
#include "kiln/json.h"

namespace kiln {

namespace {

constexpr char kMagic[] = "kilnsess";  // 8 bytes
constexpr uint32_t kVersion = 1;
constexpr size_t kHash = 64;

std::string number(uint32_t value) {
  std::string bytes(4, '\0');
  for (int i = 0; i < 4; ++i) bytes[static_cast<size_t>(i)] = static_cast<char>(value >> (8 * i));
  return bytes;
}

uint32_t number(std::string_view bytes) {
  uint32_t value = 0;
  for (size_t i = 0; i < 4; ++i) value |= static_cast<uint32_t>(static_cast<unsigned char>(bytes[i])) << (8 * i);
  return value;
}

int64_t count_at(const Json& object, std::string_view key, int64_t least) {
  int64_t value = object.at(key).as_int();
  if (value < least) fail("'", key, "' is ", value);
  return value;
}

}  // namespace

std::string session_head(const SessionRecord& r) {
  std::string json = "{\"artifact\": " + json_quote(r.artifact) + ", \"target\": " + json_quote(r.target) + ", \"position\": " + std::to_string(r.position) +
                     ", \"next\": " + std::to_string(r.next) + ", \"handed_out\": " + (r.handed_out ? "true" : "false") +
                     ", \"written\": " + std::to_string(r.written) + ", \"parts\": [";
  for (const SessionRecord::Part& p : r.parts)
    json += (&p == r.parts.data() ? "" : ", ") + ("{\"name\": " + json_quote(p.name)) + ", \"bytes\": " + std::to_string(p.bytes) +
            ", \"sha256\": " + json_quote(p.sha256) + "}";
  json += "]}";
  return kMagic + number(kVersion) + number(static_cast<uint32_t>(json.size())) + sha256(json.data(), json.size()) + json;
}

uint64_t session_head_bytes(std::string_view prelude, const std::string& where) {
  const size_t magic = std::strlen(kMagic);
  if (prelude.size() < kSessionPrelude || prelude.substr(0, magic) != kMagic) fail(where, ": not a saved session");
  if (uint32_t version = number(prelude.substr(magic)); version != kVersion)
    fail(where, ": a session of version ", version, ", this runner reads ", kVersion, "; save it again with this one");
  const uint64_t bytes = number(prelude.substr(magic + 4));
  if (bytes > kSessionHeaderMost) fail(where, ": damaged: a header of ", bytes, " bytes");
  return kSessionPrelude + bytes;
}

SessionRecord parse_session(std::string_view head, uint64_t file_bytes, const std::string& where) {
  if (head.size() < kSessionPrelude || head.size() != session_head_bytes(head, where)) fail(where, ": damaged: it was cut short");
  const std::string_view json = head.substr(kSessionPrelude);
  if (sha256(json.data(), json.size()) != head.substr(kSessionPrelude - kHash, kHash)) fail(where, ": damaged: its header has another SHA-256 than it says");
  SessionRecord r;
  try {
    JsonDocument doc{std::string(json), "header"};
    const Json& root = doc.root();
    r.artifact = root.at("artifact").as_string();
    r.target = root.at("target").as_string();
    r.position = count_at(root, "position", 0);
    r.next = count_at(root, "next", -1);
    r.handed_out = root.at("handed_out").as_bool();
    r.written = root.find("written") ? count_at(root, "written", r.position) : r.position;
    uint64_t left = file_bytes - head.size();
    for (const Json& p : root.at("parts")) {
      r.parts.push_back({std::string(p.at("name").as_string()), static_cast<uint64_t>(count_at(p, "bytes", 0)), std::string(p.at("sha256").as_string())});
      if (r.parts.back().bytes > left) fail("'", r.parts.back().name, "' ends behind the file; it was cut short");
      left -= r.parts.back().bytes;
    }
    if (left) fail(left, " bytes too many");
  } catch (const Error& e) {
    fail(where, ": damaged: ", e.what());
  }
  return r;
}

}  // namespace kiln
