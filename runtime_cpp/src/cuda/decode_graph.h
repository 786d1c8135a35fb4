#pragma once
#include <cstdio>
#include <functional>
#include <mutex>
#include <optional>

#include "cuda/early_launch.h"
#include "kiln/error.h"

namespace kiln {

// The decode step as a CUDA graph: Cold --capture(step)--> Captured --replay()--> Captured.
//
// Cold      owns nothing. Whoever captures has run the step before on the same stream: loading a kernel or making a
//           library's workspace is not allowed inside a capture.
// Captured  owns the graph. Does not own the memory whose addresses are in it: weights, KV caches and inputs (token, position, sampling) are
//           the session's, which keeps them in place; temporaries and outputs (logits) are of the pool that decode alone uses. They are free
//           when the capture ends, so a replay may overwrite them: it is the only thing that uses them.
class DecodeGraph {
 public:
  DecodeGraph() = default;
  ~DecodeGraph() {
    if (!exec_ && !graph_) return;
    cuda::Among others;
    if (exec_) cuda::driver().graph_exec_destroy(exec_);
    if (graph_) cuda::driver().graph_destroy(graph_);
  }
  DecodeGraph(const DecodeGraph&) = delete;
  DecodeGraph& operator=(const DecodeGraph&) = delete;

  // On `stream`. Runs nothing: the step's effects happen at replay(). Kernels whose names begin with one of `waits`
  // start early, see EarlyEdges; where the driver refuses that, it is said once and the plain graph is used.
  void capture(cuda::Stream stream, const std::function<void()>& step, const std::vector<std::string>& waits) {
    if (exec_) fail("internal error: the decode graph is captured already");
    const cuda::Driver& d = cuda::driver();
    d.check(d.begin_capture(stream, cuda::kCaptureThreadLocal), "cannot start to capture the decode step");
    try {
      step();
    } catch (...) {
      d.end_capture(stream, &graph_);  // gives the stream back; the step's own error is the one to report
      throw;
    }
    d.check(d.end_capture(stream, &graph_), "cannot capture the decode step");
    if (!instantiate_early(waits)) instantiate();
  }

  void replay(cuda::Stream stream) {
    if (!exec_) fail("internal error: replay of a decode graph that is not captured");
    cuda::driver().check(cuda::driver().graph_launch(exec_, stream), "cannot launch the decode graph");
  }

  int64_t early_launches() const { return early_launches_; }  // kernels that start early

 private:
  void instantiate() { cuda::driver().check(cuda::driver().graph_instantiate(&exec_, graph_, 0), "cannot make the decode graph runnable"); }

  bool instantiate_early(const std::vector<std::string>& waits) {
    if (waits.empty()) return false;
    std::optional<EarlyEdges> edges;
    try {
      edges.emplace(graph_, waits);
      instantiate();
    } catch (const Error& e) {
      static std::once_flag said;
      std::call_once(said, [&] { std::fprintf(stderr, "note: no early launch in the decode graph: %s\n", e.what()); });
      if (edges) edges->restore();
      return false;
    }
    early_launches_ = static_cast<int64_t>(edges->size());
    return true;
  }

  cuda::Graph graph_ = nullptr;
  cuda::GraphExec exec_ = nullptr;
  int64_t early_launches_ = 0;
};

}  // namespace kiln
