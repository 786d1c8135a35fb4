#pragma once
#include <vector>

#include "kiln/artifact.h"
#include "kiln/session.h"

namespace kiln {

// Tokens of the artifact's steps, 1 first.
std::vector<int64_t> all_sizes(const Artifact& artifact);
// The same. Error where they cannot check what `drafting` asks for.
std::vector<int64_t> step_sizes(const Artifact& artifact, const Drafting& drafting);

}  // namespace kiln
