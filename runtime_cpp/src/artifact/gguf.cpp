#include "artifact/gguf.h"

#include <algorithm>
#include <cctype>
#include <climits>
#include <cmath>
#include <cstdlib>
#include <cstring>

namespace kiln {

namespace {

constexpr uint64_t kMaxName = 1 << 16, kMaxKeys = 1 << 16, kMaxTensors = 1 << 20;  // more is no model
constexpr uint32_t kMaxDims = 4, kString = 8, kArray = 9;
constexpr int64_t kMaxParts = 9999;
constexpr uint64_t kValueBytes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};  // by value type; 0: string, array

// Reads front to back; whatever would leave the file is an Error.
class Cursor {
 public:
  explicit Cursor(const MappedFile& file) : file_(file), at_(file.data()), end_(file.data() + file.size()) {}

  void in(std::string what) { what_ = std::move(what); }
  const char* at() const { return at_; }
  uint64_t position() const { return static_cast<uint64_t>(at_ - file_.data()); }

  const char* skip(uint64_t bytes) {
    if (bytes > static_cast<uint64_t>(end_ - at_))
      fail(file_.path(), ": truncated at ", what_, " (byte ", position(), " of ", file_.size(), "); download the file again");
    const char* from = at_;
    at_ += bytes;
    return from;
  }
  template <typename T>
  T read() {
    T value;
    std::memcpy(&value, skip(sizeof value), sizeof value);
    return value;
  }
  std::string name() {
    auto length = read<uint64_t>();
    if (length > kMaxName) fail(file_.path(), ": ", what_, " has a name of ", length, " bytes; the file is damaged, download it again");
    return {skip(length), length};
  }
  // Past a value of `type`, or past the items of an array.
  void skip_value(uint32_t type, uint64_t count) {
    if (type == kString) {
      for (uint64_t i = 0; i < count; ++i) skip(read<uint64_t>());
      return;
    }
    if (type >= std::size(kValueBytes) || !kValueBytes[type]) damaged("has the unknown value type " + std::to_string(type));
    if (count > file_.size()) skip(UINT64_MAX);
    skip(count * kValueBytes[type]);
  }
  [[noreturn]] void damaged(const std::string& how) { fail(file_.path(), ": ", what_, " ", how, "; the file is damaged, download it again"); }

 private:
  const MappedFile& file_;
  const char* at_;
  const char* end_;
  std::string what_ = "the header";
};

template <typename T>
T value_of(const GgufValue& v) {
  T value;
  std::memcpy(&value, v.bytes.data(), sizeof value);
  return value;
}

// "NAME-00002-of-00003.gguf": what stands before and after the numbers; `count` must be that of the name.
struct SplitName {
  std::string stem, end;
  std::string path(int64_t i, int64_t count) const {
    char numbers[40];
    std::snprintf(numbers, sizeof numbers, "-%05lld-of-%05lld", static_cast<long long>(i + 1), static_cast<long long>(count));
    return stem + numbers + end;
  }
};
std::optional<SplitName> split_name(const std::string& path, int64_t count) {
  constexpr size_t kNumbers = 15;  // "-00002-of-00003"
  std::string end = path.size() > 5 ? path.substr(path.size() - 5) : "", lower = end;
  std::transform(lower.begin(), lower.end(), lower.begin(), [](unsigned char c) { return std::tolower(c); });
  if (lower != ".gguf") end.clear();
  if (path.size() < end.size() + kNumbers) return std::nullopt;
  size_t from = path.size() - end.size() - kNumbers;
  std::string numbers = path.substr(from, kNumbers);
  for (size_t i = 0; i < kNumbers; ++i) {
    const char want = "-ddddd-of-ddddd"[i];
    auto c = static_cast<unsigned char>(numbers[i]);
    if (want == 'd' ? !std::isdigit(c) : std::tolower(c) != want) return std::nullopt;
  }
  if (std::stoll(numbers.substr(10)) != count) return std::nullopt;
  return SplitName{path.substr(0, from), end};
}

}  // namespace

std::optional<int64_t> GgufFile::Header::number(const std::string& key) const {
  auto it = metadata.find(key);
  if (it == metadata.end()) return std::nullopt;
  double real = NAN;
  switch (const GgufValue& v = it->second; v.type) {
    case 0: return value_of<uint8_t>(v);
    case 1: return value_of<int8_t>(v);
    case 2: return value_of<uint16_t>(v);
    case 3: return value_of<int16_t>(v);
    case 4: return value_of<uint32_t>(v);
    case 5: return value_of<int32_t>(v);
    case 10: return value_of<uint64_t>(v) <= INT64_MAX ? std::optional(static_cast<int64_t>(value_of<uint64_t>(v))) : std::nullopt;
    case 11: return value_of<int64_t>(v);
    case 6: real = static_cast<double>(value_of<float>(v)); break;
    case 12: real = value_of<double>(v); break;
    default: break;
  }
  return std::fabs(real) < 1LL << 31 && real == std::floor(real) ? std::optional(static_cast<int64_t>(real)) : std::nullopt;
}

