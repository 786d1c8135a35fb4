#pragma once
#include <map>
#include <memory>
#include <mutex>
#include <optional>

#include "cuda/cublaslt.h"
#include "cuda/driver.h"

namespace kiln {

// GPU code of a package, on one GPU: loaded once, whatever number of sessions asks for it.
class Modules {
 public:
  explicit Modules(std::shared_ptr<const cuda::Gpu> gpu) : gpu_(std::move(gpu)) {}
  ~Modules();
  Modules(const Modules&) = delete;
  Modules& operator=(const Modules&) = delete;

  // Of a code image inside an open library, which outlives this object.
  cuda::Result load(cuda::Module* module, const void* image);

 private:
  std::shared_ptr<const cuda::Gpu> gpu_;
  std::mutex mutex_;
  std::map<const void*, cuda::Module> modules_;
};

// What a session's compiled models ask of the GPU.
class CudaCalls {
 public:
  CudaCalls(std::shared_ptr<const cuda::Gpu> gpu, std::shared_ptr<Modules> modules, std::shared_ptr<Memory> memory)
      : gpu_(std::move(gpu)), modules_(std::move(modules)), memory_(std::move(memory)) {}

  Modules& modules() { return *modules_; }
  void matmul(const Tensor& out, const Tensor& a, const Tensor& b, cuda::Stream stream) {
    if (!blas_) blas_.emplace(*gpu_, memory_);
    blas_->matmul(out, a, b, stream);
  }

 private:
  std::shared_ptr<const cuda::Gpu> gpu_;
  std::shared_ptr<Modules> modules_;
  std::shared_ptr<Memory> memory_;  // of the workspace
  std::optional<CublasLt> blas_;
};

}  // namespace kiln
