#pragma once
#include <memory>
#include <vector>

#include "batch/entries.h"
#include "batch/rows.h"
#include "draft/model_drafter.h"
#include "kiln/draft.h"

namespace kiln {

// What the timelines of a batch draft for the steps that they share, and what came of it.
class BatchDrafts {
 public:
  // `options` and `entries`, which outlive this object, are the batch's.
  BatchDrafts(const Model::Impl& shared, Timeline& timeline, Entries& entries, const BatchOptions& options);

  // Opens the artifact's drafter where it is not open yet. Error where there is none.
  void open_model();
  // What each of the timelines in rows `numbers` drafts for the step that all of them take, which has room for so many: `now` of its RowDrafts.
  void draft(Rows& rows, const std::vector<int64_t>& numbers, int64_t room);
  // Line `at` of what a run gave is the hidden row of the token that the row has fed last.
  void keep_hidden(Row& row, int64_t number, const Tensor& lines, int64_t at);
  // A step wrote `sampled` behind the row's token and each of its drafts: with how many of those it agrees.
  int64_t took(Row& row, const int64_t* sampled);
  void took_step(int64_t tokens, double seconds) { costs_.took(tokens, seconds); }
  const DraftCounts& counts() const { return counts_; }

 private:
  Tensor hidden_of(int64_t row) const { return line_of(hidden_, row); }

  const Model::Impl& shared_;
  Timeline& timeline_;
  Entries& entries_;
  const BatchOptions& options_;
  std::unique_ptr<ModelDrafter> drafter_;  // null: no timeline asked for it
  Tensor hidden_;                          // [rows, D], what it is given of each
  StepCosts costs_;
  DraftCounts counts_;
};

}  // namespace kiln
