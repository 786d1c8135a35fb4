// A probe: the matmuls of one decode step as a graph of kernels, each of which brings its first weights into shared memory before it waits for
// the kernel before it. With half of a multiprocessor a kernel, two are resident, and memory need not pause between them.
//   nvcc -std=c++17 -O3 -arch=sm_90a stream_chain.cu -o stream_chain && ./stream_chain
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#define CHECK(call) do { cudaError_t e_ = (call); if (e_ != cudaSuccess) { std::printf("%s:%d: %s\n", __FILE__, __LINE__, cudaGetErrorString(e_)); std::exit(1); } } while (0)

constexpr int kWords = 35, kStage = kWords * 128 + 128, kXWords = 128 + 4 + 32;  // a token's block: bytes, scale, sums of 16 in three bytes

// Where chunk c of 16 bytes lies in a strip of 8: the eight lanes that read at once, two quads of four strips, meet no bank twice.
__device__ __forceinline__ uint32_t swizzled(int c, int strip) { return (c ^ (strip % 4 * 2)) * 16; }
__device__ __forceinline__ void copy16(uint32_t to, const void* from) { asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from)); }
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;"); }
template <int N> __device__ __forceinline__ void arrived() { asm volatile("cp.async.wait_group %0;" ::"n"(N)); }
__device__ __forceinline__ uint4 lds4(uint32_t at) { uint4 v; asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at)); return v; }
__device__ __forceinline__ uint2 lds2(uint32_t at) { uint2 v; asm volatile("ld.shared.v2.b32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(at)); return v; }
__device__ __forceinline__ int byte_of(uint32_t w, int g) { return (w >> (8 * g)) & 255; }
__device__ __forceinline__ void product(int c[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
      : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "r"(0));
}
__device__ __forceinline__ void small(int c[4], uint32_t a0, uint32_t a1, uint32_t b0) {
  asm("mma.sync.aligned.m16n8k16.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%7,%7,%7};"
      : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3]) : "r"(a0), "r"(a1), "r"(b0), "r"(0));
}

// A warp's 32 rows of a block of 256 at `at`, times activations: acc has four rows of a quad, of token octet. activations(g): words of group g.
template <typename Activations>
__device__ __forceinline__ void multiply(float acc[4], uint32_t at, int quad, int octet, float scale, Activations activations, uint2 xm) {
  const uint4 s0 = lds4(at + 32 * 128 + swizzled(quad, 0)), s1 = lds4(at + 33 * 128 + swizzled(quad, 1)), s2 = lds4(at + 34 * 128 + swizzled(quad, 2));
  const uint2 d = lds2(at + kWords * 128 + quad * 8), dm = lds2(at + kWords * 128 + 64 + quad * 8);
  const uint32_t sa[4] = {s0.x, s0.y, s0.z, s0.w}, sb[4] = {s1.x, s1.y, s1.z, s1.w}, sc[4] = {s2.x, s2.y, s2.z, s2.w};
  uint32_t by[4][2];
#pragma unroll
  for (int r = 0; r < 4; ++r) by[r][0] = sa[r] & 0x3F3F3F3F, by[r][1] = (sc[r] & 0x0F0F0F0F) | ((sa[r] >> 2) & 0x30303030);
  int sums[4][2] = {};
#pragma unroll
  for (int g = 0; g < 8; ++g) {
    const uint4 q = lds4(at + (4 * g + octet) * 128 + swizzled(quad, octet));
    const uint2 xb = activations(g);
    const uint32_t qs[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      int c[4];
      product(c, qs[2 * pair] & 0x0F0F0F0F, qs[2 * pair + 1] & 0x0F0F0F0F, (qs[2 * pair] >> 4) & 0x0F0F0F0F, (qs[2 * pair + 1] >> 4) & 0x0F0F0F0F, xb.x, xb.y);
      const int k0 = byte_of(by[2 * pair][g / 4], g % 4), k1 = byte_of(by[2 * pair + 1][g / 4], g % 4);
      sums[2 * pair][0] += k0 * c[0], sums[2 * pair][1] += k0 * c[1];
      sums[2 * pair + 1][0] += k1 * c[2], sums[2 * pair + 1][1] += k1 * c[3];
    }
  }
  const __half2 dh[2] = {*reinterpret_cast<const __half2*>(&d.x), *reinterpret_cast<const __half2*>(&d.y)};
  const __half2 mh[2] = {*reinterpret_cast<const __half2*>(&dm.x), *reinterpret_cast<const __half2*>(&dm.y)};
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
    uint32_t a[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int r = 2 * pair + j;
      const uint32_t lo = sb[r] & 0x3F3F3F3F, hi = ((sc[r] >> 4) & 0x0F0F0F0F) | ((sb[r] >> 2) & 0x30303030);
      a[j] = __byte_perm(lo, hi, octet * 0x2222 + 0x1100);
    }
    int c[4], e[4];
    small(c, a[0], a[1], xm.x);
    small(e, a[0], a[1], xm.y);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int r = 2 * pair + j;
      const float value = fmaf(static_cast<float>(sums[r][0]), 256.0f, static_cast<float>(sums[r][1]));
      const float less = static_cast<float>(c[2 * j] + (e[2 * j] << 8) + (c[2 * j + 1] << 16));
      const float dr = r % 2 ? __high2float(dh[r / 2]) : __low2float(dh[r / 2]), mr = r % 2 ? __high2float(mh[r / 2]) : __low2float(mh[r / 2]);
      acc[r] = fmaf(less, -(mr * scale), fmaf(value, dr * scale, acc[r]));
    }
  }
}

