#pragma once
#include <chrono>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <vector>

#include "draft/model_drafter.h"
#include "kiln/draft.h"
#include "kiln/session.h"
#include "model/compiled_model.h"
#include "model/decode_step.h"

namespace kiln {

// What a session that drafts has beside its caches.
struct Speculation {
  explicit Speculation(const std::vector<int64_t>& sizes) : costs(sizes), by_text(sizes.back() - 1), by_model(sizes.back() - 1) {}

  Drafting drafting;
  NgramDrafter ngram;  // its text is the session's tokens, from the first
  std::unique_ptr<ModelDrafter> model;  // made when it is needed
  StepCosts costs;
  Acceptance by_text, by_model;

  // Of the last step of several tokens, those that the model agreed with and that were not taken yet: (the row of its logits, the token).
  std::deque<std::pair<int64_t, int64_t>> ahead;
  const DecodeStep* last = nullptr;  // that step
  std::optional<std::chrono::steady_clock::time_point> received;  // when the last step of one token was

  bool of_model() const { return drafting.source == DraftSource::Mtp && !drafting.own; }
  Drafter* text() { return of_model() ? nullptr : drafting.own ? drafting.own.get() : &ngram; }  // null: what drafts keeps none
  Acceptance& acceptance() { return of_model() ? by_model : by_text; }
  // How many drafts, of which `chances` are, one step takes best.
  int64_t worth(std::vector<double> chances) const { return share_drafts({std::move(chances)}, costs, {of_model() ? model->seconds() : 0})[0]; }
  int64_t most() const { return drafting.length ? drafting.length : costs.sizes().back() - 1; }
  // Whether it is worth to know what the next token is before the step behind it is queued.
  bool hopes() { return drafting.own || drafting.fixed || acceptance().due() || worth(acceptance().chances()) > 0; }
};

}  // namespace kiln
