// A probe: one persistent kernel a layer. It multiplies by the attention's output matrix, gate and up, down, and the next layer's q, k and v,
// and its ring of weights in shared memory runs on across them, for weights depend on nothing. It starts early: while the attention kernels
// before it run, its warps fill the ring. Between two products it waits for activations that other multiprocessors make.
//   nvcc -std=c++17 -O3 -arch=sm_90a stream_layers.cu -o stream_layers && ./stream_layers
// Each warp has a ring of its own (cp.async), so none waits for another's copies; one more warp a program, the herald, watches the counters in
// global memory and makes the norms. A wait that lasts too long ends the program with an error.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "stream.cuh"

constexpr int kSlots = 16;         // partial sums of a row block at most
constexpr int kHidden = 5376, kProducts = 4;
constexpr long long kPatience = 400000000;  // cycles

enum Kind { kNorm, kGlu, kPlain };

struct Product {
  const uint32_t* words;  // [blocks, 35, n]
  const __half* halves;   // [blocks, 2, n]
  uint32_t* x;            // [M, blocks, kXWords]
  float* partials;        // [n / 32, kSlots, M, 32]
  float* out;             // [M, n]
  int* counters;          // [n / 32]
  int n, blocks, each, kind;
};
struct Layer {
  Product p[kProducts];
  float* squares;    // [2, kHidden / 32, M], of the products before norms
  float* residual;   // [M, kHidden]
  int* tiles;        // [kProducts]: row blocks that are done
  int* made;         // [kProducts]: blocks of x that are made
  int* groups;       // [84]: parts of a block of gated values that are done
  int* failed;
  long long* clocks;  // [4]: waiting for activations, for weights, all, warps
  int products;
};

// Activations are made by other multiprocessors while this kernel runs: never through the read-only path.
__device__ __forceinline__ uint2 ldx2(const uint32_t* p) { uint2 v; asm volatile("ld.global.v2.b32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p) : "memory"); return v; }
__device__ __forceinline__ uint32_t ldx(const uint32_t* p) { uint32_t v; asm volatile("ld.global.b32 %0, [%1];" : "=r"(v) : "l"(p) : "memory"); return v; }
__device__ __forceinline__ int acquire(const int* p) { int v; asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(p) : "memory"); return v; }
// A warp makes a block of 256 activations; a lane has elements 8 lane .. + 7.
__device__ void quantize(const float v[8], uint32_t* to, int lane) {
  float most = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) most = fmaxf(most, fabsf(v[i]));
#pragma unroll
  for (int d = 16; d; d /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, d));
  const float up = most > 0 ? 32512.0f / most : 0.0f;
  uint32_t high[2] = {}, low[2] = {};
  int sum = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int q = __float2int_rn(v[i] * up), h = (q + 128) >> 8;
    high[i / 4] |= static_cast<uint32_t>(h & 255) << (8 * (i % 4)), low[i / 4] |= static_cast<uint32_t>((q - h * 256) & 255) << (8 * (i % 4));
    sum += q;
  }
  *reinterpret_cast<uint4*>(to + lane * 4) = make_uint4(high[0], high[1], low[0], low[1]);
  sum += __shfl_xor_sync(~0u, sum, 1);
  uint32_t b[3] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int s = __shfl_sync(~0u, sum, 8 * (lane % 4) + 2 * i), b0 = static_cast<int8_t>(s & 255), s1 = (s - b0) >> 8, b1 = static_cast<int8_t>(s1 & 255), b2 = (s1 - b1) >> 8;
    b[0] |= static_cast<uint32_t>(b0 & 255) << (8 * i), b[1] |= static_cast<uint32_t>(b1 & 255) << (8 * i), b[2] |= static_cast<uint32_t>(b2 & 255) << (8 * i);
  }
  if (lane < 4) to[132 + lane * 2] = b[0], to[132 + lane * 2 + 1] = b[1], to[148 + lane * 2] = b[2], to[148 + lane * 2 + 1] = 0;
  if (lane == 4) to[128] = __float_as_uint(most / 32512.0f);
}

