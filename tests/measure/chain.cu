// A probe (`bench_chain.py`): the matmuls of a decode step between two attentions as one persistent kernel, a thread block a multiprocessor,
// all of them at once.
//
// Weights depend on nothing, so each warp keeps a ring of them in shared memory full across the boundaries of matmuls, and before it waits
// for the kernel before it. Between two matmuls all blocks meet: parts of results lie in global memory, and whoever needs a row adds them up.
//
// CHAIN is a list of `Matmul`s; M tokens, BLOCKS thread blocks, WARPS warps a block, each with a ring of STAGES units; SHARED
// bytes of shared memory. CLOCKS: where the time of warps goes is added to `clocks`.
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

enum Input { GIVEN, NORM, GATED };
struct Matmul {
  int n, k, slices;  // the matrix is [n, k]; K is cut into slices
  int bits;          // 4: Q4_K, 6: Q6_K
  int input;         // GIVEN: rows in fixed point; NORM: of the result before, through the residual stream; GATED: gates and values before
};

#define BOTH __host__ __device__ constexpr
__constant__ constexpr Matmul MATMULS[] = {CHAIN};
constexpr int COUNT = sizeof(MATMULS) / sizeof(Matmul);
constexpr int ROWS = 32, WIDE = 256;             // rows and elements of K of a unit
constexpr int XW = 144, GIVEN_WORDS = 176;       // words of a block of activations: bytes and sums; as given, with tails between
constexpr int THREADS = 32 * WARPS;
constexpr float LARGEST = 32512.0f;

BOTH int blocks_of(Matmul m) { return m.k / WIDE / m.slices; }  // of a slice
BOTH int row_blocks(Matmul m) { return m.n / ROWS; }
BOTH int per_slice(Matmul m) { return BLOCKS / m.slices; }  // thread blocks
BOTH int units_of(Matmul m) { return row_blocks(m) * blocks_of(m); }
BOTH int words_of(int bits) { return bits == 4 ? 35 : 52; }
BOTH int halves_of(int bits) { return bits == 4 ? 2 : 1; }
BOTH int parts_of(Matmul m) { return (blocks_of(m) - 1) / (units_of(m) / per_slice(m)) + 2; }  // of a row and slice, at most
BOTH int most(int a, int b) { return a > b ? a : b; }
BOTH int most_slice() { int found = 0; for (Matmul m : MATMULS) found = most(found, blocks_of(m)); return found; }
constexpr int SLICE = most_slice();
BOTH bool has(int bits) { for (Matmul m : MATMULS) if (m.bits == bits) return true; return false; }
constexpr int SLOT = (has(6) ? 52 : 36) * 128, TILES = (M + 3) / 4;  // halves of Q4_K follow its words, those of Q6_K lie apart

// Shared memory, in bytes.
constexpr int RINGS = WARPS * STAGES * SLOT;
constexpr int X_BYTES = M * SLICE * XW * 4, SCALE_BYTES = (M * SLICE * 4 + 15) / 16 * 16, EDGE_BYTES = WARPS * 2 * M * ROWS * 4;
constexpr int APART_AT = RINGS, X_AT = RINGS + (has(6) ? WARPS * STAGES * 128 : 0), SCALES_AT = X_AT + X_BYTES, EDGES_AT = SCALES_AT + SCALE_BYTES, ROOM_AT = EDGES_AT + EDGE_BYTES;
static_assert(SHARED == ROOM_AT + WARPS * 4, "bytes that the launch gives");

struct Table { const u32* words; const u16* halves; };

