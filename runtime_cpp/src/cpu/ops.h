#pragma once
#include <cstdint>

namespace kiln {

// The operators of the CPU that compiled models call by name, over plain memory. Strides count elements.

// Threads of the operators below; 1 or more. The default is OpenMP's.
void set_cpu_threads(int threads);
int cpu_threads();

// A float32 matrix: element (i, j) is data[i * row + j * column].
struct MatrixView {
  const float* data;
  int64_t row, column;
};

// c [m, n], dense rows `c_row` apart, = a [m, k] x b [k, n]. An element is one sum over k in a fixed order, whatever m, n, strides and threads:
// a row of the result does not depend on the rows beside it. c must not overlap a or b.
void matmul(float* c, int64_t c_row, const MatrixView& a, const MatrixView& b, int64_t m, int64_t k, int64_t n);

// The same for `batch` matrices, each so many elements behind the one before.
void batch_matmul(float* c, int64_t c_row, int64_t c_batch, const MatrixView& a, int64_t a_batch, const MatrixView& b, int64_t b_batch, int64_t batch,
                  int64_t m, int64_t k, int64_t n);

// The same where b is packed weights (cpu/packed.h), k more than 0: the bits are those of the product with what they stand for.
struct PackedMatrix;
void packed_matmul(float* c, int64_t c_row, const MatrixView& a, const PackedMatrix& b, int64_t m, int64_t k, int64_t n);

// The kernels of the products: "avx512" or "avx2", the CPU's best unless set. False: the CPU or this build lacks them.
const char* matmul_kernels();
bool set_matmul_kernels(const char* name);

// Rows of a tensor along one of its dimensions: element i of row r is data[r * row + i * step].
template <typename T>
struct Rows {
  T* data;
  int64_t row, step;
};

// Sums of the first 1 .. n elements of every row, in order; float32 sums are kept in float64, as torch does. out may be x.
void cumsum(const Rows<float>& out, const Rows<const float>& x, int64_t rows, int64_t n);
void cumsum(const Rows<int64_t>& out, const Rows<const int64_t>& x, int64_t rows, int64_t n);

// Sorts every row; equals, -0 and 0 among them, keep their order. NaN counts as greater than everything, as in torch. indices: where in its
// row each value was. n is at most 2^32.
void stable_sort(const Rows<float>& values, const Rows<int64_t>& indices, const Rows<const float>& x, int64_t rows, int64_t n, bool descending);

}  // namespace kiln