__device__ bool wait_for(const int* counter, int target, int* failed) {
  const long long began = clock64();
  while (acquire(counter) < target) {
    if (clock64() - began > kPatience || *reinterpret_cast<volatile int*>(failed)) { atomicExch(failed, 1); return false; }
  }
  return true;
}

__device__ __forceinline__ float gelu(float x) { return 0.5f * x * (1.0f + tanhf(0.7978845608f * (x + 0.044715f * x * x * x))); }

template <int M> __device__ void herald(const Layer& layer, volatile int* told, int lane) {
  for (int i = 1; i < layer.products; ++i) {
    const Product& before = layer.p[i - 1];
    const Product& now = layer.p[i];
    if (before.kind == kNorm && blockIdx.x % 6 == 0 && blockIdx.x / 6 < now.blocks) {  // makes one block of the norm's result
      const int b = blockIdx.x / 6, tiles = before.n / 32;
      wait_for(layer.tiles + i - 1, tiles, layer.failed);
      __syncwarp();
      for (int m = 0; m < M; ++m) {
        float s = 0, v[8];
        for (int t = lane; t < tiles; t += 32) s += __ldcg(layer.squares + ((i - 1) / 2 * tiles + t) * M + m);
#pragma unroll
        for (int d = 16; d; d /= 2) s += __shfl_xor_sync(~0u, s, d);
        const float root = rsqrtf(s / before.n + 1e-6f);
        const float* branch = before.out + static_cast<size_t>(m) * before.n + b * 256 + lane * 8;
        float* residual = layer.residual + static_cast<size_t>(m) * kHidden + b * 256 + lane * 8;
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          const float h = residual[k] * 0.5f + __ldcg(branch + k) * root;
          residual[k] = h, v[k] = h;
        }
        quantize(v, now.x + (static_cast<size_t>(m) * now.blocks + b) * kXWords, lane);
      }
      __threadfence();
      __syncwarp();
      if (lane == 0) atomicAdd(layer.made + i, 1);
    }
    if (lane == 0) { wait_for(layer.made + i, now.blocks, layer.failed); __threadfence_block(); told[i] = 1; }
    __syncwarp();
  }
}

