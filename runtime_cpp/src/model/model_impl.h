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
  // Whether a constant lies in the host's memory, where the device is a GPU.
  bool on_host(const ConstantSpec& c) const { return c.gathered && target->cuda && (ple.empty() ? c.host : ple == "host"); }
  void count(MemoryReport* report) const {
    for (const ConstantSpec& c : artifact.constants) (on_host(c) ? report->host_weights : report->weights) += c.bytes;
  }
  // Its weights, `offset` bytes from the start of their memory.
  void bind(const ConstantSpec& c, uint64_t offset) {
    constants.emplace(c.name, Tensor::over(static_cast<char*>(blobs[on_host(c)].data()) + offset, backend->device(), scalar_of(c.dtype), c.shape));
  }
  std::string ple;                                    // as LoadOptions
  Tensor blobs[2];                                    // uint8, all weights: on the device; in pinned memory of the host, which a GPU reads at its addresses
  std::unordered_map<std::string, Tensor> constants;  // views of them, by fully qualified name
};

std::string gigabytes(uint64_t bytes);  // "18.670 GB"

}  // namespace kiln
