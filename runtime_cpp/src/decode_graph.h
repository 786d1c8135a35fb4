#pragma once
#include <ATen/cuda/CUDAGraph.h>

#include <cstdio>
#include <functional>
#include <mutex>
#include <optional>

#include "early_launch.h"
#include "kiln/error.h"
#include "model_impl.h"

namespace kiln {

// The decode step as a CUDA graph: Cold --capture(step)--> Captured --replay()--> Captured.
//
// Cold      owns nothing. Whoever captures has run the step before on the same stream: loading a kernel or making a
//           library's workspace is not allowed inside a capture.
// Captured  owns the graph and its private memory pool, which holds every tensor the step allocates; the step's outputs
//           (logits) live there and are overwritten by each replay.
//           Does not own the weights, the KV caches and the inputs (token, position, sampling): their addresses are in
//           the graph, so their owner, the session, keeps them in place for longer than this object lives.
class DecodeGraph {
 public:
  // On the current stream. Runs nothing: the step's effects happen at replay(). Kernels whose names begin with one of `waits`
  // start early, see EarlyEdges; where the driver refuses that, it is said once and the plain graph is used.
  void capture(const std::function<void()>& step, const std::vector<std::string>& waits) {
    if (state_ != State::Cold) fail("internal error: the decode graph is captured already");
    static std::mutex one_capture;  // torch's default generator takes part in every capture
    std::lock_guard<std::mutex> lock(one_capture);
    // Thread-local: another session may allocate while this one captures.
    graph_.capture_begin({0, 0}, cudaStreamCaptureModeThreadLocal);
    try {
      step();
    } catch (...) {
      try {
        graph_.capture_end();  // gives the stream back; the step's own error is the one to report
      } catch (const std::exception&) {
      }
      throw;
    }
    graph_.capture_end();
    if (!instantiate_early(waits)) graph_.instantiate();
    state_ = State::Captured;
  }

  void replay() {
    if (state_ != State::Captured) fail("internal error: replay of a decode graph that is not captured");
    graph_.replay();
  }

  int64_t early_launches() const { return early_launches_; }  // kernels that start early

 private:
  bool instantiate_early(const std::vector<std::string>& waits) {
    if (waits.empty()) return false;
    std::optional<EarlyEdges> edges;
    try {
      edges.emplace(graph_.raw_cuda_graph(), waits);
      guarded([&] { graph_.instantiate(); });
    } catch (const Error& e) {
      static std::once_flag said;
      std::call_once(said, [&] { std::fprintf(stderr, "note: no early launch in the decode graph: %s\n", e.what()); });
      if (edges) edges->restore();
      return false;
    }
    early_launches_ = static_cast<int64_t>(edges->size());
    return true;
  }

  enum class State { Cold, Captured } state_ = State::Cold;
  int64_t early_launches_ = 0;
  at::cuda::CUDAGraph graph_{/*keep_graph=*/true};  // its edges are changed before it is instantiated
};

}  // namespace kiln
