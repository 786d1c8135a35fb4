#include "batch/entries.h"

#include <algorithm>
#include <numeric>

namespace kiln {

Entries::Entries(const Model::Impl& shared, Timeline& timeline, const BatchOptions& options)
    : shared_(shared), timeline_(timeline), options_(options), prefills_(static_cast<size_t>(options.rows)), decodes_(prefills_.size()) {
  prefill_surroundings_ = timeline_.surroundings("prefill");
  decode_surroundings_ = timeline_.surroundings("decode");
  make_caches();
  for (const ValueSpec& v : shared_.artifact.entry("prefill").inputs)
    if (v.name != "tokens" && v.name != "pos") prefill_values_.emplace(v.name, timeline_.make(scalar_of(v.dtype), {1}));
  for (int64_t m : shared_.artifact.steps()) several_.emplace(m, make_step("decode_" + std::to_string(m), m, tensors()));
  if (timeline_.asynchronous()) warm_up();
}

void Entries::make_caches() {
  uint64_t need = 0;
  for (const KvSpec& k : shared_.artifact.kv) need += k.bytes;
  need *= static_cast<uint64_t>(made());
  const uint64_t free = shared_.backend->free_bytes();
  if (need > free)
    fail("the KV caches of ", made(), " rows for ", shared_.artifact.max_seq_len, " tokens take ", gigabytes(need), " (", need, " bytes), ",
         shared_.backend->device().str(), " has ", gigabytes(free), " (", free, " bytes) free; give fewer rows, or export with a smaller --max-seq-len");
  for (const KvSpec& k : shared_.artifact.kv) {
    if (shared_.constants.count(k.name)) fail("manifest.json: '", k.name, "' is both a constant and a KV cache");
    std::vector<int64_t> shape{made()};
    shape.insert(shape.end(), k.shape.begin(), k.shape.end());
    kv_[k.name] = timeline_.make(scalar_of(k.dtype), shape);
  }
}

TensorMap Entries::caches_of(int64_t row) const {
  TensorMap found;
  for (const KvSpec& k : shared_.artifact.kv) {
    auto* data = static_cast<char*>(kv_.at(k.name).data()) + static_cast<uint64_t>(row) * k.bytes;
    found.emplace(k.name, Tensor::over(data, shared_.backend->device(), scalar_of(k.dtype), k.shape));
  }
  return found;
}

TensorMap Entries::row_tensors(int64_t row) const {
  TensorMap all = caches_of(row);
  all.insert(shared_.constants.begin(), shared_.constants.end());
  return all;
}

TensorMap Entries::tensors() const {
  TensorMap all = shared_.constants;
  all.insert(kv_.begin(), kv_.end());
  return all;
}

CompiledModel& Entries::prefill_of(int64_t row) {
  auto& found = prefills_[static_cast<size_t>(row)];
  if (!found) {
    auto made = std::make_unique<CompiledModel>(shared_, "prefill", prefill_surroundings_);
    made->bind(row_tensors(row));
    found = std::move(made);
  }
  return *found;
}

Entries::Step& Entries::decode(int64_t row) {
  auto& found = decodes_[static_cast<size_t>(row)];
  if (!found) found = std::make_unique<Step>(make_step("decode", 1, row_tensors(row)));
  return *found;
}

Entries::Step Entries::make_step(const std::string& entry, int64_t tokens, const TensorMap& tensors) {
  Step step;
  step.model = std::make_unique<CompiledModel>(shared_, entry, decode_surroundings_);
  step.model->bind(tensors);
  step.inputs = StepInputs(shared_, timeline_, entry, tokens);
  return step;
}

void Entries::record(Step& step, const std::string& entry) {
  for (int i = 0; i < 2; ++i) run(step);
  if (options_.graph) step.record(shared_, timeline_, entry, options_.early_launch);
}

// As Session's: the longest prefill first, then each decode entry twice and once more to be recorded.
void Entries::warm_up() {
  if (int64_t n = std::min(options_.prefill_chunk, shared_.artifact.max_seq_len); n >= 2) {
    const std::vector<int64_t> zeros(static_cast<size_t>(n), 0);
    run_prefill(0, zeros.data(), n, 0);
  }
  for (int64_t row = 0; row < options_.rows; ++row) prefill_of(row), record(decode(row), "decode");
  for (auto& [m, step] : several_) record(step, "decode_" + std::to_string(m));
  for (auto& [name, cache] : kv_) timeline_.zero(cache);
  timeline_.synchronize();
}

CompiledModel::Output Entries::run_prefill(int64_t row, const int64_t* tokens, int64_t n, int64_t position) {
  std::vector<int64_t> positions(static_cast<size_t>(n));
  std::iota(positions.begin(), positions.end(), position);
  TensorMap inputs = prefill_values_;
  for (const auto& [name, from] : {std::pair("tokens", tokens), std::pair("pos", static_cast<const int64_t*>(positions.data()))}) {
    inputs[name] = Tensor::make(prefill_surroundings_.memory, shared_.backend->device(), Scalar::I64, {n});
    timeline_.write(inputs[name], from);
  }
  return prefill_of(row).run(inputs);
}

CompiledModel::Output Entries::prefill(int64_t row, const int64_t* tokens, int64_t n, int64_t position, const Sampling& sampling) {
  for (const auto& [name, t] : prefill_values_) {
    if (name == "temperature") timeline_.fill(t, sampling.temperature);
    if (name == "top_k") timeline_.fill(t, int64_t{sampling.top_k});
    if (name == "top_p") timeline_.fill(t, sampling.top_p);
    if (name == "seed") timeline_.fill(t, sampling.seed);
  }
  return run_prefill(row, tokens, n, position);
}

}  // namespace kiln