__device__ __forceinline__ u32 shared_address(const void* p) { u32 a; asm("{ .reg .u64 t; cvta.to.shared.u64 t, %1; cvt.u32.u64 %0, t; }" : "=r"(a) : "l"(p)); return a; }
__device__ __forceinline__ void copy16(u32 to, const void* from) { asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory"); }
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ __forceinline__ void arrived() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }
__device__ __forceinline__ uint4 lds4(u32 at) { uint4 v; asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at)); return v; }
__device__ __forceinline__ uint2 lds2(u32 at) { uint2 v; asm volatile("ld.shared.v2.b32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(at)); return v; }
__device__ __forceinline__ float4 ldcg4(const float* p) { float4 v; asm volatile("ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p) : "memory"); return v; }
__device__ __forceinline__ uint4 ldcg4(const u32* p) { uint4 v; asm volatile("ld.global.cg.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory"); return v; }
__device__ __forceinline__ u32 ldcg(const u32* p) { u32 v; asm volatile("ld.global.cg.b32 %0, [%1];" : "=r"(v) : "l"(p) : "memory"); return v; }
__device__ __forceinline__ void stcg(float* p, float v) { asm volatile("st.global.cg.f32 [%0], %1;" ::"l"(p), "f"(v) : "memory"); }
__device__ __forceinline__ void stcg4(u32* p, u32 a, u32 b, u32 c, u32 d) { asm volatile("st.global.cg.v4.b32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(a), "r"(b), "r"(c), "r"(d) : "memory"); }
__device__ __forceinline__ void stcg4(float* p, const float* v) { asm volatile("st.global.cg.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(p), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]) : "memory"); }
__device__ __forceinline__ float half_float(u32 w, int high) { float f; asm("{ .reg .b16 a, b; mov.b32 {a, b}, %1; cvt.f32.f16 %0, a; }" : "=f"(f) : "r"(high ? w >> 16 : w)); return f; }
__device__ __forceinline__ int byte_of(u32 w, int g) { return static_cast<int>(__byte_perm(w, 0, 0x4440 + g)); }
__device__ __forceinline__ int signed_byte_of(u32 w, int g) { int v; asm("prmt.b32 %0, %1, 0, %2;" : "=r"(v) : "r"(w), "r"(0x8880 + 0x1111 * g)); return v; }

template <bool SIGNED> __device__ __forceinline__ void product(int c[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  if (SIGNED)
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
        : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "r"(0));
  else
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
        : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "r"(0));
}
__device__ __forceinline__ void small_product(int c[4], u32 a0, u32 a1, u32 b0) {
  asm("mma.sync.aligned.m16n8k16.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%7,%7,%7};"
      : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3]) : "r"(a0), "r"(a1), "r"(b0), "r"(0));
}

// Four rows of a quad are chunk `chunk_of(quad)` of 16 bytes of a line of 128. Chunk c of line l lies at c ^ l % 8: eight lanes
// that read at once, two quads of four lines, meet no bank twice. `at` is a multiple of 512.
__device__ __forceinline__ int chunk_of(int quad) { return quad / 2 + quad % 2 * 4; }
__device__ __forceinline__ u32 line_at(u32 at, int line, int chunk) { return at + line * 128 + ((chunk ^ ((at / 128 + line) % 8)) * 16); }

// A warp's units of a matmul, of those of its slice of K.
__device__ __forceinline__ void share(const Matmul& m, u32 worker, u32& slice, u32& first, u32& end) {
  const u32 workers = per_slice(m) * WARPS, total = units_of(m);
  slice = worker / workers;
  const u32 own = worker - slice * workers;
  first = slice < static_cast<u32>(m.slices) ? own * total / workers : 0;
  end = slice < static_cast<u32>(m.slices) ? (own + 1) * total / workers : 0;
}

template <int BITS> __device__ __forceinline__ void copy_unit(u32 to, u32 halves_to, const Table& t, u32 n, u32 y, u32 row, int lane) {
  constexpr int LINES = words_of(BITS), HALVES = halves_of(BITS);
  const u32* from = t.words + static_cast<u64>(y + lane / 8) * n + row + lane % 8 * 4;
#pragma unroll
  for (int i = 0; i < LINES / 4; ++i) copy16(line_at(to, 4 * i + lane / 8, lane % 8), from + static_cast<u64>(4 * i) * n);
  if (LINES % 4 && lane < LINES % 4 * 8) copy16(line_at(to, LINES / 4 * 4 + lane / 8, lane % 8), from + static_cast<u64>(LINES / 4 * 4) * n);
  const int i = lane - (32 - 4 * HALVES);  // lanes that had least to copy
  if (i >= 0) copy16(halves_to + i * 16, t.halves + static_cast<u64>(y / LINES * HALVES + i / 4) * n + row + i % 4 * 8);
}

// A unit of Q4_K times activations: acc has four rows of a quad, of token octet of each four. x: a thread's words of the block, of each four.
__device__ __forceinline__ void multiply4(float acc[TILES][4], u32 at, int quad, int octet, const float scale[TILES], const u32 x[TILES]) {
  const int chunk = chunk_of(quad);
  const uint4 s0 = lds4(line_at(at, 32, chunk)), s1 = lds4(line_at(at, 33, chunk)), s2 = lds4(line_at(at, 34, chunk));
  const uint2 d = lds2(at + 35 * 128 + chunk * 8), dm = lds2(at + 35 * 128 + 64 + chunk * 8);
  const u32 even = line_at(at, octet, chunk), odd = even ^ 64;  // lines octet of groups
  const u32 sa[4] = {s0.x, s0.y, s0.z, s0.w}, sb[4] = {s1.x, s1.y, s1.z, s1.w}, sc[4] = {s2.x, s2.y, s2.z, s2.w};
  u32 by[4][2];
#pragma unroll
  for (int r = 0; r < 4; ++r) by[r][0] = sa[r] & 0x3F3F3F3F, by[r][1] = (sc[r] & 0x0F0F0F0F) | ((sa[r] >> 2) & 0x30303030);
  int sums[TILES][4][2] = {};
#pragma unroll
  for (int g = 0; g < 8; ++g) {
    const uint4 q = lds4((g % 2 ? odd : even) + g * 512);
    const u32 qs[4] = {q.x, q.y, q.z, q.w};
    uint2 b[TILES];
#pragma unroll
    for (int t = 0; t < TILES; ++t) b[t] = lds2(x[t] + g * 64);
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      const int k0 = byte_of(by[2 * pair][g / 4], g % 4), k1 = byte_of(by[2 * pair + 1][g / 4], g % 4);
#pragma unroll
      for (int t = 0; t < TILES; ++t) {
        int c[4];
        product<false>(c, qs[2 * pair] & 0x0F0F0F0F, qs[2 * pair + 1] & 0x0F0F0F0F, (qs[2 * pair] >> 4) & 0x0F0F0F0F, (qs[2 * pair + 1] >> 4) & 0x0F0F0F0F, b[t].x, b[t].y);
        sums[t][2 * pair][0] += k0 * c[0], sums[t][2 * pair][1] += k0 * c[1];
        sums[t][2 * pair + 1][0] += k1 * c[2], sums[t][2 * pair + 1][1] += k1 * c[3];
      }
    }
  }
  uint2 b[TILES];
#pragma unroll
  for (int t = 0; t < TILES; ++t) b[t] = lds2(x[t] + 512);
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
    u32 a[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int r = 2 * pair + j;
      const u32 lo = sb[r] & 0x3F3F3F3F, hi = ((sc[r] >> 4) & 0x0F0F0F0F) | ((sb[r] >> 2) & 0x30303030);
      a[j] = __byte_perm(lo, hi, octet * 0x2222 + 0x1100);
    }
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
      int c[4], e[4];
      small_product(c, a[0], a[1], b[t].x);
      small_product(e, a[0], a[1], b[t].y);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int r = 2 * pair + j;
        const float value = fmaf(static_cast<float>(sums[t][r][0]), 256.0f, static_cast<float>(sums[t][r][1]));
        const float less = static_cast<float>(c[2 * j] + (c[2 * j + 1] << 8) + (e[2 * j] << 16));
        acc[t][r] = fmaf(value, half_float(r < 2 ? d.x : d.y, r % 2) * scale[t], acc[t][r]);
        acc[t][r] = fmaf(less, -(half_float(r < 2 ? dm.x : dm.y, r % 2) * scale[t]), acc[t][r]);
      }
    }
  }
}

// The same of Q6_K: quants as signed bytes, four times too large; two scales a group, whose halves are octets 0, 1 and 2, 3.
__device__ __forceinline__ void multiply6(float acc[TILES][4], u32 at, u32 halves_at, int quad, int octet, const float scale[TILES], const u32 x[TILES]) {
  const int chunk = chunk_of(quad);
  const uint2 d = lds2(halves_at + chunk * 8);
  const u32 even = line_at(at, octet, chunk), odd = even ^ 64, more_even = line_at(at, 32 + octet / 2, chunk);
  int sums[TILES][4][2] = {};
#pragma unroll
  for (int pairs = 0; pairs < 4; ++pairs) {  // of groups, whose four scales are a word
    const uint4 s = lds4(line_at(at, 48 + pairs, chunk));
    const u32 by[4] = {s.x, s.y, s.z, s.w};
#pragma unroll
    for (int of = 0; of < 2; ++of) {
      const int g = 2 * pairs + of;
      const uint4 q = lds4((g % 2 ? odd : even) + g * 512);
      const uint4 h = lds4((more_even + g * 256) ^ (g % 4 * 32));
      const u32 qs[4] = {q.x, q.y, q.z, q.w}, hs[4] = {h.x, h.y, h.z, h.w};
      u32 low[4], high[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        low[r] = (((qs[r] << 2) & 0x3C3C3C3C) ^ 0x80808080) ^ ((hs[r] << (6 - 4 * (octet % 2))) & 0xC0C0C0C0);
        high[r] = (((qs[r] >> 2) & 0x3C3C3C3C) ^ 0x80808080) ^ ((hs[r] << (4 - 4 * (octet % 2))) & 0xC0C0C0C0);
      }
#pragma unroll
      for (int t = 0; t < TILES; ++t) {
        const uint2 b = lds2(x[t] + g * 64);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const bool mine = octet / 2 == half;
          const u32 b0 = mine ? b.x : 0, b1 = mine ? b.y : 0;
#pragma unroll
          for (int pair = 0; pair < 2; ++pair) {
            int c[4];
            product<true>(c, low[2 * pair], low[2 * pair + 1], high[2 * pair], high[2 * pair + 1], b0, b1);
            const int k0 = signed_byte_of(by[2 * pair], 2 * of + half), k1 = signed_byte_of(by[2 * pair + 1], 2 * of + half);
            sums[t][2 * pair][0] += k0 * c[0], sums[t][2 * pair][1] += k0 * c[1];
            sums[t][2 * pair + 1][0] += k1 * c[2], sums[t][2 * pair + 1][1] += k1 * c[3];
          }
        }
      }
    }
  }
#pragma unroll
  for (int t = 0; t < TILES; ++t)
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const float value = fmaf(static_cast<float>(sums[t][r][0]), 256.0f, static_cast<float>(sums[t][r][1]));
      acc[t][r] = fmaf(value, half_float(r < 2 ? d.x : d.y, r % 2) * (scale[t] * 0.25f), acc[t][r]);
    }
}

