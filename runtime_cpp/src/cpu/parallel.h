#pragma once

// Threads by libgomp, called by name and not through a compiler's -fopenmp: whichever compiler builds the runner, its threads are those of
// the compiled models, which ask for that library.
extern "C" {
void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags);
void GOMP_barrier();
int omp_get_max_threads();
int omp_get_num_threads();
int omp_get_thread_num();
void omp_set_num_threads(int threads);
}

namespace kiln {

// body(index, count) by `threads` threads at most, each with an index of 0 .. count - 1; returns when all have. It may not throw.
template <typename Body>
void in_parallel(int threads, const Body& body) {
  if (threads <= 1) return body(0, 1);
  auto call = [](void* data) { (*static_cast<const Body*>(data))(omp_get_thread_num(), omp_get_num_threads()); };
  GOMP_parallel(call, const_cast<Body*>(&body), static_cast<unsigned>(threads), 0);
}

// Waits for the other threads of the team.
inline void wait_for_team(int count) {
  if (count > 1) GOMP_barrier();
}

}  // namespace kiln