// In place of the arithmetic: every word of a stage is read.
__device__ __forceinline__ float looked_at(uint32_t at, int quad, int octet) {
  uint32_t some = 0;
#pragma unroll
  for (int g = 0; g < 9; ++g) {
    const uint4 q = lds4(at + min(4 * g + octet, 34) * 128 + swizzled(quad, octet));
    some += q.x ^ q.y ^ q.z ^ q.w;
  }
  return __uint_as_float(some & 0x3FFFFFFF);
}

__global__ void fill(uint32_t* p, size_t n, uint32_t seed) {
  for (size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; i < n; i += static_cast<size_t>(gridDim.x) * blockDim.x) {
    uint32_t v = static_cast<uint32_t>(i) * 2654435761u + seed;
    v ^= v >> 16, v *= 0x7feb352du, v ^= v >> 15, v *= 0x846ca68bu, v ^= v >> 16;
    p[i] = v;
  }
}
__global__ void fill_halves(__half* p, size_t n, uint32_t seed) {
  for (size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; i < n; i += static_cast<size_t>(gridDim.x) * blockDim.x)
    p[i] = __float2half(0.0001f * static_cast<float>((i * 7919 + seed) % 101));
}
__global__ void __launch_bounds__(512) read_all(const uint4* p, size_t n, uint32_t* out) {
  uint32_t some = 0;
  for (size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; i < n; i += static_cast<size_t>(gridDim.x) * blockDim.x) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p + i));
    some ^= v.x ^ v.y ^ v.z ^ v.w;
  }
  if (some == 12345) *out = some;
}

constexpr int kWarps = 12;
constexpr int kSlots = 48;  // partial sums of a row block at most

struct Work {  // of one product
  const uint32_t* words;  // [blocks, 35, n]
  const __half* halves;   // [blocks, 2, n]
  const uint32_t* x;      // [M, blocks, kXWords]
  float* partials;        // [n / 32, kSlots, M, 32]
  int* counters;          // [n / 32]
  float* out;             // [M, n]
  int n, blocks, each;    // blocks of 256 along K; those of four warps
};

