#include "caches/not_finite.h"

#include <algorithm>
#include <cstring>
#include <optional>

#include "artifact/gguf_map.h"
#include "caches/slots.h"

namespace kiln {

namespace {

constexpr int64_t kPiece = 1 << 22;  // elements read at a time

// An exponent of ones.
struct Exponent {
  uint64_t bytes;
  uint32_t ones;
};
std::optional<Exponent> exponent_of(DType dtype) {
  switch (dtype) {
    case DType::F16: return Exponent{2, 0x7C00};
    case DType::BF16: return Exponent{2, 0x7F80};
    case DType::F32: return Exponent{4, 0x7F800000};
    default: return std::nullopt;
  }
}

// The first of `n` elements that is not finite, or -1.
int64_t first_bad(const char* data, int64_t n, const Exponent& e) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits = 0;
    std::memcpy(&bits, data + static_cast<uint64_t>(i) * e.bytes, e.bytes);
    if ((bits & e.ones) == e.ones) return i;
  }
  return -1;
}

int64_t product(const std::vector<int64_t>& shape, size_t from, size_t to) {
  int64_t n = 1;
  for (size_t i = from; i < to; ++i) n *= shape[i];
  return n;
}

// The lowest position below `positions` whose entry in the cache is not finite, or -1.
int64_t first_bad_position(const KvSpec& spec, int64_t max_seq_len, const Exponent& e, Timeline& timeline, const Tensor& cache, int64_t positions) {
  const Slots layout(spec, max_seq_len);
  const int64_t heads = layout.outer, slots = layout.slots, width = static_cast<int64_t>(layout.width / e.bytes);
  const int64_t used = layout.used(positions), oldest = std::max<int64_t>(positions - layout.behind, 0) - used;
  std::vector<char> host;
  int64_t found = -1;
  for (int64_t head = 0; head < heads && width > 0; ++head)
    for (int64_t slot = 0, rows; slot < used; slot += rows) {
      rows = std::min(used - slot, std::max<int64_t>(1, kPiece / width));
      Tensor piece = cache;
      piece.offset += (head * slots + slot) * width;
      piece.set_shape({rows * width});
      host.resize(piece.bytes());
      timeline.read(host.data(), piece);
      for (int64_t r = 0; r < rows; ++r) {
        if (first_bad(host.data() + static_cast<uint64_t>(r * width) * e.bytes, width, e) < 0) continue;
        if (spec.prefix) return spec.behind;
        int64_t position = oldest + (slot + r - oldest % slots + slots) % slots;
        if (found < 0 || position < found) found = position;
      }
    }
  return found;
}

// Of the state after `positions` tokens.
bool bad_state(const KvSpec& spec, const Exponent& e, Timeline& timeline, const Tensor& cache, int64_t positions) {
  const int64_t width = product(spec.shape, 1, spec.shape.size());
  std::vector<char> host;
  for (int64_t at = 0, n; at < width; at += n) {
    n = std::min(kPiece, width - at);
    Tensor piece = cache;
    piece.offset += positions % kStateSlots * width + at;
    piece.set_shape({n});
    host.resize(piece.bytes());
    timeline.read(host.data(), piece);
    if (first_bad(host.data(), n, e) >= 0) return true;
  }
  return false;
}

std::string first_bad_cache(const Artifact& artifact, Timeline& timeline, const TensorMap& caches, int64_t positions) {
  const KvSpec *first = nullptr, *state = nullptr;  // the lowest position that is bad; the lowest layer, for a state has no positions
  int64_t found = -1;
  for (const KvSpec& spec : artifact.kv) {
    auto e = exponent_of(spec.dtype);
    if (!e) continue;
    if (spec.state) {
      if ((!state || spec.layer < state->layer) && bad_state(spec, *e, timeline, caches.at(spec.name), positions)) state = &spec;
      continue;
    }
    int64_t position = first_bad_position(spec, artifact.max_seq_len, *e, timeline, caches.at(spec.name), positions);
    if (position >= 0 && (!first || std::pair(position, spec.layer) < std::pair(found, first->layer))) first = &spec, found = position;
  }
  if (state && (!first || state->layer < first->layer))
    return "the first operator is in layer " + std::to_string(state->layer) + " or right before it: '" + state->name + "' is not finite";
  if (!first) return "all cached keys and values are finite, so the first operator is behind the last layer's caches";
  return "the first operator is in layer " + std::to_string(first->layer) + " or right before it: '" + first->name + "' is not finite at position " +
         std::to_string(found);
}

// The row of the matrix that element `i` of a constant belongs to: halves of packed weights have rows innermost.
int64_t row_of(const ConstantSpec& c, int64_t i) {
  constexpr std::string_view kHalves = ".halves";
  bool packed = c.name.size() > kHalves.size() && c.name.compare(c.name.size() - kHalves.size(), kHalves.size(), kHalves) == 0;
  if (c.shape.empty()) return 0;
  return packed ? i % c.shape.back() : i / std::max<int64_t>(1, product(c.shape, 1, c.shape.size()));
}

// The first element of a constant that is not finite, or -1.
int64_t first_bad_element(const ConstantSpec& c, const Exponent& e, Timeline& timeline, const Tensor& constant) {
  const auto count = static_cast<int64_t>(c.bytes / e.bytes);
  std::vector<char> host;
  for (int64_t at = 0; at < count; at += kPiece) {
    Tensor piece = constant;
    piece.offset += at;
    piece.set_shape({std::min(kPiece, count - at)});
    host.resize(piece.bytes());
    timeline.read(host.data(), piece);
    if (int64_t i = first_bad(host.data(), piece.numel(), e); i >= 0) return at + i;
  }
  return -1;
}

// "'NAME' .. in row 3"; of a constant that is made of a GGUF file's tensors also which of them that is.
std::string bad_row(const Artifact& artifact, const ConstantSpec& c, int64_t row) {
  std::string text = "'" + c.name + "' has a number that is not finite in row " + std::to_string(row);
  for (const std::string& name : c.tensors) {
    int64_t rows = artifact.gguf->tensor(name).rows();
    if (row < rows) return text + " (row " + std::to_string(row) + " of tensor " + name + ")";
    row -= rows;
  }
  return text;
}

std::string bad_weights(const Artifact& artifact, Timeline& timeline, const TensorMap& constants) {
  std::string first;
  int64_t tensors = 0;
  for (const ConstantSpec& c : artifact.constants) {
    auto e = exponent_of(c.dtype);
    if (!e) continue;
    int64_t i = first_bad_element(c, *e, timeline, constants.at(c.name));
    if (i >= 0 && ++tensors == 1) first = bad_row(artifact, c, row_of(c, i));
  }
  if (!tensors) return "all weights are finite";
  return first + (tensors > 1 ? ", and " + std::to_string(tensors - 1) + " more weights have such" : "") +
         (artifact.gguf ? "; use a sound file" : "; make the artifact again from a sound file");
}

}  // namespace

std::string trace_not_finite(const Artifact& artifact, Timeline& timeline, const TensorMap& constants, const TensorMap& caches, int64_t positions) {
  return first_bad_cache(artifact, timeline, caches, positions) + "; " + bad_weights(artifact, timeline, constants);
}

}  // namespace kiln
