#pragma once
#include <string>

#include "model/backend.h"
#include "model/compiled_model.h"

namespace kiln {

// Where numbers that are not finite come from, as far as caches and weights tell, for the error of a run whose logits are such: which cache has
// the first of them below `positions`, and which weight. Reads both whole; between enter() and leave() of the timeline.
std::string trace_not_finite(const Artifact& artifact, Timeline& timeline, const TensorMap& constants, const TensorMap& caches, int64_t positions);

}  // namespace kiln
