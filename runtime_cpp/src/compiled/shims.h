#pragma once
#include <memory>
#include <string>
#include <vector>

#include "compiled/tensor.h"

namespace kiln {

// The runner's function for a name of shims.def; nullptr for another name.
void* find_shim(const char* name);

// cuda/calls.cpp
void* find_cuda_shim(const char* name);

// What compiled code works with while it runs on this thread. Model code that runs without one fails.
class CudaCalls;
struct Surroundings {
  std::shared_ptr<Memory> memory;
  Device device;
  void* stream = nullptr;
  CudaCalls* cuda = nullptr;         // on a GPU
  std::vector<Tensor*>* kept = nullptr;  // handles that a container makes and never deletes
};

class Running {
 public:
  explicit Running(Surroundings& surroundings);
  ~Running();
  Running(const Running&) = delete;
  Running& operator=(const Running&) = delete;
  static Surroundings& now();  // Error outside of a model's call

 private:
  Surroundings* before_;
};

// What the model's code reported on this thread since the last call, and forgets it.
std::string take_model_error();
void set_model_error(const char* what);  // the first one stays

// Runs the body of a function that compiled code calls: an exception becomes the code 1 and the model's error.
template <typename Body>
int32_t shim(Body&& body) noexcept {
  try {
    body();
    return 0;
  } catch (const std::exception& e) {
    set_model_error(e.what());
  }
  return 1;
}

}  // namespace kiln
