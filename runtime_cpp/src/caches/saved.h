#pragma once
#include <memory>
#include <string>

#include "caches/snapshot_state.h"

namespace kiln {

// A session in a file (caches/session_file.h): a snapshot that is whole and the host's, its parts one after another. The file takes the place of
// `path` when all of it is written. Error where that cannot be.
void save(const Snapshot& whole, const std::string& path);
// The state of such a snapshot. Error for a damaged file, and for a session of another artifact or target.
std::unique_ptr<Snapshot::State> load_saved(std::shared_ptr<const Model> model, const std::string& path);

}  // namespace kiln
