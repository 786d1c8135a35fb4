#pragma once
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "model/compiled_model.h"

namespace kiln {

// What a decode entry is given, at fixed addresses: one copy takes all of it to the device.
class StepInputs {
 public:
  // A token of a step.
  struct Place {
    int64_t token, position, row;
    Sampling sampling;
  };

  StepInputs() = default;
  StepInputs(const Model::Impl& shared, Timeline& timeline, const std::string& entry, int64_t tokens);

  int64_t tokens() const { return tokens_; }
  const TensorMap& values() const { return values_; }  // by the entry's names
  // Of `places`, 1 .. tokens(), the last is repeated: it writes what it has written. The step before has been waited for, so that nothing reads
  // what the host writes.
  void write(Timeline& timeline, const std::vector<Place>& places);

 private:
  Tensor block_, host_;  // all inputs, on the device and as the host writes them
  TensorMap values_;     // views of the block
  std::map<std::string, uint64_t> offsets_;
  int64_t tokens_ = 0;
};

// A decode entry of a session or a batch, and on a GPU its recording.
struct DecodeStep {
  std::unique_ptr<CompiledModel> model;
  StepInputs inputs;
  CompiledModel::Output out;  // of the last run
  std::optional<size_t> recording;
  int64_t runs = 0;  // counted by who runs it

  void run(Timeline& timeline);  // by its recording, if there is one
  void record(const Model::Impl& shared, Timeline& timeline, const std::string& entry, bool early_launch);
};

}  // namespace kiln
