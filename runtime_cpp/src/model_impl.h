#pragma once
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <memory>
#include <optional>
#include <string>
#include <unordered_map>

#include "backend.h"
#include "kiln/model.h"

namespace kiln {

struct Model::Impl {
  explicit Impl(const std::string& directory) : artifact(directory) {}

  Artifact artifact;  // owns the mapping that the CPU's constants view
  const TargetSpec* target = nullptr;
  std::unique_ptr<Backend> backend;
  std::optional<Tokenizer> tokenizer;
  int64_t vocab_size = 0;
  at::Tensor blob;                                        // uint8, all weights
  std::unordered_map<std::string, at::Tensor> constants;  // views of blob, by fully qualified name
};

// Runs `f`; an error of torch (out of memory, a failed device) becomes an Error without its backtrace.
template <typename F>
auto guarded(F&& f) -> decltype(f()) {
  try {
    return f();
  } catch (const c10::Error& e) {
    fail(e.what_without_backtrace());
  }
}

at::ScalarType scalar_type(DType dtype);
std::string gigabytes(uint64_t bytes);  // "18.670 GB"

}  // namespace kiln