__device__ __forceinline__ float gelu_tanh(float x) { const float u = 0.7978845608028654f * (x + 0.044715f * x * x * x); return x * (1.0f - 1.0f / (expf(2.0f * u) + 1.0f)); }
__device__ __forceinline__ float largest_size(float a, float b) {  // as integers, the bits of NaN are above those of any number
  return __int_as_float(max(__float_as_int(a) & 0x7FFFFFFF, __float_as_int(b) & 0x7FFFFFFF));
}

// A warp puts 256 values, eight a lane, into fixed point: its words of bytes, its word of sums (of the first 16 lanes) and the scale.
struct Fixed { u32 bytes[4], sums; float scale; };
__device__ Fixed quantize(const float v[8], int lane) {
  Fixed f;
  float high = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) high = largest_size(high, v[i]);
#pragma unroll
  for (int d = 16; d; d /= 2) high = largest_size(high, __shfl_xor_sync(~0u, high, d));
  const float inverse = high > 0 ? LARGEST / high : 0.0f;
  f.scale = high * (1.0f / LARGEST) + high * 0.0f;  // NaN, too, of Inf
  int sum = 0;
  f.bytes[0] = f.bytes[1] = f.bytes[2] = f.bytes[3] = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int q = static_cast<int>(floorf(v[i] * inverse + 0.5f)), h = (q + 128) >> 8;
    f.bytes[i / 4] |= static_cast<u32>(h & 255) << (8 * (i % 4)), f.bytes[2 + i / 4] |= static_cast<u32>((q - h * 256) & 255) << (8 * (i % 4));
    sum += q;
  }
  sum += __shfl_xor_sync(~0u, sum, 1);
  // Lane 4 q + 2 (p % 2) + p / 2 makes the word of bytes p of the sums over elements 64 q + 16 b.
  const int at = lane & 15, q = at / 4, p = at / 2 % 2 + at % 2 * 2;
  f.sums = 0;
