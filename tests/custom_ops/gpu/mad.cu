// out[i] = FACTOR x[i ^ 1] + i of n elements, n even: for the tests of `cuda_source`.
#include "mad.cuh"

extern "C" __global__ void __launch_bounds__(THREADS) KERNEL(const float* x, float* out, int n, SCRATCH) {
  extern __shared__ __align__(16) float tile[];
  static_assert(SHARED == 4 * THREADS, "an element of a thread");
  int i = blockIdx.x * THREADS + threadIdx.x;
  tile[threadIdx.x] = i < n ? x[i] : 0.0f;
  __syncthreads();
  if (i < n) out[i] = FACTOR * neighbour(tile, threadIdx.x) + i;
}
