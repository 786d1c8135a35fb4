#pragma once
#include <cstddef>
#include <string>
#include <vector>

#include "cuda/driver.h"

namespace kiln {

// The edges of a captured, not yet instantiated graph over which a kernel may start while the one before it ends
// (programmatic dependent launch): into a kernel whose name begins with one of `waits` (none empty), out of a kernel, and the only
// edge into it.
// Does not own the graph.
class EarlyEdges {
 public:
  // Turns them. Throws Error with the driver's reason; the graph is then as it was.
  EarlyEdges(cuda::Graph graph, const std::vector<std::string>& waits);

  void restore();                                // full dependencies again
  size_t size() const { return from_.size(); }   // edges turned

 private:
  void replace(bool early);

  cuda::Graph graph_;
  std::vector<cuda::GraphNode> from_, to_;
};

}  // namespace kiln