template <int M, int STAGES, int WARPS, bool ARITH, bool CLOCKS>
__global__ void __launch_bounds__(32 * WARPS + 32, 1) layer_step(const __grid_constant__ Layer layer) {
  extern __shared__ char memory[];
  __shared__ volatile int told[kProducts];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, octet = lane % 4, quad = lane / 4, worker = blockIdx.x * WARPS + warp;
  if (threadIdx.x < kProducts) told[threadIdx.x] = threadIdx.x == 0;
  __syncthreads();
  asm volatile("griddepcontrol.launch_dependents;");
  if (warp == WARPS) {
    asm volatile("griddepcontrol.wait;" ::: "memory");
    herald<M>(layer, told, lane);
    return;
  }
  const uint32_t ring = static_cast<uint32_t>(__cvta_generic_to_shared(memory)) + warp * (STAGES * kStage);
  int fetch_product = 0, fetch_unit = -1, fetch_last = 0;
  auto open = [&]() {  // the first unit of the next product that has one
    while (fetch_product < layer.products) {
      const Product& p = layer.p[fetch_product];
      const int total = p.n / 32 * p.blocks;
      fetch_unit = worker * p.each, fetch_last = min(fetch_unit + p.each, total);
      if (fetch_unit < fetch_last) return;
      ++fetch_product;
    }
  };
  open();
  auto fetch = [&](int stage) {
    if (fetch_product < layer.products) {
      const Product& p = layer.p[fetch_product];
      const int row = fetch_unit / p.blocks * 32, b = fetch_unit % p.blocks;
      const uint32_t* from = p.words + static_cast<size_t>(b) * kWords * p.n + row + (lane % 8) * 4 + static_cast<size_t>(lane / 8) * p.n;
      const uint32_t to = ring + stage * kStage + lane / 8 * 128 + swizzled(lane % 8, lane / 8);
#pragma unroll
      for (int i = 0; i < 8; ++i) copy16(to + i * 512, from + static_cast<size_t>(4 * i) * p.n);
      if (lane < 24) copy16(to + 8 * 512, from + static_cast<size_t>(32) * p.n);
      if (lane >= 24) {
        const int i = lane - 24;
        copy16(ring + stage * kStage + kWords * 128 + i * 16, p.halves + (static_cast<size_t>(b) * 2 + i / 4) * p.n + row + (i % 4) * 8);
      }
      if (++fetch_unit == fetch_last) ++fetch_product, open();
    }
    commit();
  };
#pragma unroll
  for (int s = 0; s < STAGES; ++s) fetch(s);
  asm volatile("griddepcontrol.wait;" ::: "memory");

  const int column = quad, token = min(column / 2, M - 1), mine = min(octet, M - 1);
  long long of_x = 0, of_weights = 0;
  const long long began = CLOCKS ? clock64() : 0;
  int stage = 0;
  for (int i = 0; i < layer.products; ++i) {
    const Product& p = layer.p[i];
    const int total = p.n / 32 * p.blocks, first = worker * p.each, last = min(first + p.each, total), n = p.n, blocks = p.blocks;
    if (first >= last) continue;
    const long long then = CLOCKS ? clock64() : 0;
    while (!told[i]) {}
    __threadfence_block();
    __syncwarp();
    if (CLOCKS) of_x += clock64() - then;
    const size_t per_token = static_cast<size_t>(blocks) * kXWords;
    float acc[4] = {0, 0, 0, 0};
    for (int unit = first; unit < last; ++unit) {
      const int row_block = unit / blocks, b = unit % blocks;
      const long long before = CLOCKS ? clock64() : 0;
      arrived<STAGES - 1>();
      __syncwarp();
      if (CLOCKS) of_weights += clock64() - before;
      const uint32_t at = ring + stage * kStage;
      if (ARITH) {
        const uint32_t* x = p.x + token * per_token + static_cast<size_t>(b) * kXWords;
        const uint32_t* xs = p.x + mine * per_token + static_cast<size_t>(b) * kXWords;
        const float scale = __uint_as_float(ldx(xs + 128));
        uint2 xb[8];
#pragma unroll
        for (int g = 0; g < 8; ++g) xb[g] = ldx2(x + g * 16 + (octet * 2 + column % 2) * 2);
        const uint2 xm = ldx2(x + 132 + (column % 2) * 16 + octet * 2);
        multiply(acc, at, quad, octet, scale, [&](int g) { return xb[g]; }, xm);
      } else {
        acc[0] += looked_at(at, quad, octet);
      }
      __syncwarp();
      fetch(stage);
      stage = stage + 1 == STAGES ? 0 : stage + 1;
      if (b + 1 != blocks && unit + 1 != last) continue;

      const int from = row_block * blocks / p.each, parts = ((row_block + 1) * blocks - 1) / p.each - from + 1;
      float* part = p.partials + (static_cast<size_t>(row_block) * kSlots + (worker - from)) * (M * 32);
      if (octet < M) __stcg(reinterpret_cast<float4*>(part + octet * 32 + quad * 4), make_float4(acc[0], acc[1], acc[2], acc[3]));
      acc[0] = acc[1] = acc[2] = acc[3] = 0;
      __threadfence();
      __syncwarp();
      int earlier = 0;
      if (lane == 0) earlier = atomicAdd(p.counters + row_block, 1);
      if (__shfl_sync(~0u, earlier, 0) + 1 != parts) continue;
      __threadfence();
      const float* all = p.partials + static_cast<size_t>(row_block) * kSlots * (M * 32);
      for (int m = 0; m < M; ++m) {
        float sum = 0;
        for (int k = 0; k < parts; ++k) sum += __ldcg(all + k * (M * 32) + m * 32 + lane);
        __stcg(p.out + static_cast<size_t>(m) * n + row_block * 32 + lane, sum);
        if (p.kind == kNorm) {
          sum *= sum;
#pragma unroll
          for (int d = 16; d; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
          if (lane == 0) __stcg(layer.squares + (i / 2 * (n / 32) + row_block) * M + m, sum);
        }
      }
      if (p.kind == kPlain) continue;
      __threadfence();
      __syncwarp();
      if (p.kind == kNorm) {
        if (lane == 0) atomicAdd(layer.tiles + i, 1);
        continue;
      }
      const int group = row_block % (n / 64) / 8;
      if (lane == 0) earlier = atomicAdd(layer.groups + group, 1);
      if (__shfl_sync(~0u, earlier, 0) != 15) continue;
      __threadfence();
      for (int m = 0; m < M; ++m) {
        const float* gate = p.out + static_cast<size_t>(m) * n + group * 256 + lane * 8;
        float v[8];
#pragma unroll
        for (int k = 0; k < 8; ++k) v[k] = gelu(__ldcg(gate + k)) * __ldcg(gate + n / 2 + k);
        quantize(v, layer.p[i + 1].x + (static_cast<size_t>(m) * layer.p[i + 1].blocks + group) * kXWords, lane);
      }
      __threadfence();
      __syncwarp();
      if (lane == 0) atomicAdd(layer.made + i + 1, 1);
    }
  }
  if (CLOCKS && lane == 0) {
    auto add = [&](int at, long long v) { atomicAdd(reinterpret_cast<unsigned long long*>(layer.clocks + at), static_cast<unsigned long long>(v)); };
    add(0, of_x), add(1, of_weights), add(2, clock64() - began), add(3, 1);
  }
}

// In place of the attention: some microseconds that depend on what was before, and some reading.
__global__ void __launch_bounds__(256) stand_in(const uint4* from, int reads, float* out) {
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
  uint32_t some = 0;
  for (int i = 0; i < reads; ++i) {
    const uint4 v = __ldcg(from + (static_cast<size_t>(blockIdx.x) * reads + i) * 256 + threadIdx.x);
    some ^= v.x ^ v.y ^ v.z ^ v.w;
  }
  for (int d = 16; d; d /= 2) some ^= __shfl_xor_sync(~0u, some, d);
  if (threadIdx.x % 32 == 0) out[blockIdx.x * 8 + threadIdx.x / 32] = __uint_as_float(some & 0x3FFFFFFF);
}

constexpr int kTokens = 4, kLayers = 60, kCounters = 8192 + 256;  // of a layer: row blocks of its products, tiles, made, groups
int processors = 132;
std::vector<Layer> layers;
Layer head;
int* counters;
size_t counter_bytes, weight_bytes = 0;
uint4* keys;
float* unused;

template <typename Kernel, typename... Arguments>
void launch(Kernel kernel, int programs, int threads, int bytes, bool early, cudaStream_t stream, Arguments... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(programs), config.blockDim = dim3(threads), config.dynamicSmemBytes = bytes, config.stream = stream;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization, attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute, config.numAttrs = early ? 1 : 0;
  CHECK(cudaLaunchKernelEx(&config, kernel, arguments...));
}

Layer cut(Layer layer, int warps) {
  for (int i = 0; i < layer.products; ++i) {
    Product& p = layer.p[i];
    const int workers = processors * warps, total = p.n / 32 * p.blocks;
    p.each = (total + workers - 1) / workers;
    if ((p.blocks + p.each - 1) / p.each + 1 > kSlots) { std::printf("a row block has too many parts\n"); std::exit(1); }
  }
  return layer;
}

bool failed() {
  int value = 0;
  CHECK(cudaMemcpy(&value, layers[0].failed, 4, cudaMemcpyDeviceToHost));
  return value != 0;
}

template <int M, int STAGES, int WARPS, bool ARITH, bool CLOCKS> bool prepared(int* registers) {
  auto kernel = layer_step<M, STAGES, WARPS, ARITH, CLOCKS>;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, WARPS * STAGES * kStage) != cudaSuccess) { cudaGetLastError(); return false; }
  cudaFuncAttributes a;
  CHECK(cudaFuncGetAttributes(&a, kernel));
  *registers = a.numRegs;
  int resident = 0;
  CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, 32 * WARPS + 32, WARPS * STAGES * kStage));
  return resident >= 1;
}

