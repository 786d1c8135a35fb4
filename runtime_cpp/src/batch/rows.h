#pragma once
#include <deque>
#include <memory>
#include <vector>

#include "caches/caches.h"
#include "kiln/batch.h"
#include "kiln/draft.h"

namespace kiln {

// What a row has whose tokens are drafted.
struct RowDrafts {
  RowDrafts(int64_t most, bool model) : by_model(model), acceptance(most) {}
  bool by_model;       // else by what occurred before
  NgramDrafter ngram;  // its text is the timeline's, with what was sampled last
  Acceptance acceptance;
  std::vector<int64_t> now;  // of the step that is taken
};

// A row of a batch and the timeline in it. `position` and the rest of Caches are of that, or of the one that was.
struct Row : Caches {
  using Caches::Caches;
  int64_t handle = -1;      // of the timeline that is in it, or that was the last
  bool in_use = false;
  Request request;          // prompt: what is to be fed now
  size_t read = 0;          // tokens of that which are in the caches
  bool by_steps = false;    // it takes steps, as sampled tokens do
  int64_t next = -1;        // sampled, not fed yet
  int64_t produced = 0;     // tokens handed out
  std::vector<float> logits;
  std::unique_ptr<RowDrafts> drafts;  // null: none
  bool hidden = false;      // that of the token before `next` is in the batch's rows of them
  int64_t read_by_step = 1; // of a prompt, its last tokens: those of steps

  bool used() const { return in_use; }
  size_t left() const { return request.prompt.size() - read; }  // of the prompt
  // A prompt's last token is a step's, as any other: a prefill call takes two or more. So are as many of the last as one step takes well.
  bool steps() const { return used() && (by_steps || static_cast<int64_t>(left()) <= read_by_step); }
  bool waits() const { return used() && !steps(); }
  int64_t token() const { return left() ? request.prompt[read] : next; }
  void feed(std::vector<int64_t> tokens, bool steps_alone) { request.prompt = std::move(tokens), read = 0, by_steps = steps_alone, next = -1; }
  void end() { in_use = false, feed({}, false); }
  void clear() { lineage.cut(0), position = written = 0, logits.clear(); }
};

// The rows of a batch, by number.
class Rows {
 public:
  Rows(const std::shared_ptr<const Model>& model, int64_t n) {
    for (int64_t i = 0; i < n; ++i) rows_.emplace_back(model);
  }
  Row& operator[](int64_t number) { return rows_[static_cast<size_t>(number)]; }
  const Row& operator[](int64_t number) const { return rows_[static_cast<size_t>(number)]; }
  int64_t size() const { return static_cast<int64_t>(rows_.size()); }
  auto begin() { return rows_.begin(); }
  auto end() { return rows_.end(); }

  Row& at(int64_t number);                // Error for one that is none
  Row& free_for(const Request& request);  // Error where there is none
  Row& of(int64_t handle);                // that the timeline is in; Error where it is in none
  std::vector<int64_t> in_order(bool (Row::*which)() const) const;  // numbers of rows, the one that joined first first
  // The row behind `last`, of those whose prompts wait; size(): none waits.
  int64_t next_reader(int64_t last) const;

 private:
  std::deque<Row> rows_;
};

}  // namespace kiln