#pragma unroll
  for (int b = 0; b < 4; ++b) {
    int s = __shfl_sync(~0u, sum, 8 * q + 2 * b), byte = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) { const int low = static_cast<signed char>(s & 255); if (i == p) byte = low; s = (s - low) >> 8; }
    f.sums |= static_cast<u32>(byte & 255) << (8 * b);
  }
  return f;
}

__device__ __forceinline__ void wait_for(const u32* flag, u32 target) {
  u32 v;
  do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(flag) : "memory"); while (v < target);
}

// Where activations go.
struct Job {
  u32* rows;      // M rows in fixed point, for more tokens than one: [2][M][k / 256][XW] with scales behind them
  u32* x;         // shared: [M][SLICE][XW]
  float* scales;  // shared: [M][SLICE]
  float* edges;   // shared: [WARPS][2][M][ROWS]
};

BOTH int part_floats(Matmul m) { return m.slices * parts_of(m) * M * m.n; }
BOTH int most_parts() { int found = 0; for (int i = 0; i + 1 < COUNT; ++i) found = most(found, part_floats(MATMULS[i])); return found; }
constexpr int PARTS = most_parts();
BOTH int row_words() { int found = 0; for (Matmul m : MATMULS) found = most(found, m.k / WIDE); return found * (XW + 1); }

// Eight neighbouring elements of a result: its parts in the order of K, read at once.
template <int I> struct Parts {
  static constexpr Matmul m = MATMULS[I];
  static constexpr int P = parts_of(m);
  float4 values[m.slices * P][2];
  bool more[P];
  __device__ __forceinline__ void load(const float* parts, int token, int element) {
    constexpr u32 BS = blocks_of(m), TOTAL = units_of(m), EACH = per_slice(m);
    const u32 rb = element / ROWS, first = ((rb * BS + 1) * EACH - 1) / TOTAL, last = ((rb * BS + BS) * EACH - 1) / TOTAL;
#pragma unroll
    for (int p = 0; p < P; ++p) {
      more[p] = p <= static_cast<int>(last - first);
#pragma unroll
      for (int s = 0; s < m.slices; ++s) {
        const float* from = parts + (static_cast<u64>(s * P + p) * M + token) * m.n + element;
        float4* to = values[s * P + p];
        to[0] = to[1] = make_float4(0, 0, 0, 0);
        if (more[p]) to[0] = ldcg4(from), to[1] = ldcg4(from + 4);
      }
    }
  }
  __device__ __forceinline__ void add(float v[8]) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = 0;
#pragma unroll
    for (int s = 0; s < m.slices; ++s)
#pragma unroll
      for (int p = 0; p < P; ++p) {
        if (!more[p]) continue;
        const float4 a = values[s * P + p][0], b = values[s * P + p][1];
        v[0] += a.x, v[1] += a.y, v[2] += a.z, v[3] += a.w, v[4] += b.x, v[5] += b.y, v[6] += b.z, v[7] += b.w;
      }
  }
};

