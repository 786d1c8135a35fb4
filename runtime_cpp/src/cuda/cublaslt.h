#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <tuple>

#include "cuda/driver.h"
#include "compiled/tensor.h"

namespace kiln {

// Matmul by NVIDIA's cublasLt, which is opened at the first use, by name. One for each session: its workspace is in use by one call at a time.
class CublasLt {
 public:
  CublasLt(const cuda::Gpu& gpu, std::shared_ptr<Memory> memory);  // of the workspace
  ~CublasLt();
  CublasLt(const CublasLt&) = delete;
  CublasLt& operator=(const CublasLt&) = delete;

  // out [m, n] = a [m, k] x b [k, n], all bfloat16, float16 or float32, summed in float32 (never TF32). Rows or columns of each are dense.
  void matmul(const Tensor& out, const Tensor& a, const Tensor& b, cuda::Stream stream);

 private:
  struct Matrix {  // as cublasLt sees it: column-major
    int type;
    uint64_t rows, columns;
    int64_t leading;
    bool transposed;
    uint32_t alignment;  // of its address, in bytes
    auto key() const { return std::tie(type, rows, columns, leading, transposed, alignment); }
    bool operator<(const Matrix& other) const { return key() < other.key(); }
  };
  struct Plan;
  static Matrix as_columns(const Tensor& t);
  const Plan& plan(const Matrix& left, const Matrix& right, const Matrix& out);

  void* handle_ = nullptr;
  Tensor workspace_;
  std::map<std::tuple<Matrix, Matrix, Matrix>, std::unique_ptr<Plan>> plans_;
};

}  // namespace kiln