template <int M, int STAGES, int CTAS, bool ARITH, int SPLIT>  // SPLIT: super-rows of SPLIT warps
__global__ void __launch_bounds__(32 * kWarps, CTAS) chain(Work p) {
  extern __shared__ char memory[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, octet = lane % 4, quad = lane / 4;
  constexpr int kGroups = kWarps / SPLIT;
  const int group = blockIdx.x * kGroups + warp / SPLIT, own = warp % SPLIT;
  const int total = p.n / (32 * SPLIT) * p.blocks;
  const int first = group * p.each, last = min(first + p.each, total);
  const uint32_t ring = static_cast<uint32_t>(__cvta_generic_to_shared(memory)) + warp * (STAGES * kStage);
  asm volatile("griddepcontrol.launch_dependents;");

  auto fetch = [&](int unit, int stage) {
    if (unit < last) {
      const int row = (unit / p.blocks * SPLIT + own) * 32, b = unit % p.blocks;
      const uint32_t* from = p.words + static_cast<size_t>(b) * kWords * p.n + row + (lane % 8) * 4 + static_cast<size_t>(lane / 8) * p.n;
      uint32_t to = ring + stage * kStage + lane / 8 * 128 + swizzled(lane % 8, lane / 8);
#pragma unroll
      for (int i = 0; i < 8; ++i) copy16(to + i * 512, from + static_cast<size_t>(4 * i) * p.n);
      if (lane < 24) copy16(to + 8 * 512, from + static_cast<size_t>(32) * p.n);
      if (lane >= 24) {
        const int i = lane - 24;
        copy16(ring + stage * kStage + kWords * 128 + i * 16, p.halves + (static_cast<size_t>(b) * 2 + i / 4) * p.n + row + (i % 4) * 8);
      }
    }
    commit();
  };
#pragma unroll
  for (int s = 0; s < STAGES; ++s) fetch(first + s, s);
  asm volatile("griddepcontrol.wait;" ::: "memory");

  const int column = quad, token = min(column / 2, M - 1), mine = min(octet, M - 1);
  const size_t per_token = static_cast<size_t>(p.blocks) * kXWords;
  float acc[4] = {0, 0, 0, 0};
  int stage = 0;
  for (int unit = first; unit < last; ++unit) {
    const int s_row = unit / p.blocks, b = unit % p.blocks;
    arrived<STAGES - 1>();
    __syncwarp();
    const uint32_t at = ring + stage * kStage;
    if (ARITH) {
      const uint32_t* x = p.x + token * per_token + static_cast<size_t>(b) * kXWords;
      const uint32_t* xs = p.x + mine * per_token + static_cast<size_t>(b) * kXWords;
      const float scale = __uint_as_float(__ldg(xs + 128));
      const uint2 xm = __ldg(reinterpret_cast<const uint2*>(x + 132 + (column % 2) * 16 + octet * 2));
      multiply(acc, at, quad, octet, scale, [&](int g) { return __ldg(reinterpret_cast<const uint2*>(x + g * 16 + (octet * 2 + column % 2) * 2)); }, xm);
    } else {
      acc[0] += looked_at(at, quad, octet);
    }
    __syncwarp();
    fetch(unit + STAGES, stage);
    stage = stage + 1 == STAGES ? 0 : stage + 1;

    if (b + 1 == p.blocks || unit + 1 == last) {  // its part of a row block is done
      const int row_warp = s_row * SPLIT + own, from = s_row * p.blocks / p.each, parts = ((s_row + 1) * p.blocks - 1) / p.each - from + 1;
      float* part = p.partials + (static_cast<size_t>(row_warp) * kSlots + (group - from)) * (M * 32);
      if (octet < M) __stcg(reinterpret_cast<float4*>(part + octet * 32 + quad * 4), make_float4(acc[0], acc[1], acc[2], acc[3]));
      __threadfence();
      __syncwarp();
      int before = 0;
      if (lane == 0) before = atomicAdd(p.counters + row_warp, 1);
      before = __shfl_sync(~0u, before, 0);
      if (before + 1 == parts) {
        __threadfence();
        const float* all = p.partials + static_cast<size_t>(row_warp) * kSlots * (M * 32);
        for (int m = 0; m < M; ++m) {
          float sum = 0;
          for (int i = 0; i < parts; ++i) sum += __ldcg(all + i * (M * 32) + m * 32 + lane);
          p.out[static_cast<size_t>(m) * p.n + row_warp * 32 + lane] = sum;
        }
        if (lane == 0) p.counters[row_warp] = 0;
      }
      acc[0] = acc[1] = acc[2] = acc[3] = 0;
    }
  }
}

struct Shape { const char* name; int n, k; };
const Shape kLayer[] = {{"qkv", 16384, 5376}, {"o", 5376, 8192}, {"gate_up", 43008, 5376}, {"down", 5376, 21504}};
const Shape kHead = {"head", 262144, 5376};

int processors = 132;
std::vector<Work> works;
size_t weight_bytes = 0;

template <typename Kernel> void launch(Kernel kernel, const Work& w, int ctas, int smem, bool early, cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(ctas), config.blockDim = dim3(32 * kWarps), config.dynamicSmemBytes = smem, config.stream = stream;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization, attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute, config.numAttrs = early ? 1 : 0;
  CHECK(cudaLaunchKernelEx(&config, kernel, w));
}

template <int M, int STAGES, int CTAS, bool ARITH, int SPLIT> double time_chain(const char* what, bool early, int tile = 1) {
  auto kernel = chain<M, STAGES, CTAS, ARITH, SPLIT>;
  const int smem = kWarps * STAGES * kStage;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem) != cudaSuccess) { cudaGetLastError(); std::printf("%-44s no room\n", what); return 0; }
  cudaFuncAttributes a;
  CHECK(cudaFuncGetAttributes(&a, kernel));
  int resident = 0;
  CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, 32 * kWarps, smem));
  cudaStream_t stream;
  CHECK(cudaStreamCreate(&stream));
  cudaGraph_t graph;
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (Work w : works) {
    const int groups = processors * tile * (kWarps / SPLIT), total = w.n / (32 * SPLIT) * w.blocks;
    w.each = (total + groups - 1) / groups;
    launch(kernel, w, (total + w.each * (kWarps / SPLIT) - 1) / (w.each * (kWarps / SPLIT)), smem, early, stream);
  }
  CHECK(cudaStreamEndCapture(stream, &graph));
  cudaGraphExec_t exec;
  CHECK(cudaGraphInstantiate(&exec, graph, 0));
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
  std::sort(times.begin(), times.end());
  const double ms = times[times.size() / 2];
  std::printf("%-44s %3d registers, %d resident, %s: %.3f ms (%.3f - %.3f), %.0f GB/s\n", what, a.numRegs, resident, early ? "early" : "in turn", ms, times.front(), times.back(), weight_bytes / ms / 1e6);
  std::fflush(stdout);
  CHECK(cudaGraphExecDestroy(exec)); CHECK(cudaGraphDestroy(graph)); CHECK(cudaStreamDestroy(stream));
  return ms;
}

