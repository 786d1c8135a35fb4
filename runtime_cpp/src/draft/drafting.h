#pragma once
#include <vector>

#include "kiln/artifact.h"
#include "kiln/session.h"
#include "model/backend.h"

namespace kiln {

// Tokens of the artifact's steps, 1 first.
std::vector<int64_t> all_sizes(const Artifact& artifact);
// The same. Error where they cannot check what `drafting` asks for.
std::vector<int64_t> step_sizes(const Artifact& artifact, const Drafting& drafting);

// What SessionOptions say of it, with no 0. Error where no step takes as many.
int64_t read_by_step(const Artifact& artifact, const Timeline& timeline, int64_t asked);

}  // namespace kiln
