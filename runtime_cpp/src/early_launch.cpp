#include "early_launch.h"

#include <cudaTypedefs.h>

#include <unordered_map>

namespace kiln {

namespace {

// The driver's functions by way of the runtime library: a runner linked to the driver would not start on a machine without one.
struct Driver {
  PFN_cuGetErrorString_v6000 error_string = find<PFN_cuGetErrorString_v6000>("cuGetErrorString", 6000);
  PFN_cuGraphGetNodes_v10000 nodes = find<PFN_cuGraphGetNodes_v10000>("cuGraphGetNodes", 10000);
  PFN_cuGraphNodeGetType_v10000 type = find<PFN_cuGraphNodeGetType_v10000>("cuGraphNodeGetType", 10000);
  PFN_cuGraphKernelNodeGetParams_v12000 params = find<PFN_cuGraphKernelNodeGetParams_v12000>("cuGraphKernelNodeGetParams", 12000);
  PFN_cuFuncGetName_v12030 function_name = find<PFN_cuFuncGetName_v12030>("cuFuncGetName", 12030);
  PFN_cuKernelGetName_v12030 kernel_name = find<PFN_cuKernelGetName_v12030>("cuKernelGetName", 12030);
  PFN_cuGraphGetEdges_v12030 edges = find<PFN_cuGraphGetEdges_v12030>("cuGraphGetEdges", 12030);
  PFN_cuGraphAddDependencies_v12030 add = find<PFN_cuGraphAddDependencies_v12030>("cuGraphAddDependencies", 12030);
  PFN_cuGraphRemoveDependencies_v12030 remove = find<PFN_cuGraphRemoveDependencies_v12030>("cuGraphRemoveDependencies", 12030);

  void check(CUresult code, const char* what) const {
    if (code == CUDA_SUCCESS) return;
    const char* why = nullptr;
    error_string(code, &why);
    fail(what, ": ", why ? why : "unknown error", " (", static_cast<int>(code), ")");
  }

 private:
  template <typename F>
  static F find(const char* name, unsigned version) {
    void* at = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    cudaError_t code = cudaGetDriverEntryPointByVersion(name, &at, version, cudaEnableDefault, &found);
    if (code != cudaSuccess || found != cudaDriverEntryPointSuccess || !at) {
      cudaGetLastError();
      fail("the driver has no ", name, " of CUDA ", version / 1000, ".", version % 1000 / 10);
    }
    return reinterpret_cast<F>(at);
  }
};

const Driver& driver() {
  static const Driver functions;
  return functions;
}

// "" when `node` is no kernel.
std::string kernel_name(CUgraphNode node) {
  CUgraphNodeType type;
  driver().check(driver().type(node, &type), "cannot read a node of the decode graph");
  if (type != CU_GRAPH_NODE_TYPE_KERNEL) return "";
  CUDA_KERNEL_NODE_PARAMS_v2 params = {};
  driver().check(driver().params(node, &params), "cannot read a kernel of the decode graph");
  const char* name = nullptr;
  CUresult code = params.func ? driver().function_name(&name, params.func) : driver().kernel_name(&name, params.kern);
  driver().check(code, "cannot read a kernel's name");
  return name ? name : "?";
}

bool begins_with_one(const std::string& name, const std::vector<std::string>& prefixes) {
  for (const std::string& prefix : prefixes)
    if (name.compare(0, prefix.size(), prefix) == 0) return true;
  return false;
}

}  // namespace

EarlyEdges::EarlyEdges(cudaGraph_t graph, const std::vector<std::string>& waits) : graph_(graph) {
  const Driver& d = driver();
  size_t count = 0;
  d.check(d.nodes(graph, nullptr, &count), "cannot list the nodes of the decode graph");
  std::vector<CUgraphNode> nodes(count);
  d.check(d.nodes(graph, nodes.data(), &count), "cannot list the nodes of the decode graph");
  std::unordered_map<CUgraphNode, std::string> names;
  for (CUgraphNode node : nodes) names[node] = kernel_name(node);

  d.check(d.edges(graph, nullptr, nullptr, nullptr, &count), "cannot list the edges of the decode graph");
  std::vector<CUgraphNode> from(count), to(count);
  std::vector<CUgraphEdgeData> data(count);
  d.check(d.edges(graph, from.data(), to.data(), data.data(), &count), "cannot list the edges of the decode graph");
  std::unordered_map<CUgraphNode, int> dependencies;
  for (CUgraphNode node : to) ++dependencies[node];
  for (size_t i = 0; i < count; ++i) {
    const std::string& name = names.at(to[i]);
    bool full = data[i].type == CU_GRAPH_DEPENDENCY_TYPE_DEFAULT && data[i].from_port == 0;
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
  CUgraphEdgeData programmatic = {};
  programmatic.from_port = CU_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC;
  programmatic.type = CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC;
  const std::vector<CUgraphEdgeData> with(from_.size(), programmatic), without(from_.size(), CUgraphEdgeData{});
  const auto &old_edges = early ? without : with, &new_edges = early ? with : without;
  d.check(d.remove(graph_, from_.data(), to_.data(), old_edges.data(), from_.size()), "cannot remove edges of the decode graph");
  CUresult code = d.add(graph_, from_.data(), to_.data(), new_edges.data(), from_.size());
  if (code == CUDA_SUCCESS) return;
  d.check(d.add(graph_, from_.data(), to_.data(), old_edges.data(), from_.size()), "cannot put edges of the decode graph back");
  d.check(code, early ? "cannot add programmatic edges" : "cannot add edges");
}

}  // namespace kiln
