#pragma once
#include <map>
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

}  // namespace kiln