template <int M, int STAGES, int WARPS, bool ARITH, bool CLOCKS = false> void step(cudaStream_t stream, bool early, bool attention) {
  auto kernel = layer_step<M, STAGES, WARPS, ARITH, CLOCKS>;
  const int bytes = WARPS * STAGES * kStage;
  CHECK(cudaMemsetAsync(counters, 0, counter_bytes, stream));
  for (int l = 0; l < kLayers; ++l) {
    if (attention) {
      launch(stand_in, 40, 256, 0, early && l, stream, static_cast<const uint4*>(keys), 4, unused);
      launch(stand_in, 256, 256, 0, early, stream, static_cast<const uint4*>(keys), 2, unused);
      launch(stand_in, 32, 256, 0, early, stream, static_cast<const uint4*>(keys), 8, unused);
    }
    launch(kernel, processors, 32 * WARPS + 32, bytes, early && (attention || l), stream, cut(layers[l], WARPS));
  }
  launch(kernel, processors, 32 * WARPS + 32, bytes, early, stream, cut(head, WARPS));
}

template <int M, int STAGES, int WARPS, bool ARITH, bool CLOCKS = false> void time_step(const char* what, bool early, bool attention) {
  int registers = 0;
  if (!prepared<M, STAGES, WARPS, ARITH, CLOCKS>(&registers)) { std::printf("%-40s no room\n", what); return; }
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  CHECK(cudaStreamCreate(&stream));
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  step<M, STAGES, WARPS, ARITH, CLOCKS>(stream, early, attention);
  CHECK(cudaStreamEndCapture(stream, &graph));
  CHECK(cudaGraphInstantiate(&exec, graph, 0));
  CHECK(cudaMemset(layers[0].clocks, 0, 32));
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin)); CHECK(cudaEventCreate(&end));
  std::vector<float> times;
  for (int i = 0; i < 12; ++i) {
    CHECK(cudaEventRecord(begin, stream));
    CHECK(cudaGraphLaunch(exec, stream));
    CHECK(cudaEventRecord(end, stream));
    CHECK(cudaEventSynchronize(end));
    float ms = 0;
    CHECK(cudaEventElapsedTime(&ms, begin, end));
    if (i > 1) times.push_back(ms);
  }
  if (failed()) { std::printf("%-40s WAITED TOO LONG\n", what); std::exit(1); }
  std::sort(times.begin(), times.end());
  const double ms = times[times.size() / 2];
  std::printf("%-40s %3d registers, %s, %s attention: %.3f ms (%.3f - %.3f), %.0f GB/s", what, registers, early ? "early" : "in turn", attention ? "with" : "without", ms, times.front(), times.back(), weight_bytes / ms / 1e6);
  if (CLOCKS) {
    long long c[4];
    CHECK(cudaMemcpy(c, layers[0].clocks, 32, cudaMemcpyDeviceToHost));
    std::printf("; of a warp's time %.0f %% wait for activations, %.0f %% for weights", 100.0 * c[0] / c[2], 100.0 * c[1] / c[2]);
  }
  std::printf("\n");
  std::fflush(stdout);
  CHECK(cudaGraphExecDestroy(exec)); CHECK(cudaGraphDestroy(graph)); CHECK(cudaStreamDestroy(stream));
}

