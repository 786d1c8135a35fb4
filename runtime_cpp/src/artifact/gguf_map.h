#pragma once
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "artifact/packing.h"
#include "kiln/artifact.h"

namespace kiln {

class GgufFile;

// Of an artifact without weights: which tensors of a GGUF file its constants are made of, and what else such a file must agree in.
class GgufMap {
 public:
  struct Tensor {
    std::string name, type;
    std::vector<int64_t> shape;  // rows first
    std::string sha256;          // of its bytes; empty: not known
    bool fixed = false;          // its values are part of the artifact's own constants: other bytes are refused
    bool vector = false;         // made into float32: any float type will do

    int64_t rows() const;  // of a matrix, or of a stack of them; a vector's elements
  };

  // `object`: "weights"."gguf" of a manifest. Constants that are made of tensors are checked against them. Error for what does not fit together.
  GgufMap(const Json& object, const std::vector<ConstantSpec>& constants);

  const std::string& file() const { return file_; }  // the name of the one that the artifact was made of
  const Tensor& tensor(const std::string& name) const { return tensors_.at(name); }
  const std::map<std::string, Tensor>& tensors() const { return tensors_; }
  const std::map<std::string, Packing>& packings() const { return packings_; }

  // Error, which says what differs and how, unless the file's metadata, tensors, types and shapes are those that the artifact was made for. Every
  // mapped tensor lies in its file. `verify`: also where the bytes of a tensor are others than those that the artifact was made of, if it says so.
  // What differs without making the file another model's is added to `notes`, a line each.
  void check(const GgufFile& file, bool verify, std::vector<std::string>* notes) const;

  std::string type_name(uint32_t number) const;  // "Q4_K", or "type 77"
  // Bytes of the tensor in its file.
  uint64_t bytes(const Tensor& t) const;

 private:
  void check_metadata(const GgufFile& file, std::vector<std::string>* notes) const;
  void check_constant(const ConstantSpec& c);

  std::string file_;
  std::map<std::string, uint32_t> types_;  // GGML's numbers
  std::map<std::string, Packing> packings_;
  std::map<std::string, Tensor> tensors_;
  std::vector<std::string> unused_, checked_, free_;              // patterns
  std::map<std::string, std::optional<std::string>> equal_, noted_;  // key -> SHA-256 of its value; nullopt: absent
};

}  // namespace kiln