__device__ __forceinline__ void load8(float v[8], const float* from) {
  const float4 a = ldcg4(from), b = ldcg4(from + 4);
  v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}
__device__ __forceinline__ void load_constant8(float v[8], const float* from) {
  const float4 a = __ldg(reinterpret_cast<const float4*>(from)), b = __ldg(reinterpret_cast<const float4*>(from + 4));
  v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}

// The sum over all threads, the same bits in each, whatever runs beside; `room` holds a float a warp.
__device__ __forceinline__ float total_of(float v, volatile float* room, int warp, int lane) {
#pragma unroll
  for (int d = 16; d; d /= 2) v += __shfl_xor_sync(~0u, v, d);
  if (lane == 0) room[warp] = v;
  __syncthreads();
  float sum = 0;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) sum += room[w];
  __syncthreads();
  return sum;
}

struct Norm { const float *post, *scale, *weight; };

// Where a block of activations goes: to shared memory, or to global memory for all.
__device__ __forceinline__ void put(const Job& job, const Fixed& f, int token, int block, int first, int count, bool everywhere, u32* rows, int blocks, int lane, float factor) {
  if (everywhere) {
    u32* to = rows + (token * blocks + block) * XW;
    stcg4(to + lane * 4, f.bytes[0], f.bytes[1], f.bytes[2], f.bytes[3]);
    if (lane < 16) asm volatile("st.global.cg.b32 [%0], %1;" ::"l"(to + 128 + lane), "r"(f.sums) : "memory");
    if (lane == 0) stcg(reinterpret_cast<float*>(rows + M * blocks * XW) + token * blocks + block, f.scale * factor);
  } else if (block >= first && block < first + count) {
    u32* to = job.x + (token * SLICE + block - first) * XW;
    *reinterpret_cast<uint4*>(to + lane * 4) = make_uint4(f.bytes[0], f.bytes[1], f.bytes[2], f.bytes[3]);
    if (lane < 16) to[128 + lane] = f.sums;
    if (lane == 0) job.scales[token * SLICE + block - first] = f.scale * factor;
  }
}

// What stands between two matmuls as one token's row: the norm of a result, the residual stream, the next norm.
template <int I> struct Row {
  static constexpr int D = WIDTH, EACH = (D / WIDE + WARPS - 1) / WARPS;
  float h[EACH][8], post[EACH][8], weight[EACH][8], factor;
  // What no other block makes in this launch, or made long ago.
  __device__ __forceinline__ void load(const Norm& w, const float* stream, int warp, int lane) {
    factor = w.scale ? __ldg(w.scale) : 1.0f;
#pragma unroll
    for (int e = 0; e < EACH; ++e) {
      const int block = warp + e * WARPS, at = block * WIDE + lane * 8;
      if (block >= D / WIDE) continue;
      load8(h[e], stream + at), load_constant8(post[e], w.post + at), load_constant8(weight[e], w.weight + at);
    }
  }
  __device__ __forceinline__ void make(const Job& job, const float* parts, int token, int first, int count, bool everywhere, float* stream_out, volatile float* room, int warp, int lane) {
    float y[EACH][8], sum = 0;
    constexpr int AT_ONCE = M > 1 || MATMULS[I - 1].slices * parts_of(MATMULS[I - 1]) > 4 ? 1 : 2;
#pragma unroll
    for (int e = 0; e < EACH; e += AT_ONCE) {
      Parts<I - 1> found[AT_ONCE];
#pragma unroll
      for (int f = 0; f < AT_ONCE; ++f)
        if (e + f < EACH && warp + (e + f) * WARPS < D / WIDE) found[f].load(parts, token, (warp + (e + f) * WARPS) * WIDE + lane * 8);
#pragma unroll
      for (int f = 0; f < AT_ONCE; ++f) {
        if (e + f >= EACH || warp + (e + f) * WARPS >= D / WIDE) continue;
        found[f].add(y[e + f]);
#pragma unroll
        for (int i = 0; i < 8; ++i) sum += y[e + f][i] * y[e + f][i];
      }
    }
    const float root = rsqrtf(total_of(sum, room, warp, lane) / D + EPS);
    sum = 0;
#pragma unroll
    for (int e = 0; e < EACH; ++e) {
      const int block = warp + e * WARPS, at = block * WIDE + lane * 8;
      if (block >= D / WIDE) continue;
#pragma unroll
      for (int i = 0; i < 8; ++i) h[e][i] = (h[e][i] + y[e][i] * root * post[e][i]) * factor, sum += h[e][i] * h[e][i];
      if (stream_out) stcg4(stream_out + at, h[e]), stcg4(stream_out + at + 4, h[e] + 4);
    }
    const float next = rsqrtf(total_of(sum, room, warp, lane) / D + EPS);
#pragma unroll
    for (int e = 0; e < EACH; ++e) {
      const int block = warp + e * WARPS;
      if (block >= D / WIDE) continue;
#pragma unroll
      for (int i = 0; i < 8; ++i) h[e][i] *= weight[e][i];
      put(job, quantize(h[e], lane), token, block, first, count, everywhere, job.rows + I % 2 * (M * row_words()), D / WIDE, lane, next);
    }
  }
};

