#include "cuda/early_launch.h"

#include <unordered_map>

namespace kiln {

namespace {

using namespace cuda;

// "" when `node` is no kernel.
std::string kernel_name(GraphNode node) {
  int type = -1;
  driver().check(driver().node_type(node, &type), "cannot read a node of the decode graph");
  if (type != kKernelNode) return "";
  KernelNodeParams params = {};
  driver().check(driver().node_kernel(node, &params), "cannot read a kernel of the decode graph");
  const char* name = nullptr;
  Result code = params.function ? driver().function_name(&name, params.function) : driver().kernel_name(&name, params.kernel);
  driver().check(code, "cannot read a kernel's name");
  return name ? name : "?";
}

bool begins_with_one(const std::string& name, const std::vector<std::string>& prefixes) {
  for (const std::string& prefix : prefixes)
    if (name.compare(0, prefix.size(), prefix) == 0) return true;
  return false;
}

}  // namespace

EarlyEdges::EarlyEdges(Graph graph, const std::vector<std::string>& waits) : graph_(graph) {
  const Driver& d = driver();
  if (!d.missing_graph.empty()) fail(d.missing_graph);
  size_t count = 0;
  d.check(d.graph_nodes(graph, nullptr, &count), "cannot list the nodes of the decode graph");
  std::vector<GraphNode> nodes(count);
  d.check(d.graph_nodes(graph, nodes.data(), &count), "cannot list the nodes of the decode graph");
  std::unordered_map<GraphNode, std::string> names;
  for (GraphNode node : nodes) names[node] = kernel_name(node);

  d.check(d.graph_edges(graph, nullptr, nullptr, nullptr, &count), "cannot list the edges of the decode graph");
  std::vector<GraphNode> from(count), to(count);
  std::vector<EdgeData> data(count);
  d.check(d.graph_edges(graph, from.data(), to.data(), data.data(), &count), "cannot list the edges of the decode graph");
  std::unordered_map<GraphNode, int> dependencies;
  for (GraphNode node : to) ++dependencies[node];
  for (size_t i = 0; i < count; ++i) {
    const std::string& name = names.at(to[i]);
    bool full = data[i].type == kDefaultDependency && data[i].from_port == 0;
    if (full && dependencies.at(to[i]) == 1 && begins_with_one(name, waits) && !names.at(from[i]).empty())
      from_.push_back(from[i]), to_.push_back(to[i]);
  }
  replace(/*early=*/true);
}

void EarlyEdges::restore() {
  replace(/*early=*/false);
  from_.clear(), to_.clear();
}

void EarlyEdges::replace(bool early) {
  if (from_.empty()) return;
  const Driver& d = driver();
  EdgeData programmatic = {};
  programmatic.from_port = kProgrammaticPort;
  programmatic.type = kProgrammaticDependency;
  const std::vector<EdgeData> with(from_.size(), programmatic), without(from_.size(), EdgeData{});
  const auto &old_edges = early ? without : with, &new_edges = early ? with : without;
  d.check(d.remove_edges(graph_, from_.data(), to_.data(), old_edges.data(), from_.size()), "cannot remove edges of the decode graph");
  Result code = d.add_edges(graph_, from_.data(), to_.data(), new_edges.data(), from_.size());
  if (code == kSuccess) return;
  d.check(d.add_edges(graph_, from_.data(), to_.data(), old_edges.data(), from_.size()), "cannot put edges of the decode graph back");
  d.check(code, early ? "cannot add programmatic edges" : "cannot add edges");
}

}  // namespace kiln