GgufFile::Header GgufFile::read_header(const MappedFile& file) {
  Cursor in(file);
  Header header;
  if (file.size() < 4 || std::memcmp(file.data(), "GGUF", 4) != 0) fail(file.path(), ": not a GGUF file; give the model's .gguf file");
  in.skip(4);
  if (auto version = in.read<uint32_t>(); version != 3)
    fail(file.path(), ": unsupported GGUF file: its version is ", version, "; convert it to little-endian GGUF version 3");
  const auto tensors = in.read<uint64_t>(), keys = in.read<uint64_t>();
  if (keys > kMaxKeys || tensors > kMaxTensors) in.damaged("counts " + std::to_string(keys) + " keys and " + std::to_string(tensors) + " tensors, more than any model has");
  for (uint64_t i = 0; i < keys; ++i) {
    in.in("metadata entry " + std::to_string(i));
    std::string key = in.name();
    in.in("metadata key " + key);
    GgufValue value{in.read<uint32_t>(), {}};
    const char* from = in.at();
    if (value.type == kArray) {
      auto item = in.read<uint32_t>();
      if (item == kArray) in.damaged("is an array of arrays");
      auto count = in.read<uint64_t>();
      in.skip_value(item, count);
    } else {
      in.skip_value(value.type, 1);
    }
    value.bytes = {from, static_cast<size_t>(in.at() - from)};
    if (!header.metadata.emplace(key, value).second) in.damaged("appears twice");
  }
  int64_t alignment = 32;
  if (header.metadata.count("general.alignment")) alignment = header.number("general.alignment").value_or(0);
  if (alignment < 1 || alignment > INT32_MAX || (alignment & (alignment - 1)))
    fail(file.path(), ": general.alignment is ", alignment, ", which is no power of two; convert the file again");
  const auto align = static_cast<uint64_t>(alignment);
  std::vector<std::pair<std::string, GgufTensor>> found;
  for (uint64_t i = 0; i < tensors; ++i) {
    in.in("tensor info " + std::to_string(i));
    std::string name = in.name();
    in.in("tensor " + name);
    GgufTensor t;
    auto dims = in.read<uint32_t>();
    if (dims < 1 || dims > kMaxDims) in.damaged("has " + std::to_string(dims) + " dimensions");
    int64_t elements = 1;
    for (uint32_t d = 0; d < dims; ++d) {
      auto size = in.read<uint64_t>();
      if (size > INT64_MAX || __builtin_mul_overflow(elements, std::max<int64_t>(static_cast<int64_t>(size), 1), &elements))
        in.damaged("has more elements than can be counted");
      t.shape.insert(t.shape.begin(), static_cast<int64_t>(size));
    }
    t.type = in.read<uint32_t>();
    t.offset = in.read<uint64_t>();
    if (t.offset % align) in.damaged("is misaligned: offset " + std::to_string(t.offset) + " is no multiple of " + std::to_string(align));
    found.emplace_back(std::move(name), std::move(t));
  }
  const uint64_t data = (in.position() + align - 1) / align * align;
  for (auto& [name, t] : found) {
    in.in("tensor " + name);
    if (t.offset > file.size() || data > file.size() - t.offset)
      fail(file.path(), ": truncated: tensor ", name, " begins at byte ", t.offset, " of the data, the file has ", file.size(), " bytes; download it again");
    t.offset += data;
    if (!header.tensors.emplace(name, std::move(t)).second) in.damaged("appears twice");
  }
  return header;
}

void GgufFile::add(std::shared_ptr<const MappedFile> file, Header header) {
  const size_t part = parts_.size();
  if (part == 0) metadata_ = std::move(header.metadata);
  for (auto& [name, t] : header.tensors) {
    t.part = part;
    if (!tensors_.emplace(name, std::move(t)).second) fail(file->path(), ": tensor ", name, " is in two parts; the file is damaged, convert it again");
  }
  parts_.push_back(std::move(file));
}

GgufFile::GgufFile(const std::string& path) : path_(path) {
  auto file = std::make_shared<const MappedFile>(path);
  Header header = read_header(*file);
  const bool split = header.metadata.count("split.count") != 0;
  const int64_t count = split ? header.number("split.count").value_or(-1) : 1;
  if (count < 0 || count > kMaxParts) fail(path, ": split.count is no number of files; the file is damaged, download it again");
  if (count <= 1) {
    add(std::move(file), std::move(header));
    return;
  }

  std::optional<SplitName> name = split_name(path, count);
  if (char real[PATH_MAX]; !name && realpath(path.c_str(), real)) name = split_name(real, count);
  if (!name) fail(path, ": part of a model split into ", count, " files; keep the names ", SplitName{"NAME", ".gguf"}.path(0, count), " and so on");
  std::optional<int64_t> expected;
  for (int64_t i = 0; i < count; ++i) {
    const std::string part = name->path(i, count);
    if (!file_exists(part)) fail(part, ": missing part ", i + 1, " of ", count, " of the split model; put all parts into one directory");
    auto opened = std::make_shared<const MappedFile>(part);
    Header h = read_header(*opened);
    if (h.number("split.no") != i || h.number("split.count") != count)
      fail(part, ": does not say that it is part ", i, " of ", count, " (split.no counts from 0); a part is of another model");
    if (i == 0) expected = h.number("split.tensors.count");
    add(std::move(opened), std::move(h));
  }
  if (expected && *expected != static_cast<int64_t>(tensors_.size()))
    fail(path, ": the split model has ", tensors_.size(), " tensors, split.tensors.count says ", *expected, "; a part is wrong");
}

}  // namespace kiln