// Gates and values of the result before, as many blocks of a token as a warp takes.
template <int I> __device__ __forceinline__ void gated(const Job& job, const float* parts, int token, int block, int first, int count, bool everywhere, int lane) {
  constexpr Matmul m = MATMULS[I];
  Parts<I - 1> gates, values;
  gates.load(parts, token, block * WIDE + lane * 8), values.load(parts, token, m.k + block * WIDE + lane * 8);
  float gate[8], value[8];
  gates.add(gate), values.add(value);
#pragma unroll
  for (int e = 0; e < 8; ++e) value[e] *= gelu_tanh(gate[e]);
  put(job, quantize(value, lane), token, block, first, count, everywhere, job.rows + I % 2 * (M * row_words()), m.k / WIDE, lane, 1.0f);
}

// COUNT groups of 16 bytes from global to shared memory, eight a thread on their way at once. from(i) and to(i): where group i lies.
template <int COUNT_, typename From, typename To> __device__ __forceinline__ void copy_groups(From from, To to) {
  constexpr int EACH = (COUNT_ + THREADS - 1) / THREADS, AT_ONCE = EACH < 8 ? EACH : 8;
#pragma unroll 1
  for (int begin = 0; begin < EACH; begin += AT_ONCE) {
    uint4 v[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const int at = (begin + i) * THREADS + static_cast<int>(threadIdx.x);
      if (at < COUNT_) v[i] = ldcg4(from(at));
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const int at = (begin + i) * THREADS + static_cast<int>(threadIdx.x);
      if (at < COUNT_) *reinterpret_cast<uint4*>(to(at)) = v[i];
    }
  }
}

// The weights of a warp on their way: its units, one matmul after another.
struct Ring {
  const Table* tables;
  Table table;  // of this matmul
  u32 n;
  u32 at, apart;  // in shared memory
  u32 worker;
  int lane, matmul, stage;
  u32 left, run, x, y, y_first, bs, lines;  // units of this matmul, of them in this row; where the next is: row, line of words
  bool four;
  int next;  // slot of the unit that arrives next

  __device__ __forceinline__ u32 apart_of(u32 slot) const { return apart + (slot - at) / SLOT * 128; }
  __device__ __forceinline__ void settle() {  // at the first unit of the next matmul that has one
    while (!left && ++matmul < COUNT) {
      const Matmul& m = MATMULS[matmul];
      u32 slice, first, end;
      share(m, worker, slice, first, end);
      bs = blocks_of(m), four = has(4) && (!has(6) || m.bits == 4), lines = four ? words_of(4) : words_of(6);
      table = tables[matmul], n = m.n;
      left = end - first, x = first / bs, run = bs - (first - x * bs);
      y_first = slice * bs * lines, y = y_first + (bs - run) * lines, x *= ROWS;
    }
  }
  __device__ __forceinline__ void fetch() {
    if (left) {
      const u32 to = at + stage * SLOT;
      if (four) copy_unit<4>(to, to + 35 * 128, table, n, y, x, lane);
      else copy_unit<6>(to, apart_of(to), table, n, y, x, lane);
      stage = stage + 1 == STAGES ? 0 : stage + 1;
      y += lines;
      if (--run == 0) run = bs, y = y_first, x += ROWS;
      if (--left == 0) settle();
    }
    commit();
  }
  // The oldest unit, when it is there; until `fetch`.
  __device__ __forceinline__ u32 arrive() {
    const u32 found = at + next * SLOT;
    arrived<STAGES - 1>();
    __syncwarp();
    next = next + 1 == STAGES ? 0 : next + 1;
    return found;
  }
};

struct Arguments {
  const u32* given;
  const float* stream;
  float *between, *stream_out;
  Norm norms[2];
  float *parts, *out;
  u32* flags;
};

__device__ __forceinline__ void signal(u32* flag) { asm volatile("fence.acq_rel.gpu; red.release.gpu.global.add.u32 [%0], 1;" ::"l"(flag) : "memory"); }

struct Clock { long long then, laps[8]; };
#ifdef CLOCKS
#define LAP(i) { const long long now_ = clock64(); clock.laps[i] += now_ - clock.then; clock.then = now_; }
#else
#define LAP(i)
#endif

