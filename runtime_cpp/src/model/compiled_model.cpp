#include "model/compiled_model.h"

#include <algorithm>

#include "cpu/ops.h"
#include "cpu/parallel.h"

namespace kiln {

namespace {

constexpr uintptr_t kAlignment = 16;  // of a constant, as compiled code assumes
constexpr uint64_t kPadding = 64;      // AOTInductor counts constants of the CPU in blocks

size_t index_of(const std::vector<ValueSpec>& values, const char* name) {
  auto it = std::find_if(values.begin(), values.end(), [&](const ValueSpec& v) { return v.name == name; });
  return static_cast<size_t>(it - values.begin());
}

}  // namespace

CompiledModel::CompiledModel(const Model::Impl& model, const std::string& entry, Surroundings& surroundings)
    : where_(model.package->path() + ": " + entry),
      point_(model.artifact.entry(entry)),
      library_(model.package->library(entry)),
      surroundings_(surroundings),
      token_(index_of(point_.outputs, "token")),
      logits_(index_of(point_.outputs, "logits")),
      hidden_(index_of(point_.outputs, "hidden")) {
  Running running(surroundings_);
  check(library_.create(&container_, 1, surroundings_.device.str().c_str(), nullptr), "cannot be set up");
  size_t inputs = 0, outputs = 0;
  check(library_.count_inputs(container_, &inputs), "cannot be asked for its inputs");
  check(library_.count_outputs(container_, &outputs), "cannot be asked for its outputs");
  if (inputs != point_.inputs.size() || outputs != point_.outputs.size()) {
    library_.destroy(container_);
    fail(where_, ": takes ", inputs, " inputs and gives ", outputs, ", the manifest says ", point_.inputs.size(), " and ", point_.outputs.size(),
         "; export the model again");
  }
}

CompiledModel::~CompiledModel() {
  Running running(surroundings_);
  library_.destroy(container_);
  for (Tensor* handle : kept_) delete handle;
}

std::set<std::string> CompiledModel::bind(const TensorMap& tensors) {
  size_t count = 0;
  check(library_.count_constants(container_, &count), "cannot be asked for its constants");
  std::set<std::string> names;
  std::vector<Tensor> used;
  std::vector<Library::NamedTensor> pairs;
  used.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const char *inner = nullptr, *fqn = nullptr;
    int32_t dtype = 0;
    size_t bytes = 0;
    check(library_.constant_name(container_, i, &inner), "cannot be asked for a constant");
    check(library_.constant_fqn(container_, i, &fqn), "cannot be asked for a constant");
    check(library_.constant_dtype(container_, i, &dtype), "cannot be asked for a constant");
    check(library_.constant_bytes(container_, i, &bytes), "cannot be asked for a constant");
    auto it = tensors.find(fqn);
    if (it == tensors.end()) fail(where_, ": uses the constant '", fqn, "', which the manifest does not name");
    const Tensor& t = it->second;
    auto declared = library_.constants().find(fqn);
    if (declared == library_.constants().end()) fail(where_, ": does not say what '", fqn, "' is; export the model again");
    const std::vector<int64_t> shape(t.sizes.begin(), t.sizes.begin() + t.dims);
    if (declared->second.scalar != t.scalar || dtype != static_cast<int32_t>(t.scalar))
      fail(where_, ": wants '", fqn, "' as ", scalar_name(declared->second.scalar), ", the manifest has ", scalar_name(t.scalar));
    if (declared->second.shape != shape) fail(where_, ": wants '", fqn, "' as ", shape_text(declared->second.shape), ", the manifest has ", shape_text(shape));
    if (bytes != t.bytes() && bytes != (t.bytes() + kPadding - 1) / kPadding * kPadding) fail(where_, ": wants ", bytes, " bytes of '", fqn, "', which has ", t.bytes(), "; export the model again");
    if (reinterpret_cast<uintptr_t>(t.data()) % kAlignment) fail(where_, ": '", fqn, "' is not aligned to ", kAlignment, " bytes");
    names.insert(fqn);
    pairs.push_back({inner, &used.emplace_back(t)});
  }
  if (names.size() != count) fail(where_, ": two of its constants have one name; export the model again");
  Surroundings binding = surroundings_;
  binding.kept = &kept_;  // the container makes handles of its own and never deletes them
  Running running(binding);
  if (count) check(library_.bind(container_, pairs.data(), count, /*inactive=*/false, /*full=*/true), "cannot be given its constants");
  return names;
}

CompiledModel::Output CompiledModel::run(const TensorMap& values) {
  std::vector<Tensor*> inputs, outputs(point_.outputs.size(), nullptr);
  for (const ValueSpec& v : point_.inputs) inputs.push_back(new Tensor(values.at(v.name)));  // the model deletes them
  Running running(surroundings_);
  omp_set_num_threads(cpu_threads());  // of this thread's parallel regions
  check(library_.run(container_, inputs.data(), inputs.size(), outputs.data(), outputs.size(), surroundings_.stream, nullptr), "failed");
  Output out{std::move(*outputs[token_]), std::move(*outputs[logits_]), hidden_ < outputs.size() ? std::move(*outputs[hidden_]) : Tensor()};
  for (Tensor* handle : outputs) delete handle;
  return out;
}

Tensor line_of(const Tensor& lines, int64_t at) {
  if (!lines.dense() || lines.dims != 2) fail("internal error: rows with gaps");
  const uint64_t bytes = static_cast<uint64_t>(lines.sizes[1]) * scalar_bytes(lines.scalar);
  return Tensor::over(static_cast<char*>(lines.data()) + static_cast<uint64_t>(at) * bytes, lines.device, lines.scalar, {1, lines.sizes[1]});
}

}  // namespace kiln
