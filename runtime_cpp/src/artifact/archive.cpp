#include "artifact/archive.h"

#include "kiln/error.h"

namespace kiln {

namespace {

constexpr uint32_t kEnd = 0x06054b50, kEntry = 0x02014b50, kFile = 0x04034b50;
constexpr size_t kEndBytes = 22, kEntryBytes = 46, kFileBytes = 30;

// Little-endian, whatever the alignment; the caller has checked the length.
uint32_t number(std::string_view bytes, size_t at, int width) {
  uint32_t value = 0;
  for (int i = 0; i < width; ++i) value |= static_cast<uint32_t>(static_cast<unsigned char>(bytes[at + static_cast<size_t>(i)])) << (8 * i);
  return value;
}

}  // namespace

std::map<std::string, std::string_view> list_archive(std::string_view archive, const std::string& where) {
  auto damaged = [&](const char* what) { fail(where, ": not a code package of this format: ", what, "; export the model again"); };
  if (archive.size() < kEndBytes || number(archive, archive.size() - kEndBytes, 4) != kEnd) damaged("no zip archive, or one that was cut short");
  std::string_view end = archive.substr(archive.size() - kEndBytes);
  const uint32_t count = number(end, 10, 2), directory_bytes = number(end, 12, 4), directory = number(end, 16, 4);
  if (number(end, 4, 4) != 0 || number(end, 8, 2) != count || number(end, 20, 2) != 0) damaged("it has several parts or a comment");
  if (uint64_t{directory} + directory_bytes + kEndBytes != archive.size()) damaged("its directory is not where it should be");

  std::map<std::string, std::string_view> files;
  size_t at = directory, expected = 0;  // of the directory; of the next file
  for (uint32_t i = 0; i < count; ++i) {
    if (at + kEntryBytes > directory + directory_bytes || number(archive, at, 4) != kEntry) damaged("its directory is damaged");
    const uint32_t flags = number(archive, at + 8, 2), method = number(archive, at + 10, 2), packed = number(archive, at + 20, 4);
    const uint32_t bytes = number(archive, at + 24, 4), name_bytes = number(archive, at + 28, 2), extra = number(archive, at + 30, 2);
    const uint32_t comment = number(archive, at + 32, 2), file = number(archive, at + 42, 4);
    if (at + kEntryBytes + name_bytes > directory + directory_bytes || extra || comment) damaged("its directory is damaged");
    std::string name(archive.substr(at + kEntryBytes, name_bytes));
    if (flags || method || packed != bytes) damaged("a file in it is compressed or encrypted");
    if (file != expected || file + kFileBytes + name_bytes > directory || number(archive, file, 4) != kFile) damaged("its files do not follow one another");
    if (number(archive, file + 26, 2) != name_bytes || number(archive, file + 28, 2) || archive.substr(file + kFileBytes, name_bytes) != name)
      damaged("a file has another name in the directory");
    const size_t data = size_t{file} + kFileBytes + name_bytes;
    if (bytes > directory - data) damaged("a file is longer than the archive");
    if (!files.emplace(name, archive.substr(data, bytes)).second) damaged("two files have one name");
    expected = data + bytes;
    at += kEntryBytes + name_bytes;
  }
  if (expected != directory || at != size_t{directory} + directory_bytes) damaged("there is something between its files");
  return files;
}

}  // namespace kiln