// One product against the same sums on the host.
template <int M, int STAGES, int CTAS, int SPLIT> void check(const Work& whole) {
  Work w = whole;
  const int groups = processors * (kWarps / SPLIT), total = w.n / (32 * SPLIT) * w.blocks;
  w.each = (total + groups - 1) / groups;
  auto kernel = chain<M, STAGES, CTAS, true, SPLIT>;
  const int smem = kWarps * STAGES * kStage;
  CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem));
  launch(kernel, w, (total + w.each * (kWarps / SPLIT) - 1) / (w.each * (kWarps / SPLIT)), smem, false, nullptr);
  CHECK(cudaDeviceSynchronize());
  std::vector<uint32_t> words(static_cast<size_t>(w.blocks) * kWords * w.n), x(static_cast<size_t>(M) * w.blocks * kXWords);
  std::vector<__half> halves(static_cast<size_t>(w.blocks) * 2 * w.n);
  std::vector<float> out(static_cast<size_t>(M) * w.n);
  CHECK(cudaMemcpy(words.data(), w.words, words.size() * 4, cudaMemcpyDeviceToHost));
  CHECK(cudaMemcpy(x.data(), w.x, x.size() * 4, cudaMemcpyDeviceToHost));
  CHECK(cudaMemcpy(halves.data(), w.halves, halves.size() * 2, cudaMemcpyDeviceToHost));
  CHECK(cudaMemcpy(out.data(), w.out, out.size() * 4, cudaMemcpyDeviceToHost));
  double worst = 0, size = 0;
  for (int m = 0; m < M; ++m)
    for (int row = 0; row < w.n; row += 37) {
      double want = 0;
      for (int b = 0; b < w.blocks; ++b) {
        auto word = [&](int i) { return words[(static_cast<size_t>(b) * kWords + i) * w.n + row]; };
        const uint32_t* xb = &x[(static_cast<size_t>(m) * w.blocks + b) * kXWords];
        const double d = __half2float(halves[(static_cast<size_t>(b) * 2) * w.n + row]), dm = __half2float(halves[(static_cast<size_t>(b) * 2 + 1) * w.n + row]);
        float scale;
        std::memcpy(&scale, &xb[128], 4);
        double sum = 0, less = 0;
        for (int g = 0; g < 8; ++g) {
          const uint32_t a = word(32), bq = word(33), c = word(34);
          const int sc = g < 4 ? (a >> (8 * g)) & 63 : ((c >> (8 * (g - 4))) & 15) | ((a >> (8 * (g - 4) + 2)) & 48);
          const int mn = g < 4 ? (bq >> (8 * g)) & 63 : ((c >> (8 * (g - 4) + 4)) & 15) | ((bq >> (8 * (g - 4) + 2)) & 48);
          double dot = 0;
          for (int o = 0; o < 4; ++o)
            for (int half = 0; half < 2; ++half)
              for (int i = 0; i < 4; ++i) {
                const int q = (word(4 * g + o) >> (8 * i + 4 * half)) & 15;
                const int high = static_cast<int8_t>(xb[g * 16 + (o * 2 + 0) * 2 + half] >> (8 * i)), low = static_cast<int8_t>(xb[g * 16 + (o * 2 + 1) * 2 + half] >> (8 * i));
                dot += q * (256.0 * high + low);
              }
          sum += sc * dot;
          for (int h = 0; h < 2; ++h) {  // sums of 16: thread octet g / 2, its bytes 2 (g % 2) + h; bytes 0 and 2 in column 0 and 1's first word
            const int o = g / 2, i = 2 * (g % 2) + h;
            auto part = [&](int column, int which) { return static_cast<double>(static_cast<int8_t>(xb[132 + column * 16 + o * 2 + which] >> (8 * i))); };
            less += mn * (part(0, 0) + 256.0 * part(0, 1) + 65536.0 * part(1, 0));
          }
        }
        want += (sum * d - less * dm) * scale;
      }
      worst = std::max(worst, std::fabs(want - out[static_cast<size_t>(m) * w.n + row]));
      size = std::max(size, std::fabs(want));
    }
  std::printf("check: %d tokens, n %d, blocks %d: worst %.3e of %.3e %s\n", M, w.n, w.blocks, worst, size, worst <= 1e-5 * size ? "right" : "WRONG");
}

