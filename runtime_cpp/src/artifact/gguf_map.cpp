#include "artifact/gguf_map.h"

#include <algorithm>
#include <cstring>

#include "artifact/gguf.h"
#include "artifact/sha256.h"

namespace kiln {

namespace {

constexpr const char* kAgain = "; export it for this file, or play it by `kiln run FILE`";

std::vector<int64_t> shape_of(const Json& array) {
  std::vector<int64_t> shape;
  for (const Json& d : array) shape.push_back(d.as_int());
  return shape;
}

std::vector<std::string> strings(const Json& array) {
  std::vector<std::string> found;
  for (const Json& s : array) found.emplace_back(s.as_string());
  return found;
}

// "blk.*": what the star stands for may be anything; without one, the name itself.
bool matches(const std::vector<std::string>& patterns, std::string_view name) {
  return std::any_of(patterns.begin(), patterns.end(), [&](std::string_view p) {
    size_t star = p.find('*');
    if (star == std::string_view::npos) return p == name;
    std::string_view end = p.substr(star + 1);
    return name.size() >= p.size() - 1 && name.substr(0, star) == p.substr(0, star) && name.substr(name.size() - end.size()) == end;
  });
}

// Of a float type: bytes of an element; 0: it is none. As named in the file and in the manifest's dtypes.
struct Float {
  const char* type;
  DType dtype;
};
constexpr Float kFloats[] = {{"F32", DType::F32}, {"F16", DType::F16}, {"BF16", DType::BF16}};
const Float* float_type(const std::string& name) {
  for (const Float& f : kFloats)
    if (name == f.type) return &f;
  return nullptr;
}

std::map<std::string, std::optional<std::string>> digests(const Json& object) {
  std::map<std::string, std::optional<std::string>> found;
  for (size_t i = 0; i < object.size(); ++i) {
    const Json& v = object.value(i);
    found.emplace(object.key(i), v.is_null() ? std::nullopt : std::optional(std::string(v.as_string())));
  }
  return found;
}

// Of the value's type, as a little-endian number of four bytes, and its bytes.
std::optional<std::string> digest(const GgufFile& file, const std::string& key) {
  auto it = file.metadata().find(key);
  if (it == file.metadata().end()) return std::nullopt;
  std::string bytes(sizeof it->second.type, '\0');
  std::memcpy(bytes.data(), &it->second.type, sizeof it->second.type);
  bytes += it->second.bytes;
  return sha256(bytes.data(), bytes.size());
}

}  // namespace

int64_t GgufMap::Tensor::rows() const {
  int64_t n = shape[0];
  for (size_t i = 1; i + !vector < shape.size(); ++i) n *= shape[i];
  return n;
}

GgufMap::GgufMap(const Json& object, const std::vector<ConstantSpec>& constants) : file_(object.at("file").as_string()) {
  const Json& types = object.at("types");
  for (size_t i = 0; i < types.size(); ++i) {
    int64_t number = types.value(i).as_int();
    if (number < 0 || number > UINT32_MAX) fail("'types': '", types.key(i), "' is ", number);
    types_.emplace(types.key(i), static_cast<uint32_t>(number));
  }
  const Json& packings = object.at("packings");
  for (size_t i = 0; i < packings.size(); ++i) packings_.emplace(packings.key(i), Packing(packings.value(i)));
  for (const Json& t : object.at("tensors")) {
    Tensor tensor{std::string(t.at("name").as_string()), std::string(t.at("type").as_string()), shape_of(t.at("shape")), "", false, false};
    if (const Json* hash = t.find("sha256")) tensor.sha256 = std::string(hash->as_string());
    if (const Json* fixed = t.find("fixed")) tensor.fixed = fixed->as_bool();
    if (tensor.fixed && tensor.sha256.empty()) fail("'tensors': '", tensor.name, "' is fixed and has no 'sha256'");
    if (!types_.count(tensor.type)) fail("'tensors': '", tensor.name, "' has the type ", tensor.type, ", which 'types' does not number");
    if (!float_type(tensor.type) && !packings_.count(tensor.type)) fail("'tensors': '", tensor.name, "' has the type ", tensor.type, ", which 'packings' does not have");
    bytes(tensor);  // neither sizes nor their product may leave what can be counted
    if (!tensors_.emplace(tensor.name, tensor).second) fail("'tensors': '", tensor.name, "' is there twice");
  }
  unused_ = strings(object.at("unused"));
  const Json& metadata = object.at("metadata");
  checked_ = strings(metadata.at("checked"));
  free_ = strings(metadata.at("free"));
  equal_ = digests(metadata.at("equal"));
  noted_ = digests(metadata.at("noted"));
  for (const ConstantSpec& c : constants)
    if (c.made()) check_constant(c);
}

void GgufMap::check_constant(const ConstantSpec& c) {
  auto wrong = [&](const auto&... how) { fail("'", c.name, "', made of '", c.tensors.empty() ? "" : c.tensors[0], "': ", how...); };
  if (c.tensors.empty()) wrong("no tensors");
  const Packing* packing = nullptr;
  int64_t rows = 0;
  std::vector<int64_t> rest;  // the size of a row; none of a vector
  for (const std::string& name : c.tensors) {
    auto it = tensors_.find(name);
    if (it == tensors_.end()) wrong("'tensors' does not have ", name);
    Tensor& t = it->second;
    if (t.type != tensor(c.tensors[0]).type || t.shape.size() != tensor(c.tensors[0]).shape.size()) wrong(name, " has another type or other sizes");
    const bool vector = c.plane == "values" && c.shape.size() == 1 && c.dtype == DType::F32;  // whatever sizes its elements have in the file
    t.vector = vector;
    if (__builtin_add_overflow(rows, t.rows(), &rows)) wrong(name, " has too many rows");
    std::vector<int64_t> row;
    if (t.shape.size() > 1 && !vector) row.push_back(t.shape.back());
    if (name != c.tensors[0] && row != rest) wrong(name, " has rows of another length");
    rest = row;
    if (c.plane == "values") {
      if (!float_type(t.type) || (!vector && float_type(t.type)->dtype != c.dtype)) wrong(name, " is ", t.type);
    } else {
      auto p = packings_.find(t.type);
      if (p == packings_.end() || rest.empty()) wrong(name, " cannot be packed");
      packing = &p->second;
    }
  }
  std::vector<int64_t> shape{rows};
  DType dtype = c.dtype;
  if (packing) {
    const bool words = c.plane == "words";
    if (!words && c.plane != "halves") wrong("there is no plane '", c.plane, "'");
    const Packing::Plane& plane = words ? packing->words() : packing->halves();
    shape = {rest[0] / static_cast<int64_t>(packing->elements()), static_cast<int64_t>(plane.units.size()), rows};
    dtype = words ? DType::I32 : c.dtype == DType::I16 ? DType::I16 : DType::F16;  // int16: some halves are no float16 values
  } else {
    shape.insert(shape.end(), rest.begin(), rest.end());
  }
  if (shape != c.shape || dtype != c.dtype)
    wrong("is ", dtype_name(c.dtype), " ", shape_text(c.shape), ", they make ", dtype_name(dtype), " ", shape_text(shape));
}

uint64_t GgufMap::bytes(const Tensor& t) const {
  const Float* f = float_type(t.type);
  uint64_t elements = 1, unit = f ? 1 : packings_.at(t.type).elements(), size = f ? dtype_bytes(f->dtype) : packings_.at(t.type).bytes();
  bool good = !t.shape.empty();
  for (int64_t d : t.shape) good = good && d > 0 && !__builtin_mul_overflow(elements, static_cast<uint64_t>(d), &elements);
  if (!good || static_cast<uint64_t>(t.shape.back()) % unit || __builtin_mul_overflow(elements / unit, size, &size) || size > INT64_MAX)
    fail("'", t.name, "': shape ", shape_text(t.shape), " of ", t.type);
  return size;
}

std::string GgufMap::type_name(uint32_t number) const {
  for (const auto& [name, n] : types_)
    if (n == number) return name;
  return "type " + std::to_string(number);
}

void GgufMap::check_metadata(const GgufFile& file, std::vector<std::string>* notes) const {
  for (const auto& [key, want] : equal_)
    if (std::optional<std::string> found = digest(file, key); found != want)
      fail(file.path(), ": metadata key ", key, !found ? " is missing" : !want ? " is there, which it is not in the file that the artifact was made of"
                                                                               : " has another value than in the file that the artifact was made of",
           kAgain);
  for (const auto& [key, value] : file.metadata())
    if (matches(checked_, key) && !equal_.count(key) && !matches(free_, key))
      fail(file.path(), ": metadata key ", key, " is there, of which the artifact knows nothing", kAgain);
  for (const auto& [key, want] : noted_)
    if (digest(file, key) != want)
      notes->push_back(file.path() + ": metadata key " + key + " differs from that of the file that the artifact was made of; the artifact's is in force");
}

void GgufMap::check(const GgufFile& file, bool verify, std::vector<std::string>* notes) const {
  for (const auto& [name, t] : tensors_) {
    auto it = file.tensors().find(name);
    if (it == file.tensors().end()) fail(file.path(), ": tensor ", name, " is missing, expected with shape ", shape_text(t.shape), kAgain);
    const GgufTensor& found = it->second;
    if (found.shape != t.shape) fail(file.path(), ": tensor ", name, " has shape ", shape_text(found.shape), ", the artifact was made for ", shape_text(t.shape), kAgain);
    const std::string type = type_name(found.type);
    if (type != t.type && !(t.vector && float_type(type))) fail(file.path(), ": tensor ", name, " is of type ", type, ", the artifact was made for ", t.type, kAgain);
    Tensor actual = t;
    actual.type = type;
    const MappedFile& part = file.part(found.part);
    if (uint64_t size = bytes(actual); size > part.size() || found.offset > part.size() - size)
      fail(part.path(), ": truncated: tensor ", name, " ends at byte ", found.offset + size, ", the file has ", part.size(), "; download it again");
  }
  for (const auto& [name, t] : file.tensors())
    if (!tensors_.count(name) && !matches(unused_, name)) fail(file.path(), ": tensor ", name, " is there, of which the artifact knows nothing", kAgain);
  check_metadata(file, notes);
  for (const auto& [name, t] : tensors_) {
    if (t.sha256.empty() || !(t.fixed || verify)) continue;
    const GgufTensor& found = file.tensors().at(name);
    if (type_name(found.type) != t.type) continue;  // a vector of another float type
    std::string hash = sha256(file.part(found.part).data() + found.offset, bytes(t));
    if (hash != t.sha256)
      fail(file.path(), ": tensor ", name, " has other values than in the file that the artifact was made of",
           t.fixed ? ", and those are part of its code" : ": another file, or damaged", kAgain);
  }
}

}  // namespace kiln