template <typename T> std::vector<T> read(const T* from, size_t count) {
  std::vector<T> found(count);
  CHECK(cudaMemcpy(found.data(), from, count * sizeof(T), cudaMemcpyDeviceToHost));
  return found;
}

// Activations of a block as the host reads them: element e of a token's block.
double activation(const uint32_t* xb, int e) {
  const int g = e / 32, o = e / 8 % 4, half = e / 4 % 2, i = e % 4;
  float scale;
  std::memcpy(&scale, &xb[128], 4);
  return scale * (256.0 * static_cast<int8_t>(xb[g * 16 + o * 4 + half] >> (8 * i)) + static_cast<int8_t>(xb[g * 16 + o * 4 + 2 + half] >> (8 * i)));
}

template <int M> std::vector<std::vector<float>> check(const Layer& layer, bool told) {
  std::vector<std::vector<float>> outs;
  for (int i = 0; i < layer.products; ++i) {
    const Product& p = layer.p[i];
    const auto words = read(p.words, static_cast<size_t>(p.blocks) * kWords * p.n);
    const auto x = read(p.x, static_cast<size_t>(M) * p.blocks * kXWords);
    const auto halves = read(p.halves, static_cast<size_t>(p.blocks) * 2 * p.n);
    outs.push_back(read(p.out, static_cast<size_t>(M) * p.n));
    if (!told) continue;
    double worst = 0, size = 0;
    for (int m = 0; m < M; ++m)
      for (int row = 0; row < p.n; row += 211) {
        double want = 0;
        for (int b = 0; b < p.blocks; ++b) {
          auto word = [&](int k) { return words[(static_cast<size_t>(b) * kWords + k) * p.n + row]; };
          const uint32_t* xb = &x[(static_cast<size_t>(m) * p.blocks + b) * kXWords];
          const double d = __half2float(halves[(static_cast<size_t>(b) * 2) * p.n + row]), dm = __half2float(halves[(static_cast<size_t>(b) * 2 + 1) * p.n + row]);
          for (int g = 0; g < 8; ++g) {
            const uint32_t a = word(32), bq = word(33), c = word(34);
            const int sc = g < 4 ? (a >> (8 * g)) & 63 : ((c >> (8 * (g - 4))) & 15) | ((a >> (8 * (g - 4) + 2)) & 48);
            const int mn = g < 4 ? (bq >> (8 * g)) & 63 : ((c >> (8 * (g - 4) + 4)) & 15) | ((bq >> (8 * (g - 4) + 2)) & 48);
            for (int k = 0; k < 32; ++k) {
              const int q = (word(4 * g + k / 8) >> (8 * (k % 4) + 4 * (k / 4 % 2))) & 15;
              want += (d * sc * q - dm * mn) * activation(xb, 32 * g + k);
            }
          }
        }
        worst = std::max(worst, std::fabs(want - outs[i][static_cast<size_t>(m) * p.n + row]));
        size = std::max(size, std::fabs(want));
      }
    double made = 0, most = 0;  // of the next product's activations, where this one's result makes them
    if (p.kind == kGlu) {
      const auto next = read(layer.p[i + 1].x, static_cast<size_t>(M) * layer.p[i + 1].blocks * kXWords);
      for (int m = 0; m < M; ++m)
        for (int e = 0; e < p.n / 2; e += 13) {
          const float g = outs[i][static_cast<size_t>(m) * p.n + e], v = outs[i][static_cast<size_t>(m) * p.n + p.n / 2 + e];
          const double want = 0.5 * g * (1.0 + std::tanh(0.7978845608 * (g + 0.044715 * g * g * g))) * v;
          made = std::max(made, std::fabs(want - activation(&next[(static_cast<size_t>(m) * layer.p[i + 1].blocks + e / 256) * kXWords], e % 256)));
          most = std::max(most, std::fabs(want));
        }
    }
    std::printf("check: %d tokens, n %d, blocks %d: worst %.3e of %.3e %s; activations made: %.3e of %.3e %s\n", M, p.n, p.blocks, worst, size,
                worst <= 2e-5 * size ? "right" : "WRONG", made, most, made <= 1e-4 * most ? "right" : "WRONG");
  }
  return outs;
}

