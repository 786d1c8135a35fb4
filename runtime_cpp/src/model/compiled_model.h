#pragma once
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "compiled/package.h"
#include "compiled/shims.h"
#include "model/model_impl.h"

namespace kiln {

using TensorMap = std::unordered_map<std::string, Tensor>;

// One entry point of the package, opened for one session or row.
class CompiledModel {
 public:
  // `surroundings`: memory, device and stream of its calls; it outlives this object.
  CompiledModel(const Model::Impl& model, const std::string& entry, Surroundings& surroundings);
  ~CompiledModel();
  CompiledModel(const CompiledModel&) = delete;
  CompiledModel& operator=(const CompiledModel&) = delete;

  // Gives the compiled model its constants, which are `tensors` by fully qualified name: each is checked for dtype, shape, size and alignment
  // against what the code was compiled for. Returns the names it uses. The tensors' bytes stay where they are for as long as this object lives.
  std::set<std::string> bind(const TensorMap& tensors);

  struct Output {
    Tensor token, logits;  // [1] int64, [1, V] float32
    Tensor hidden;         // [1, D] float32, for a drafter; undefined: the entry gives none
  };
  Output run(const TensorMap& values);

 private:
  template <typename... Parts>
  void check(int code, const Parts&... doing) {
    if (std::string why = code ? take_model_error() : ""; code) fail(where_, ": ", doing..., ": ", why);
  }

  std::string where_;  // "artifact/model.pt2: prefill"
  const EntryPoint& point_;
  const Library& library_;
  Surroundings& surroundings_;
  size_t token_, logits_, hidden_;
  Library::Container container_ = nullptr;
  std::vector<Tensor*> kept_;
};

// Line `at` of [M, N], as [1, N]: of logits or hidden rows of a step of several tokens, what one of them has.
Tensor line_of(const Tensor& lines, int64_t at);

constexpr int64_t kColdRuns = 2;  // of an entry, that load its code: they are not what it costs, and on a GPU the next one can be recorded

}  // namespace kiln
