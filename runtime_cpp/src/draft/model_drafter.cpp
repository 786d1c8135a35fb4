#include "draft/model_drafter.h"

#include <algorithm>
#include <chrono>

#include "model/backend.h"

namespace kiln {

namespace {

constexpr double kMemory = 0.8;  // of the seconds of a draft, how much stays when it is measured again

}  // namespace

ModelDrafter::ModelDrafter(const Model::Impl& model, Timeline& timeline, Surroundings& surroundings, const TensorMap& tensors, bool graph, bool early_launch)
    : model_(model), timeline_(timeline), graph_(graph), early_launch_(early_launch) {
  if (!in(model.artifact)) fail("drafts: the artifact has no drafter; export it with --draft-gguf, or draft by ngram");
  for (const ValueSpec& v : model.artifact.entry(kEntry).inputs) values_.emplace(v.name, timeline.make(scalar_of(v.dtype), v.shape));
  found_ = timeline.make(Scalar::I64, {model.artifact.steps().back() - 1});
  compiled_ = std::make_unique<CompiledModel>(model, kEntry, surroundings);
  compiled_->bind(tensors);
}

// One draft; what it leaves is the next one's input. Everything in here is captured.
void ModelDrafter::step() {
  out_ = CompiledModel::Output(), out_ = compiled_->run(values_);
  timeline_.copy(values_.at("tokens"), out_.token);
  timeline_.copy(values_.at("hidden"), out_.hidden);
}

std::vector<int64_t> ModelDrafter::draft(const From& from, int64_t most, const std::function<void(const CompiledModel::Output&)>& seen) {
  const auto began = std::chrono::steady_clock::now();
  if (most > found_.numel()) fail("internal error: ", most, " drafts");
  timeline_.copy(values_.at("hidden"), from.hidden);
  timeline_.fill(values_.at("tokens"), from.token);
  timeline_.fill(values_.at("last"), from.position - 1);
  timeline_.fill(values_.at("row"), from.row);
  auto set = [&](const char* name, auto value) {
    if (auto found = values_.find(name); found != values_.end()) timeline_.fill(found->second, value);
  };
  set("temperature", from.sampling.temperature), set("top_k", int64_t{from.sampling.top_k});
  set("top_p", from.sampling.top_p), set("seed", from.sampling.seed);
  const bool warm = runs_ >= kColdRuns;
  for (int64_t i = 0; i < most; ++i) {
    timeline_.fill(values_.at("pos"), from.position + i);
    if (runs_ == kColdRuns && timeline_.asynchronous() && graph_) {
      const bool early = early_launch_ && model_.target->major >= 9;
      recording_ = timeline_.capture([this] { step(); }, early ? model_.artifact.entry(kEntry).waits : std::vector<std::string>());
    }
    ++runs_;
    recording_ ? timeline_.replay(*recording_) : step();
    timeline_.copy(Tensor::over(static_cast<char*>(found_.data()) + static_cast<uint64_t>(i) * sizeof(int64_t), found_.device, Scalar::I64, {1}), values_.at("tokens"));
    if (seen) seen(out_);
  }
  std::vector<int64_t> drafted(static_cast<size_t>(found_.numel()));
  timeline_.read(drafted.data(), found_);
  drafted.resize(static_cast<size_t>(most));
  drafted.erase(std::find_if(drafted.begin(), drafted.end(), [](int64_t token) { return token < 0; }), drafted.end());
  if (warm && most) {
    const double each = std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count() / static_cast<double>(most);
    seconds_ = seconds_ > 0 ? kMemory * seconds_ + (1 - kMemory) * std::min(each, 2 * seconds_) : each;
  }
  return drafted;
}

}  // namespace kiln
