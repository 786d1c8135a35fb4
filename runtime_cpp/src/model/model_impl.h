#pragma once
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>

#include "model/backend.h"
#include "kiln/model.h"

namespace kiln {

struct Model::Impl {
  explicit Impl(const std::string& directory) : artifact(directory) {}

  Artifact artifact;  // owns the mapping that the CPU's constants view
  const TargetSpec* target = nullptr;
  std::unique_ptr<Package> package;
  std::unique_ptr<Backend> backend;
  std::optional<Tokenizer> tokenizer;
  int64_t vocab_size = 0;
  std::string identity;
  Tensor blob;                                        // uint8, all weights
  std::unordered_map<std::string, Tensor> constants;  // views of blob, by fully qualified name
};

std::string gigabytes(uint64_t bytes);  // "18.670 GB"

}  // namespace kiln