int main() {
  cudaDeviceProp properties;
  CHECK(cudaGetDeviceProperties(&properties, 0));
  processors = properties.multiProcessorCount;
  constexpr int kTokens = 4;
  std::vector<Shape> shapes;
  for (int layer = 0; layer < 60; ++layer) shapes.insert(shapes.end(), std::begin(kLayer), std::end(kLayer));
  shapes.push_back(kHead);
  int* counters; float *partials, *out; uint32_t* x;
  CHECK(cudaMalloc(&counters, 262144 / 32 * 4)); CHECK(cudaMemset(counters, 0, 262144 / 32 * 4));
  CHECK(cudaMalloc(&partials, static_cast<size_t>(262144 / 32) * kSlots * kTokens * 32 * 4));
  CHECK(cudaMalloc(&out, static_cast<size_t>(262144) * kTokens * 4));
  CHECK(cudaMalloc(&x, static_cast<size_t>(kTokens) * 84 * kXWords * 4));
  std::vector<uint32_t> host(static_cast<size_t>(kTokens) * 84 * kXWords);
  std::mt19937 random(1);
  for (size_t i = 0; i < host.size(); ++i) {
    host[i] = random();
    if (i % kXWords == 128) { const float s = 1e-4f * (1 + i % 5); std::memcpy(&host[i], &s, 4); }
    if (i % kXWords >= 132 + 16 && i % 2 == (132 % 2)) host[i] &= 0x07070707;  // the top byte of a sum of 16 of two bytes is small
  }
  CHECK(cudaMemcpy(x, host.data(), host.size() * 4, cudaMemcpyHostToDevice));
  for (size_t i = 0; i < shapes.size(); ++i) {
    const Shape& s = shapes[i];
    const int blocks = s.k / 256;
    uint32_t* words; __half* halves;
    CHECK(cudaMalloc(&words, static_cast<size_t>(blocks) * kWords * s.n * 4));
    CHECK(cudaMalloc(&halves, static_cast<size_t>(blocks) * 2 * s.n * 2));
    fill<<<1024, 256>>>(words, static_cast<size_t>(blocks) * kWords * s.n, static_cast<uint32_t>(i));
    fill_halves<<<1024, 256>>>(halves, static_cast<size_t>(blocks) * 2 * s.n, static_cast<uint32_t>(i));
    works.push_back({words, halves, x, partials, counters, out, s.n, blocks, 0});
    weight_bytes += static_cast<size_t>(blocks) * (kWords * 4 + 4) * s.n;
  }
  CHECK(cudaDeviceSynchronize());
  std::printf("%s, %d multiprocessors, %.3f GB in %zu products\n", properties.name, processors, weight_bytes / 1e9, works.size());
  for (int w : {0, 1, 2, 3}) check<1, 2, 2, 4>(works[w]);
  check<4, 2, 2, 4>(works[3]); check<4, 4, 1, 1>(works[1]);
  {  // plain reads of the head and the first products, for the ceiling
    cudaEvent_t begin, end; CHECK(cudaEventCreate(&begin)); CHECK(cudaEventCreate(&end));
    const size_t bytes = static_cast<size_t>(21) * kWords * 262144 * 4;
    float best = 1e9;
    for (int i = 0; i < 6; ++i) {
      CHECK(cudaEventRecord(begin)); read_all<<<processors * 4, 512>>>(reinterpret_cast<const uint4*>(works.back().words), bytes / 16, reinterpret_cast<uint32_t*>(out)); CHECK(cudaEventRecord(end)); CHECK(cudaEventSynchronize(end));
      float ms; CHECK(cudaEventElapsedTime(&ms, begin, end)); best = std::min(best, ms);
    }
    std::printf("plain reads of one matrix: %.0f GB/s\n", bytes / best / 1e6);
  }
  for (bool early : {false, true}) {
    time_chain<1, 2, 2, true, 4>("1 token, 2 stages, half a multiprocessor", early);
    time_chain<1, 2, 2, true, 2>("the same, two warps together", early);
    time_chain<1, 2, 2, true, 1>("the same, each warp for itself", early);
    time_chain<1, 2, 2, false, 4>("without arithmetic", early);
    time_chain<1, 4, 1, true, 4>("1 token, 4 stages, a whole multiprocessor", early);
    time_chain<1, 4, 1, false, 4>("without arithmetic", early);
    time_chain<1, 2, 2, true, 4>("2 stages, two programs a multiprocessor", early, 2);
    time_chain<4, 2, 2, true, 4>("4 tokens, 2 stages, half", early);
    time_chain<4, 4, 1, true, 4>("4 tokens, 4 stages, whole", early);
    time_chain<4, 2, 2, true, 4>("4 tokens, two programs a multiprocessor", early, 2);
  }
}
