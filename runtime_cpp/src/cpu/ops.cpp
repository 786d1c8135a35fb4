#include "cpu/ops.h"

#include <array>
#include <atomic>
#include <cstring>
#include <utility>
#include <vector>

#include "cpu/parallel.h"

namespace kiln {

namespace {

std::atomic<int> threads_set{0};

template <typename Sum, typename T>
void cumsum_rows(const Rows<T>& out, const Rows<const T>& x, int64_t rows, int64_t n) {
  for (int64_t r = 0; r < rows; ++r) {
    Sum sum = 0;
    for (int64_t i = 0; i < n; ++i) {
      sum += static_cast<Sum>(x.data[r * x.row + i * x.step]);
      out.data[r * out.row + i * out.step] = static_cast<T>(sum);
    }
  }
}

// In the order of the values: -0 equals 0, NaN is the greatest.
uint32_t sort_key(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return UINT32_MAX;
  if (bits == 0x80000000) bits = 0;
  return bits >> 31 ? ~bits : bits | 0x80000000;
}

struct Keyed {
  uint32_t key, index;
};

constexpr int kDigitBits = 11, kDigits = 3;
constexpr size_t kBuckets = size_t{1} << kDigitBits;
size_t digit(uint32_t key, int d) { return key >> (d * kDigitBits) & (kBuckets - 1); }

// Radix sort from the lowest digit: each pass is stable, and one whose digit is the same everywhere is left out.
void radix_sort(std::vector<Keyed>& items, std::vector<Keyed>& scratch) {
  std::array<std::array<size_t, kBuckets>, kDigits> count{};
  for (const Keyed& item : items)
    for (int d = 0; d < kDigits; ++d) ++count[d][digit(item.key, d)];
  scratch.resize(items.size());
  for (int d = 0; d < kDigits; ++d) {
    if (count[d][digit(items[0].key, d)] == items.size()) continue;
    size_t start = 0;
    for (size_t& c : count[d]) start += std::exchange(c, start);
    for (const Keyed& item : items) scratch[count[d][digit(item.key, d)]++] = item;
    items.swap(scratch);
  }
}

}  // namespace

void set_cpu_threads(int threads) { threads_set = threads; }

int cpu_threads() {
  int threads = threads_set;
  return threads > 0 ? threads : omp_get_max_threads();
}

void cumsum(const Rows<float>& out, const Rows<const float>& x, int64_t rows, int64_t n) { cumsum_rows<double>(out, x, rows, n); }
void cumsum(const Rows<int64_t>& out, const Rows<const int64_t>& x, int64_t rows, int64_t n) { cumsum_rows<int64_t>(out, x, rows, n); }

void stable_sort(const Rows<float>& values, const Rows<int64_t>& indices, const Rows<const float>& x, int64_t rows, int64_t n, bool descending) {
  if (n == 0) return;
  std::vector<Keyed> items(static_cast<size_t>(n)), scratch;
  const uint32_t flip = descending ? UINT32_MAX : 0;
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = x.data + r * x.row;
    for (int64_t i = 0; i < n; ++i) items[static_cast<size_t>(i)] = {sort_key(row[i * x.step]) ^ flip, static_cast<uint32_t>(i)};
    radix_sort(items, scratch);
    for (int64_t i = 0; i < n; ++i) {
      auto from = static_cast<int64_t>(items[static_cast<size_t>(i)].index);
      values.data[r * values.row + i * values.step] = row[from * x.step];
      indices.data[r * indices.row + i * indices.step] = from;
    }
  }
}

}  // namespace kiln
