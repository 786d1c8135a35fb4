#include "model/decode_step.h"

#include <algorithm>
#include <cstring>

#include "kiln/error.h"

namespace kiln {

namespace {

constexpr uint64_t kBetween = 64;  // bytes, of what inputs begin at a multiple of: compiled code asks for 16

bool known(const ValueSpec& v) {
  if (v.name == "temperature" || v.name == "top_p") return v.dtype == DType::F32;
  if (v.name == "top_k") return v.dtype == DType::I32;
  return (v.name == "tokens" || v.name == "pos" || v.name == "row" || v.name == "seed") && v.dtype == DType::I64;
}

}  // namespace

StepInputs::StepInputs(const Model::Impl& shared, Timeline& timeline, const std::string& entry, int64_t tokens) : tokens_(tokens) {
  const std::vector<ValueSpec>& inputs = shared.artifact.entry(entry).inputs;
  uint64_t end = 0;
  for (const ValueSpec& v : inputs) {
    if (!known(v)) fail("manifest.json: the input '", v.name, "' (", dtype_name(v.dtype), ") of ", entry, " is none that this runner gives");
    offsets_.emplace(v.name, end);
    end += (scalar_bytes(scalar_of(v.dtype)) * static_cast<uint64_t>(tokens) + kBetween - 1) / kBetween * kBetween;
  }
  block_ = timeline.make(Scalar::U8, {static_cast<int64_t>(end)});
  host_ = shared.backend->keep(end, true);
  std::memset(host_.data(), 0, end);
  for (const ValueSpec& v : inputs)
    values_.emplace(v.name, Tensor::over(static_cast<char*>(block_.data()) + offsets_.at(v.name), shared.backend->device(), scalar_of(v.dtype), {tokens}));
}

void StepInputs::write(Timeline& timeline, const std::vector<Place>& places) {
  auto put = [&](const char* name, size_t i, auto value) {
    if (auto found = offsets_.find(name); found != offsets_.end())
      std::memcpy(static_cast<char*>(host_.data()) + found->second + i * sizeof value, &value, sizeof value);
  };
  for (size_t i = 0; i < static_cast<size_t>(tokens_); ++i) {
    const Place& p = places[std::min(i, places.size() - 1)];
    put("tokens", i, p.token), put("pos", i, p.position), put("row", i, p.row);
    put("temperature", i, p.sampling.temperature), put("top_k", i, int32_t{p.sampling.top_k}), put("top_p", i, p.sampling.top_p);
    put("seed", i, p.sampling.seed);
  }
  timeline.copy(block_, host_);
}

void DecodeStep::run(Timeline& timeline) {
  if (recording)
    timeline.replay(*recording);
  else
    out = CompiledModel::Output(), out = model->run(inputs.values());
}

void DecodeStep::record(const Model::Impl& shared, Timeline& timeline, const std::string& entry, bool early_launch) {
  const bool early = early_launch && shared.target->major >= 9;
  recording = timeline.capture([&] { run(timeline); }, early ? shared.artifact.entry(entry).waits : std::vector<std::string>());
}

}  // namespace kiln
