#include "artifact/raw_weights.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace kiln {

namespace {

constexpr uint64_t kAlignment = 256;

float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t{h & 0x8000u} << 16, exponent = (h >> 10) & 31, fraction = h & 0x3FFu;
  float value = 0;
  uint32_t bits = 0;
  if (exponent == 0) {  // zero and subnormal numbers are exact in float32
    value = std::ldexp(static_cast<float>(fraction), -24);
    std::memcpy(&bits, &value, sizeof bits);
    bits |= sign;
  } else {
    bits = sign | (exponent == 31 ? 0x7F800000u : (exponent + 112) << 23) | fraction << 13;
  }
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Elements of a GGUF float type as float32.
std::string as_float32(const std::string& type, const std::string& raw) {
  if (type == "F32") return raw;
  std::string out(raw.size() * 2, '\0');
  for (size_t i = 0; i < raw.size() / 2; ++i) {
    uint16_t bits = 0;
    std::memcpy(&bits, &raw[2 * i], sizeof bits);
    const uint32_t wide = uint32_t{bits} << 16;
    float value = half_to_float(bits);
    if (type == "BF16") std::memcpy(&value, &wide, sizeof value);
    std::memcpy(&out[4 * i], &value, sizeof value);
  }
  return out;
}

}  // namespace

RawWeights::RawWeights(const Artifact& artifact, const std::string& path, bool verify, const std::function<bool(const ConstantSpec&)>& host,
                       std::vector<std::string>* notes)
    : map_(artifact.gguf), file_(path) {
  map_->check(file_, verify, notes);
  for (const ConstantSpec& c : artifact.constants) {
    uint64_t& bytes = bytes_[host(c)];
    places_[c.name] = bytes;
    if (__builtin_add_overflow(bytes, (c.bytes + kAlignment - 1) / kAlignment * kAlignment, &bytes)) fail(artifact.directory(), ": its constants cannot be counted");
  }
  std::map<std::string, Piece> packed;  // by tensor: words and halves are two constants of it
  for (const ConstantSpec& c : artifact.constants) {
    const uint64_t at = places_[c.name];
    const bool on_host = host(c);
    if (!c.made()) {
      made_.push_back({at, std::string(artifact.weights->data() + c.offset, c.bytes), on_host});
      continue;
    }
    if (c.plane == "values") {
      place_values(c, at, on_host);
      continue;
    }
    uint64_t row = 0;
    for (const std::string& name : c.tensors) {
      const GgufMap::Tensor& t = map_->tensor(name);
      const GgufTensor& found = file_.tensors().at(name);
      const Packing& packing = map_->packings().at(t.type);
      const auto rows = static_cast<uint64_t>(t.rows()), groups = static_cast<uint64_t>(t.shape.back()) / packing.elements();
      Piece& piece = packed.emplace(name, Piece{&file_.part(found.part), found.offset, rows, groups * packing.bytes(), &packing, groups,
                                                static_cast<uint64_t>(c.shape.back()), kNone, kNone, on_host}).first->second;
      uint64_t& place = c.plane == "words" ? piece.words : piece.halves;
      if (place != kNone || piece.n != static_cast<uint64_t>(c.shape.back()) || piece.host != on_host) fail(artifact.directory(), ": two constants are made of tensor ", name);
      place = at + row * dtype_bytes(c.dtype);
      row += rows;
    }
  }
  for (const auto& [name, piece] : packed) {
    if (piece.words == kNone || piece.halves == kNone) fail(artifact.directory(), ": of tensor ", name, " one plane is missing");
    pieces_.push_back(piece);
  }
  std::vector<const MappedFile*> parts;
  for (size_t i = 0; i < file_.part_count(); ++i) parts.push_back(&file_.part(i));
  auto place = [&](const Piece& p) { return std::pair(std::find(parts.begin(), parts.end(), p.file), p.offset); };
  std::sort(pieces_.begin(), pieces_.end(), [&](const Piece& a, const Piece& b) { return place(a) < place(b); });
  for (const Piece& p : pieces_) raw_bytes_ += p.rows * p.row_bytes;
}

void RawWeights::place_values(const ConstantSpec& c, uint64_t at, bool host) {
  for (const std::string& name : c.tensors) {
    const GgufMap::Tensor& t = map_->tensor(name);
    const GgufTensor& found = file_.tensors().at(name);
    const MappedFile& part = file_.part(found.part);
    if (!t.vector) {
      const auto rows = static_cast<uint64_t>(t.rows());
      const uint64_t row_bytes = map_->bytes(t) / rows;
      Piece piece{&part, found.offset, rows, row_bytes, nullptr};
      piece.words = at;
      piece.host = host;
      pieces_.push_back(piece);
      at += rows * row_bytes;
      continue;
    }
    GgufMap::Tensor actual = t;
    actual.type = map_->type_name(found.type);
    std::string raw(map_->bytes(actual), '\0');
    part.read(found.offset, raw.size(), raw.data(), 1);
    std::string values = as_float32(actual.type, raw);
    for (size_t i = 0; c.limit > 0 && i < values.size() / sizeof(float); ++i) {
      float value = 0;
      std::memcpy(&value, &values[i * sizeof value], sizeof value);
      if (!(std::fabs(value) <= c.limit))
        fail(file_.path(), ": tensor ", name, ", element ", i, ": ", value, ", the artifact's caches hold what at most ", c.limit, " makes; export it for this file with --kv-cache bf16");
    }
    const uint64_t size = values.size();
    made_.push_back({at, std::move(values), host});
    at += size;
  }
}

}  // namespace kiln
