#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "model/compiled_model.h"
#include "kiln/session.h"

namespace kiln {

// A model that drafts for the one beside it: the entry `draft` of their artifact, over the caches of a session or of a batch, which it reads. It
// keeps nothing of a text: what it is given is a token in no cache yet, and the hidden row of the token before.
class ModelDrafter {
 public:
  // `tensors`: the constants, and the caches of all the artifact's rows. Error where the artifact has no such entry.
  ModelDrafter(const Model::Impl& model, Timeline& timeline, Surroundings& surroundings, const TensorMap& tensors, bool graph, bool early_launch);

  struct From {
    int64_t token = 0, position = 0, row = 0;  // of the token; the row's caches hold those before
    Tensor hidden;                             // [1, D], the model's of the token before; it may be memory that the drafter's own work overwrites
    Sampling sampling;
  };
  // At most `most` tokens that may follow; fewer where its logits are not finite. Each is sampled as the model's will be. seen: called behind each.
  std::vector<int64_t> draft(const From& from, int64_t most, const std::function<void(const CompiledModel::Output&)>& seen = {});
  double seconds() const { return seconds_; }  // that a draft takes, of late; 0: not measured

  static bool in(const Artifact& artifact) { return artifact.entry_points.count(kEntry) > 0; }
  static constexpr char kEntry[] = "draft";

 private:
  void step();

  const Model::Impl& model_;
  Timeline& timeline_;
  bool graph_, early_launch_;
  std::unique_ptr<CompiledModel> compiled_;
  TensorMap values_;
  Tensor found_;  // int64 [drafts of the largest step]
  CompiledModel::Output out_;
  std::optional<size_t> recording_;
  int64_t runs_ = 0;
  double seconds_ = 0;
};

}  // namespace kiln
