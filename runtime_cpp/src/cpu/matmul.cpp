// float32 matrix products, as BLIS makes them: tiles of c in registers, a slice of K at a time, both operands packed into the order in which
// the tiles read them. Every element of c is, for each slice, one chain of fused multiply-adds over k, added to c.
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <memory>
#include <string_view>
#include <utility>

#include "cpu/ops.h"
#include "cpu/packed.h"
#include "cpu/parallel.h"

namespace kiln {

namespace {

constexpr int64_t kSlice = 512;    // of K: a panel of a stays in the L1 cache
constexpr int64_t kColumns = 256;  // of b packed at once: with kSlice rows, half a megabyte of the L2 cache
constexpr int64_t kSerial = 1 << 18;  // multiply-adds below which one thread is faster than several
constexpr int kMaxRows = 14;
constexpr int64_t kAheadRows = 6;  // of b, prefetched

// c [M, 16 V] (or 8 V) = or += a x b over k elements. a is packed, [k][M]; rows of b are b_row apart.
using Tile = void (*)(int64_t k, const float* a, const float* b, int64_t b_row, float* c, int64_t c_row, bool add);

template <int M, int V>
__attribute__((target("avx512f"))) void tile_avx512(int64_t k, const float* a, const float* b, int64_t b_row, float* c, int64_t c_row, bool add) {
  __m512 sum[M][V];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < V; ++j) sum[i][j] = _mm512_setzero_ps();
  for (; k > 0; --k, a += M, b += b_row) {
    __m512 row[V];
#pragma GCC unroll 16
    for (int j = 0; j < V; ++j) row[j] = _mm512_loadu_ps(b + 16 * j);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      __m512 x = _mm512_set1_ps(a[i]);
#pragma GCC unroll 16
      for (int j = 0; j < V; ++j) sum[i][j] = _mm512_fmadd_ps(x, row[j], sum[i][j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < V; ++j) {
      float* to = c + i * c_row + 16 * j;
      _mm512_storeu_ps(to, add ? _mm512_add_ps(_mm512_loadu_ps(to), sum[i][j]) : sum[i][j]);
    }
}

template <int M, int V>
__attribute__((target("avx2,fma"))) void tile_avx2(int64_t k, const float* a, const float* b, int64_t b_row, float* c, int64_t c_row, bool add) {
  __m256 sum[M][V];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < V; ++j) sum[i][j] = _mm256_setzero_ps();
  for (; k > 0; --k, a += M, b += b_row) {
    __m256 row[V];
#pragma GCC unroll 16
    for (int j = 0; j < V; ++j) row[j] = _mm256_loadu_ps(b + 8 * j);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      __m256 x = _mm256_set1_ps(a[i]);
#pragma GCC unroll 16
      for (int j = 0; j < V; ++j) sum[i][j] = _mm256_fmadd_ps(x, row[j], sum[i][j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < V; ++j) {
      float* to = c + i * c_row + 8 * j;
      _mm256_storeu_ps(to, add ? _mm256_add_ps(_mm256_loadu_ps(to), sum[i][j]) : sum[i][j]);
    }
}

struct Kernels {
  const char* name;
  int rows, columns;                  // of a tile
  std::array<Tile, kMaxRows> tiles;   // with 1 .. rows rows, for packed b
  int direct_rows;                    // where a has no more rows than these, rows of b are read where they lie, in wider tiles
  std::array<Tile, 4> direct;
  std::array<int, 4> direct_columns;
};

template <size_t... I>
constexpr std::array<Tile, kMaxRows> tiles_avx512(std::index_sequence<I...>) {
  return {tile_avx512<I + 1, 2>...};
}
template <size_t... I>
constexpr std::array<Tile, kMaxRows> tiles_avx2(std::index_sequence<I...>) {
  return {tile_avx2<I + 1, 2>...};
}
const Kernels kAvx512 = {"avx512", 14, 32, tiles_avx512(std::make_index_sequence<14>()), 4,
                         {tile_avx512<1, 16>, tile_avx512<2, 8>, tile_avx512<3, 4>, tile_avx512<4, 4>}, {256, 128, 64, 64}};
const Kernels kAvx2 = {"avx2", 6, 16, tiles_avx2(std::make_index_sequence<6>()), 2, {tile_avx2<1, 8>, tile_avx2<2, 4>}, {64, 32}};

const Kernels* kernels_named(std::string_view name) {
  if (name == kAvx512.name && __builtin_cpu_supports("avx512f")) return &kAvx512;
  if (name == kAvx2.name && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &kAvx2;
  return nullptr;
}
std::atomic<const Kernels*> chosen{nullptr};
const Kernels& kernels() {
  const Kernels* k = chosen;
  if (!k) {
    k = kernels_named("avx512");
    if (!k) k = &kAvx2;  // the runner has refused older CPUs
    chosen = k;
  }
  return *k;
}

// Memory for packed operands that a thread keeps: fresh pages at every call would cost more than the packing.
float* scratch(int which, int64_t floats) {
  struct Free {
    void operator()(float* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  thread_local struct {
    std::unique_ptr<float, Free> memory;
    int64_t floats = 0;
  } kept[2];
  auto& s = kept[which];
  if (s.floats < floats) {
    s.memory.reset();
    s.floats = 0;
    s.memory.reset(static_cast<float*>(::operator new(static_cast<size_t>(floats) * sizeof(float), std::align_val_t(64))));
    s.floats = floats;
  }
  return s.memory.get();
}

// N floats at `from` to `to`, in vectors.
template <int N>
inline void copy(float* to, const float* from) {
#pragma GCC unroll 16
  for (int i = 0; i < N; i += 4) _mm_storeu_ps(to + i, _mm_loadu_ps(from + i));
}

// to[i * lanes + l] = from[l * lane + i * step] for l < used and i < length; 0 for the other lanes.
void pack(float* to, int64_t lanes, const float* from, int64_t lane, int64_t step, int64_t used, int64_t length) {
  constexpr int64_t kAhead = 16;  // of length at a time: a cache line of every lane
  for (int64_t start = 0; start < length; start += kAhead) {
    const int64_t end = std::min(length, start + kAhead);
    int64_t l = 0;
    if (step == 1)
      for (; l + 4 <= used; l += 4) {
        const float* f = from + l * lane;
        int64_t i = start;
        for (; i + 4 <= end; i += 4) {
          __m128 r0 = _mm_loadu_ps(f + i), r1 = _mm_loadu_ps(f + lane + i), r2 = _mm_loadu_ps(f + 2 * lane + i), r3 = _mm_loadu_ps(f + 3 * lane + i);
          _MM_TRANSPOSE4_PS(r0, r1, r2, r3);
          float* t = to + i * lanes + l;
          _mm_storeu_ps(t, r0), _mm_storeu_ps(t + lanes, r1), _mm_storeu_ps(t + 2 * lanes, r2), _mm_storeu_ps(t + 3 * lanes, r3);
        }
        for (; i < end; ++i)
          for (int64_t j = 0; j < 4; ++j) to[i * lanes + l + j] = f[j * lane + i];
      }
    for (int64_t i = start; i < end; ++i)
      for (int64_t j = l; j < lanes; ++j) to[i * lanes + j] = j < used ? from[j * lane + i * step] : 0;
  }
}

// Columns of b in panels of `width`, one behind the other.
void pack_columns(float* to, int64_t width, const float* from, int64_t column, int64_t row, int64_t columns, int64_t length) {
  int64_t full = 0;
  if (column == 1) {  // whole rows of b, not of a panel: memory is read in longer runs
    full = columns / width;
    for (int64_t i = 0; i < length; ++i)
      for (int64_t p = 0; p < full; ++p) {
        // A row of b is a page or more after the one before it: the hardware does not guess it.
        const char* soon = reinterpret_cast<const char*>(from + (i + kAheadRows) * row + p * width);
        __builtin_prefetch(soon), __builtin_prefetch(soon + 64);
        float* t = to + (p * length + i) * width;
        const float* f = from + i * row + p * width;
        width == 32 ? copy<32>(t, f) : copy<16>(t, f);
      }
  }
  for (int64_t j = full * width; j < columns; j += width)
    pack(to + j * length, width, from + j * column, column, row, std::min(width, columns - j), length);
}

// The right operand: float32 in memory, or packed weights.
struct Right {
  MatrixView dense;
  const PackedMatrix* packed = nullptr;
};

// One slice of K of a product; a is packed, panels of `rows` rows and then one of the rest.
struct Slice {
  const Kernels& kernels;
  const float* packed_a;
  const Right& b;
  float* c;
  int64_t c_row, m, from_k, k, n;

  // c[row_from .. row_to) x [from .. to). row_from is a multiple of the tiles' rows.
  void block(int64_t row_from, int64_t row_to, int64_t from, int64_t to) const {
    const bool few = m <= kernels.direct_rows, add = from_k > 0;
    const auto rows = static_cast<size_t>(m - 1);
    const int64_t width = few && b.packed ? kernels.direct_columns[rows] : kernels.columns;
    if (few && !b.packed && b.dense.column == 1) {
      const float* first = b.dense.data + from_k * b.dense.row;
      for (const int64_t step = kernels.direct_columns[rows]; from + step <= to; from += step)
        kernels.direct[rows](k, packed_a, first + from, b.dense.row, c + from, c_row, add);
      if (from == to) return;
    }
    float* packed_b = scratch(1, (to - from + width - 1) / width * width * k);
    if (b.packed)
      for (int64_t j = from; j < to; j += width)
        unpack(*b.packed, from_k, k, j, static_cast<int>(std::min(width, to - j)), packed_b + (j - from) * k, width);
    else
      pack_columns(packed_b, width, b.dense.data + from_k * b.dense.row + from * b.dense.column, b.dense.column, b.dense.row, to - from, k);
    for (int64_t i = row_from; i < row_to; i += kernels.rows) {
      const int64_t height = std::min<int64_t>(kernels.rows, m - i);
      const Tile tile = few && b.packed ? kernels.direct[rows] : kernels.tiles[static_cast<size_t>(height - 1)];
      for (int64_t j = from; j < to; j += width) {
        float* at = c + i * c_row + j;
        const float* panel = packed_b + (j - from) * k;
        if (j + width <= to) {
          tile(k, packed_a + i * k, panel, width, at, c_row, add);
          continue;
        }
        alignas(64) float edge[kMaxRows * 32];
        tile(k, packed_a + i * k, panel, width, edge, width, false);
        for (int64_t r = 0; r < height; ++r)
          for (int64_t x = 0; x < to - j; ++x) at[r * c_row + x] = add ? at[r * c_row + x] + edge[r * width + x] : edge[r * width + x];
      }
    }
  }
};

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

void product(float* c, int64_t c_row, const MatrixView& a, const Right& b, int64_t m, int64_t k, int64_t n, int threads) {
  const Kernels& kn = kernels();
  const int64_t panels = divide_up(m, kn.rows);
  // Blocks enough for all threads: narrower first, then rows apart as well, for which b is packed more than once.
  const int64_t unit = m <= kn.direct_rows ? kn.direct_columns[static_cast<size_t>(m - 1)] : kn.columns;
  int64_t columns = std::min(kColumns, divide_up(divide_up(n, threads), unit) * unit);
  if (threads > 1 && divide_up(n, columns) < 4 * threads) columns = std::max(unit, divide_up(divide_up(n, 4 * threads), unit) * unit);
  const int64_t across = divide_up(n, columns);
  const int64_t down = std::clamp<int64_t>(2 * threads / across, 1, divide_up(panels, 4));
  float* packed_a = scratch(0, m * std::min(k, kSlice));
  const int64_t tasks = across * down;
  std::atomic<int64_t> taken{0};  // of all slices' tasks, in order
  in_parallel(threads, [&](int64_t thread, int64_t count) {
    int64_t task = taken++;
    for (int64_t at = 0, first = 0; at < k; at += kSlice, first += tasks) {
      const int64_t length = std::min(kSlice, k - at);
      for (int64_t p = panels * thread / count; p < panels * (thread + 1) / count; ++p) {
        const int64_t i = p * kn.rows, height = std::min<int64_t>(kn.rows, m - i);
        pack(packed_a + i * length, height, a.data + i * a.row + at * a.column, a.row, a.column, height, length);
      }
      wait_for_team(static_cast<int>(count));
      Slice slice{kn, packed_a, b, c, c_row, m, at, length, n};
      for (; task < first + tasks; task = taken++) {
        const int64_t j = (task - first) / down * columns, d = (task - first) % down;
        slice.block(panels * d / down * kn.rows, std::min(m, panels * (d + 1) / down * kn.rows), j, std::min(n, j + columns));
      }
      wait_for_team(static_cast<int>(count));
    }
  });
}

}  // namespace

const char* matmul_kernels() { return kernels().name; }

bool set_matmul_kernels(const char* name) {
  const Kernels* k = kernels_named(name);
  if (k) chosen = k;
  return k;
}

void matmul(float* c, int64_t c_row, const MatrixView& a, const MatrixView& b, int64_t m, int64_t k, int64_t n) {
  batch_matmul(c, c_row, 0, a, 0, b, 0, 1, m, k, n);
}

void batch_matmul(float* c, int64_t c_row, int64_t c_batch, const MatrixView& a, int64_t a_batch, const MatrixView& b, int64_t b_batch, int64_t batch,
                  int64_t m, int64_t k, int64_t n) {
  if (batch == 0 || m == 0 || n == 0) return;
  auto one = [&](int64_t i, int threads) {
    float* to = c + i * c_batch;
    if (k == 0)
      for (int64_t r = 0; r < m; ++r) std::fill_n(to + r * c_row, n, 0.f);
    else
      product(to, c_row, {a.data + i * a_batch, a.row, a.column}, {{b.data + i * b_batch, b.row, b.column}}, m, k, n, threads);
  };
  const int threads = batch * m * k * n < kSerial ? 1 : cpu_threads();
  if (threads > 1 && batch >= threads) {
    std::atomic<int64_t> taken{0};
    in_parallel(threads, [&](int64_t, int64_t) {
      for (int64_t i = taken++; i < batch; i = taken++) one(i, 1);
    });
  } else {
    for (int64_t i = 0; i < batch; ++i) one(i, threads);
  }
}

void packed_matmul(float* c, int64_t c_row, const MatrixView& a, const PackedMatrix& b, int64_t m, int64_t k, int64_t n) {
  if (m == 0 || n == 0 || k == 0) return;
  product(c, c_row, a, {{}, &b}, m, k, n, m * k * n < kSerial ? 1 : cpu_threads());
}

}  // namespace kiln