int main() {
  cudaDeviceProp properties;
  CHECK(cudaGetDeviceProperties(&properties, 0));
  processors = properties.multiProcessorCount;
  struct Shape { int n, k, kind; };
  const Shape shapes[kProducts] = {{5376, 8192, kNorm}, {43008, 5376, kGlu}, {5376, 21504, kNorm}, {16384, 5376, kPlain}};
  counter_bytes = static_cast<size_t>(kLayers + 1) * kCounters * 4;
  CHECK(cudaMalloc(&counters, counter_bytes));
  float *partials, *squares, *residual;
  int* failure;
  long long* clocks;
  uint32_t* x0;
  CHECK(cudaMalloc(&partials, static_cast<size_t>(8192) * kSlots * kTokens * 32 * 4));
  CHECK(cudaMalloc(&squares, 2 * 168 * kTokens * 4));
  CHECK(cudaMalloc(&residual, kTokens * kHidden * 4)); CHECK(cudaMemset(residual, 0, kTokens * kHidden * 4));
  CHECK(cudaMalloc(&failure, 4)); CHECK(cudaMemset(failure, 0, 4));
  CHECK(cudaMalloc(&clocks, 32));
  CHECK(cudaMalloc(&keys, 64 << 20)); CHECK(cudaMemset(keys, 1, 64 << 20));
  CHECK(cudaMalloc(&unused, 1 << 20));
  const size_t x_words = static_cast<size_t>(kTokens) * 84 * kXWords;
  CHECK(cudaMalloc(&x0, x_words * 4));
  std::vector<uint32_t> host(x_words);
  std::mt19937 random(1);
  for (size_t t = 0; t < x_words / kXWords; ++t) {  // blocks of a token are wherever: each is made by itself
    uint32_t* block = &host[t * kXWords];
    int sums[16] = {};
    const float scale = 1e-5f;
    std::memcpy(block + 128, &scale, 4);
    for (int e = 0; e < 256; ++e) {
      const int q = static_cast<int>(random() % 60000) - 30000, h = (q + 128) >> 8, g = e / 32, o = e / 8 % 4, half = e / 4 % 2, i = e % 4;
      block[g * 16 + o * 4 + half] |= static_cast<uint32_t>(h & 255) << (8 * i), block[g * 16 + o * 4 + 2 + half] |= static_cast<uint32_t>((q - h * 256) & 255) << (8 * i);
      sums[e / 16] += q;
    }
    for (int s = 0; s < 16; ++s) {
      const int b0 = static_cast<int8_t>(sums[s] & 255), s1 = (sums[s] - b0) >> 8, b1 = static_cast<int8_t>(s1 & 255), b2 = (s1 - b1) >> 8, o = s / 4, i = s % 4;
      block[132 + o * 2] |= static_cast<uint32_t>(b0 & 255) << (8 * i), block[133 + o * 2] |= static_cast<uint32_t>(b1 & 255) << (8 * i), block[148 + o * 2] |= static_cast<uint32_t>(b2 & 255) << (8 * i);
    }
  }
  CHECK(cudaMemcpy(x0, host.data(), host.size() * 4, cudaMemcpyHostToDevice));
  auto matrix = [&](Product& p, int n, int k, int kind, uint32_t seed) {
    uint32_t* words; __half* halves;
    const int blocks = k / 256;
    CHECK(cudaMalloc(&words, static_cast<size_t>(blocks) * kWords * n * 4)); CHECK(cudaMalloc(&halves, static_cast<size_t>(blocks) * 2 * n * 2));
    fill<<<1024, 256>>>(words, static_cast<size_t>(blocks) * kWords * n, seed);
    fill_halves<<<1024, 256>>>(halves, static_cast<size_t>(blocks) * 2 * n, seed);
    p.words = words, p.halves = halves, p.n = n, p.blocks = blocks, p.kind = kind, p.partials = partials;
    CHECK(cudaMalloc(&p.out, static_cast<size_t>(kTokens) * n * 4));
    weight_bytes += static_cast<size_t>(blocks) * (kWords * 4 + 4) * n;
  };
  for (int l = 0; l <= kLayers; ++l) {
    Layer layer{};
    int* mine = counters + static_cast<size_t>(l) * kCounters;
    layer.squares = squares, layer.residual = residual, layer.failed = failure, layer.clocks = clocks;
    layer.tiles = mine, layer.made = mine + 8, layer.groups = mine + 16;
    layer.products = l < kLayers ? kProducts : 1;
    int row_blocks = 0;
    for (int i = 0; i < layer.products; ++i) {
      const Shape s = l < kLayers ? shapes[i] : Shape{262144, 5376, kPlain};
      matrix(layer.p[i], s.n, s.k, s.kind, static_cast<uint32_t>(l * 7 + i));
      layer.p[i].counters = mine + 256 + row_blocks, row_blocks += s.n / 32;
      if (i == 0) layer.p[i].x = x0;
      else CHECK(cudaMalloc(&layer.p[i].x, static_cast<size_t>(kTokens) * layer.p[i].blocks * kXWords * 4));
      if (256 + row_blocks > kCounters) { std::printf("too few counters\n"); return 1; }
    }
    if (l < kLayers) layers.push_back(layer);
    else head = layer;
  }
  CHECK(cudaDeviceSynchronize());
  std::printf("%s, %d multiprocessors, %.3f GB\n", properties.name, processors, weight_bytes / 1e9);
  {
    cudaEvent_t begin, end; CHECK(cudaEventCreate(&begin)); CHECK(cudaEventCreate(&end));
    const size_t bytes = static_cast<size_t>(21) * kWords * 262144 * 4;
    float best = 1e9;
    for (int i = 0; i < 6; ++i) {
      CHECK(cudaEventRecord(begin)); read_all<<<processors * 4, 512>>>(reinterpret_cast<const uint4*>(head.p[0].words), bytes / 16, reinterpret_cast<uint32_t*>(unused)); CHECK(cudaEventRecord(end)); CHECK(cudaEventSynchronize(end));
      float ms; CHECK(cudaEventElapsedTime(&ms, begin, end)); best = std::min(best, ms);
    }
    std::printf("plain reads of one matrix: %.0f GB/s\n", bytes / best / 1e6);
  }
  int registers = 0;
  std::vector<std::vector<float>> once;
  for (int turn = 0; turn < 2; ++turn) {
    if (!prepared<1, 3, 12, true, false>(&registers)) { std::printf("no room\n"); return 1; }
    CHECK(cudaMemset(residual, 0, kTokens * kHidden * 4));
    step<1, 3, 12, true>(nullptr, true, true);
    CHECK(cudaDeviceSynchronize());
    if (failed()) { std::printf("WAITED TOO LONG\n"); return 1; }
    const auto found = check<1>(layers[1], turn == 0);
    if (turn && found != once) std::printf("repeats: WRONG\n");
    else if (turn) std::printf("repeats: the same bits\n");
    once = found;
  }
  if (!prepared<4, 3, 12, true, false>(&registers)) { std::printf("no room\n"); return 1; }
  step<4, 3, 12, true>(nullptr, true, true);
  CHECK(cudaDeviceSynchronize());
  if (failed()) { std::printf("WAITED TOO LONG\n"); return 1; }
  check<4>(layers[2], true);
  for (bool early : {false, true})
    for (bool attention : {false, true}) {
      time_step<1, 3, 12, true>("1 token, 12 warps, 3 stages", early, attention);
      time_step<1, 3, 12, false>("the same without arithmetic", early, attention);
    }
  time_step<1, 2, 12, true>("1 token, 12 warps, 2 stages", true, true);
  time_step<1, 2, 16, true>("1 token, 16 warps, 2 stages", true, true);
  time_step<1, 4, 8, true>("1 token, 8 warps, 4 stages", true, true);
  time_step<4, 3, 12, true>("4 tokens, 12 warps, 3 stages", true, true);
  time_step<4, 2, 16, true>("4 tokens, 16 warps, 2 stages", true, true);
  time_step<1, 3, 12, true, true>("1 token, 12 warps, 3 stages, clocked", true, true);
  time_step<4, 3, 12, true, true>("4 tokens, 12 warps, 3 stages, clocked", true, true);
}
