#pragma once
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kiln/batch.h"
#include "model/compiled_model.h"
#include "model/decode_step.h"

namespace kiln {

// The caches of a batch's rows, and the artifact's entry points bound to them. What is in a row, and whose, is not known here. Everything but the
// destructor runs between enter() and leave() of the timeline.
class Entries {
 public:
  using Place = StepInputs::Place;
  using Step = DecodeStep;

  // `options`: with no 0 where that stands for the artifact's number; they outlive this object. Error where the caches do not fit.
  Entries(const Model::Impl& shared, Timeline& timeline, const BatchOptions& options);
  Entries(const Entries&) = delete;
  Entries& operator=(const Entries&) = delete;

  const TensorMap& caches() const { return kv_; }        // [made(), ...] by fully qualified name
  TensorMap caches_of(int64_t row) const;                // views of them
  TensorMap tensors() const;                             // constants, and the caches of all rows
  Surroundings& surroundings() { return decode_surroundings_; }  // of decode steps
  // Rows that the caches have: an entry of several tokens may touch all that it was compiled for.
  int64_t made() const { return shared_.artifact.steps().empty() ? options_.rows : shared_.artifact.rows; }

  // Feeds `tokens` [n], n >= 2, at `position` of the row.
  CompiledModel::Output prefill(int64_t row, const int64_t* tokens, int64_t n, int64_t position, const Sampling& sampling);

  bool takes(int64_t tokens) const { return tokens == 1 || several_.count(tokens) > 0; }
  int64_t most() const { return several_.empty() ? 1 : several_.rbegin()->first; }  // tokens of the largest step
  Step& decode(int64_t row);                       // of one token
  Step& step(int64_t tokens, int64_t first_row) {  // the smallest that takes as many, 1 .. most(); first_row: of its first token
    return tokens == 1 ? decode(first_row) : several_.lower_bound(tokens)->second;
  }
  void write(Step& step, const std::vector<Place>& places) { step.inputs.write(timeline_, places); }
  void run(Step& step) { step.run(timeline_); }

 private:
  void make_caches();
  TensorMap row_tensors(int64_t row) const;
  CompiledModel& prefill_of(int64_t row);
  CompiledModel::Output run_prefill(int64_t row, const int64_t* tokens, int64_t n, int64_t position);
  Step make_step(const std::string& entry, int64_t tokens, const TensorMap& tensors);
  void record(Step& step, const std::string& entry);
  void warm_up();

  const Model::Impl& shared_;
  Timeline& timeline_;
  const BatchOptions& options_;
  Surroundings prefill_surroundings_, decode_surroundings_;
  TensorMap kv_;
  TensorMap prefill_values_;  // the sampling inputs [1]
  std::vector<std::unique_ptr<CompiledModel>> prefills_;  // of each row, opened when they are needed
  std::vector<std::unique_ptr<Step>> decodes_;            // likewise
  std::map<int64_t, Step> several_;                       // by their number of tokens
};

}  // namespace kiln