template <int I> __device__ __forceinline__ void matmul(const Job& job, const Arguments& a, Ring& ring, volatile float* room, int warp, Clock& clock) {
  constexpr Matmul m = MATMULS[I];
  constexpr int N = m.n, BS = blocks_of(m), ALL = m.k / WIDE, P = parts_of(m);
  constexpr u32 TOTAL = units_of(m), EACH = per_slice(m), WORKERS = EACH * WARPS;
  static_assert(static_cast<u64>(TOTAL + 1) * WORKERS >> 32 == 0, "products of units and warps");
  constexpr bool TOGETHER = M == 1;  // every block makes what it needs; else one makes a token's or a block's, for all
  const int lane = ring.lane, octet = lane % 4, quad = lane / 4, block = blockIdx.x, slice = block / EACH, of_slice = block - slice * EACH;
  const bool idle = slice >= m.slices;

  // 1. activations
  const int first_block = idle ? 0 : slice * BS, count = idle ? 0 : BS;
  if constexpr (m.input == GIVEN) {
    if (!idle)
      copy_groups<M * BS * 36>([&](int i) { const int t = i / (BS * 36), b = i / 36 % BS, w = i % 36; return a.given + (t * ALL + first_block + b) * GIVEN_WORDS + (w < 32 ? w * 4 : 160 + (w - 32) * 4); },
                               [&](int i) { const int t = i / (BS * 36), b = i / 36 % BS, w = i % 36; return job.x + (t * SLICE + b) * XW + w * 4; });
    for (int i = threadIdx.x; !idle && i < M * BS; i += THREADS) job.scales[i / BS * SLICE + i % BS] = __uint_as_float(ldcg(a.given + (i / BS * ALL + first_block + i % BS) * GIVEN_WORDS + 128));
  } else {
    const float* parts = a.parts + (I - 1) % 2 * PARTS;
    u32* flag = a.flags + 64 * (I - 1);
    if constexpr (m.input == NORM) {
      constexpr bool SECOND = I > 1;
      const bool mine = TOGETHER || block < M;
      const int token = TOGETHER ? 0 : block;
      Row<I> row;
      if (mine) row.load(a.norms[SECOND], (SECOND ? a.between : a.stream) + token * WIDTH, warp, lane);
      if (threadIdx.x == 0) wait_for(flag, BLOCKS);
      __syncthreads();
      LAP(0)
      float* to = (SECOND ? a.stream_out : a.between) + token * WIDTH;
      if (mine) row.make(job, parts, token, first_block, count, !TOGETHER, !TOGETHER || block == 0 ? to : nullptr, room, warp, lane);
    } else {
      if (threadIdx.x == 0) wait_for(flag, BLOCKS);
      __syncthreads();
      LAP(0)
      if constexpr (TOGETHER) {
#pragma unroll
        for (int j = 0; j < (BS + WARPS - 1) / WARPS; ++j)
          if (warp + j * WARPS < count) gated<I>(job, parts, 0, first_block + warp + j * WARPS, first_block, count, false, lane);
      } else {
        for (int j = ring.worker; j < M * ALL; j += BLOCKS * WARPS) gated<I>(job, parts, j / ALL, j % ALL, 0, 0, true, lane);
      }
    }
    if constexpr (!TOGETHER) {
      __syncthreads();
      if (threadIdx.x == 0) {
        if (m.input != NORM || block < M) signal(flag + 32);
        wait_for(flag + 32, m.input == NORM ? M : BLOCKS);
      }
      __syncthreads();
      const u32* rows = job.rows + I % 2 * (M * row_words());
      if (!idle) copy_groups<M * BS * 36>([&](int i) { return rows + (i / (BS * 36) * ALL + first_block) * XW + i % (BS * 36) * 4; },
                                          [&](int i) { return job.x + i / (BS * 36) * (SLICE * XW) + i % (BS * 36) * 4; });
      for (int i = threadIdx.x; !idle && i < M * BS; i += THREADS) job.scales[i / BS * SLICE + i % BS] = __uint_as_float(ldcg(rows + M * ALL * XW + i / BS * ALL + first_block + i % BS));
    }
  }
  __syncthreads();
  LAP(1)

  // 2. the warp's units
  u32 slice_, first_, end_;
  share(m, ring.worker, slice_, first_, end_);
  const int first = first_, end = end_;
  float* results = I + 1 < COUNT ? a.parts + I % 2 * PARTS : a.out;
  u32 x_at[TILES];
  int scale_at[TILES];
#pragma unroll
  for (int t = 0; t < TILES; ++t) {
    x_at[t] = shared_address(job.x) + (min(4 * t + quad / 2, M - 1) * SLICE * XW + octet * 4 + quad % 2 * 2) * 4;
    scale_at[t] = min(4 * t + octet, M - 1) * SLICE;
  }
  float acc[TILES][4] = {};
  int row = first / BS, k = first - row * BS, begun = first;
  for (int unit = first; unit < end; ++unit) {
    const u32 at = ring.arrive();
    LAP(2)
    float scale[TILES];
    u32 x[TILES];
#pragma unroll
    for (int t = 0; t < TILES; ++t) scale[t] = job.scales[scale_at[t] + k], x[t] = x_at[t] + k * (XW * 4);
    if constexpr (m.bits == 4) multiply4(acc, at, quad, octet, scale, x);
    else multiply6(acc, at, ring.apart_of(at), quad, octet, scale, x);
    __syncwarp();
    LAP(3)
    ring.fetch();
    LAP(4)
    if (++k < BS && unit + 1 < end) continue;
    const bool whole = k == BS && unit + 1 - begun == BS;
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
      const int token = 4 * t + octet;
      if (token < M) {
        float* to = whole ? results + (static_cast<u64>(slice * P) * M + token) * N + row * ROWS + chunk_of(quad) * 4 : job.edges + ((warp * 2 + (begun != first)) * M + token) * ROWS + chunk_of(quad) * 4;
        *reinterpret_cast<float4*>(to) = make_float4(acc[t][0], acc[t][1], acc[t][2], acc[t][3]);
      }
      acc[t][0] = acc[t][1] = acc[t][2] = acc[t][3] = 0;
    }
    if (k == BS) k = 0, ++row;
    begun = unit + 1;
  }
  LAP(5)
  __syncthreads();
  LAP(6)

  // 3. blocks of rows that several warps share: the parts of a block of rows and a token are added up by one warp
  if (!idle) {
    const u32 from = of_slice * TOTAL / EACH, to = (of_slice + 1) * TOTAL / EACH;
    const u32 begin_row = from / BS, end_row = (to - 1) / BS;
    for (u32 j = warp; j < (end_row + 1 - begin_row) * M; j += WARPS) {
      const u32 rb = begin_row + j / M, t = j % M;
      const u32 low = max(from, rb * BS), high = min(to, rb * BS + BS) - 1;
      const u32 w0 = ((low + 1) * WORKERS - 1) / TOTAL, w1 = ((high + 1) * WORKERS - 1) / TOTAL;
      if (w0 == w1 && high - low + 1 == BS) continue;  // whole
      const u32 starts = w0 * TOTAL / WORKERS, part = of_slice - ((rb * BS + 1) * EACH - 1) / TOTAL;
      const float* edge = job.edges + (((w0 - of_slice * WARPS) * 2) * M + t) * ROWS + lane;
      float sum = edge[starts < rb * BS ? M * ROWS : 0];
      for (u32 w = 1; w <= w1 - w0; ++w) sum += edge[w * (2 * M * ROWS)];
      stcg(results + (static_cast<u64>(slice * P + part) * M + t) * N + rb * ROWS + lane, sum);
    }
  }
  if constexpr (I + 1 < COUNT) {
    __syncthreads();
    LAP(7)
    if (threadIdx.x == 0) signal(a.flags + 64 * I);
    matmul<I + 1>(job, a, ring, room, warp, clock);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) kiln_chain(const u32* given, const float* stream, float* between, float* stream_out, const float* post0, const float* scale0, const float* weight0, const float* post1, const float* scale1, const float* weight1,
    const u32* words0, const u16* halves0, const u32* words1, const u16* halves1, const u32* words2, const u16* halves2, const u32* words3, const u16* halves3,
    float* parts, u32* rows, u32* flags, float* out, u64* clocks) {
  extern __shared__ __align__(1024) char memory[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const u32 base = shared_address(memory), ring_at = base + warp * (STAGES * SLOT);
  float* room = reinterpret_cast<float*>(memory + ROOM_AT);
#if EARLY
  asm volatile("griddepcontrol.launch_dependents;");
#endif
  const Table tables[4] = {{words0, halves0}, {words1, halves1}, {words2, halves2}, {words3, halves3}};
  const Job job{rows, reinterpret_cast<u32*>(memory + X_AT), reinterpret_cast<float*>(memory + SCALES_AT), reinterpret_cast<float*>(memory + EDGES_AT)};
  Ring ring{tables, {}, 0, ring_at, base + APART_AT + warp * (STAGES * 128), blockIdx.x * WARPS + warp, lane, -1, 0, 0, 0, 0, 0, 0, 0, 0, false, 0};
  ring.settle();
#pragma unroll 1
  for (int i = 0; i < STAGES; ++i) ring.fetch();
#if EARLY
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  const Arguments a{given, stream, between, stream_out, {{post0, scale0, weight0}, {post1, scale1, weight1}}, parts, out, flags};
  Clock clock{};
#ifdef CLOCKS
  clock.then = clock64();
#endif
  matmul<0>(job, a, ring, room, warp, clock);
#ifdef CLOCKS
  LAP(7)
  if (lane == 0) for (int i = 0; i < 8; ++i) atomicAdd(clocks + i, static_cast<u64>(clock.laps[i]));
#endif
  if (threadIdx.x == 0) {  // the last block to come here leaves the flags as they were
    u32 before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(flags + 64 * COUNT) : "memory");
    if (before + 1 == BLOCKS)
      for (int i = 0; i <= 2 * COUNT; ++i) asm volatile("st.global.cg.b32 [%0], %1;" ::"l"(flags + 32 * i), "r"(0) : "memory");
  }
}
