#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "artifact/gguf.h"
#include "artifact/gguf_map.h"

namespace kiln {

// An artifact's constants where they are made of a GGUF file: which rows of which tensor go where in a piece of memory, and how. There are two
// pieces: the device's, and for some constants the host's.
class RawWeights {
 public:
  // Rows of one tensor, as they stand in its file.
  struct Piece {
    const MappedFile* file;
    uint64_t offset, rows, row_bytes;
    const Packing* packing;  // null: bytes go as they are
    uint64_t groups = 0, n = 0;             // of a packed matrix: blocks of a row; rows of the planes
    uint64_t words = 0, halves = 0;         // where its first row goes: bytes from the start of the memory; a plane that nobody asked for: kNone
    bool host = false;
  };
  static constexpr uint64_t kNone = UINT64_MAX;
  // What is small, or not as it is in a file: made already.
  struct Made {
    uint64_t at;
    std::string bytes;
    bool host = false;
  };

  // `host`: which constants lie in the host's memory. Error where the file is not one that the artifact can play; see GgufMap::check.
  RawWeights(const Artifact& artifact, const std::string& path, bool verify, const std::function<bool(const ConstantSpec&)>& host, std::vector<std::string>* notes);

  uint64_t bytes(bool host = false) const { return bytes_[host]; }  // of the device's memory; of the host's
  uint64_t raw_bytes() const { return raw_bytes_; }              // of the pieces in their files
  const std::vector<Piece>& pieces() const { return pieces_; }   // in the order of the files
  const std::vector<Made>& made() const { return made_; }
  uint64_t at(const std::string& constant) const { return places_.at(constant); }  // bytes from the start of its memory
  const GgufMap& map() const { return *map_; }

 private:
  void place_values(const ConstantSpec& c, uint64_t at, bool host);

  std::shared_ptr<const GgufMap> map_;
  GgufFile file_;
  uint64_t bytes_[2] = {0, 0}, raw_bytes_ = 0;
  std::vector<Piece> pieces_;
  std::vector<Made> made_;
  std::map<std::string, uint64_t> places_;
};

}  // namespace kiln
