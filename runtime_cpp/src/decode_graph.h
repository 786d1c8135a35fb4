#pragma once
#include <ATen/cuda/CUDAGraph.h>

#include <functional>
#include <mutex>

#include "kiln/error.h"

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
  enum class State { Cold, Captured };
  State state() const { return state_; }

  // On the current stream. Runs nothing: the step's effects happen at replay().
  void capture(const std::function<void()>& step) {
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
    state_ = State::Captured;
  }

  void replay() {
    if (state_ != State::Captured) fail("internal error: replay of a decode graph that is not captured");
    graph_.replay();
  }

 private:
  State state_ = State::Cold;
  at::cuda::CUDAGraph graph_;
};

}  // namespace kiln
