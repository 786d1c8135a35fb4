#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "artifact/file.h"

namespace kiln {

struct GgufTensor {
  std::vector<int64_t> shape;  // rows first
  uint32_t type = 0;           // GGML's number
  size_t part = 0;             // of the parts of a split model
  uint64_t offset = 0;         // from the start of the part; a tensor's bytes are in the file only if read() finds them there
};

// A metadata value as it stands in the file. `type` 9 is an array: item type, count and items.
struct GgufValue {
  uint32_t type = 0;
  std::string_view bytes;
};

// A GGUF file of version 3, or all parts of a split one, given any of them: metadata and the tensors' names, types, shapes and places. What the
// types mean is not known here. Throws Error for whatever cannot be such a file.
class GgufFile {
 public:
  explicit GgufFile(const std::string& path);

  const std::string& path() const { return path_; }
  const std::map<std::string, GgufTensor>& tensors() const { return tensors_; }
  const std::map<std::string, GgufValue>& metadata() const { return metadata_; }  // of the first part
  const MappedFile& part(size_t i) const { return *parts_[i]; }
  size_t part_count() const { return parts_.size(); }

 private:
  struct Header {
    std::map<std::string, GgufValue> metadata;
    std::map<std::string, GgufTensor> tensors;
    std::optional<int64_t> number(const std::string& key) const;  // of an integer or a whole float
  };
  static Header read_header(const MappedFile& file);
  void add(std::shared_ptr<const MappedFile> file, Header header);

  std::string path_;
  std::vector<std::shared_ptr<const MappedFile>> parts_;
  std::map<std::string, GgufValue> metadata_;
  std::map<std::string, GgufTensor> tensors_;
};

}  // namespace kiln
