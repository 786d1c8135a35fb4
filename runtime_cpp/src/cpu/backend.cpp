#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <fstream>
#include <mutex>
#include <system_error>
#include <thread>

#include "artifact/file.h"
#include "artifact/raw_weights.h"
#include "cpu/ops.h"
#include "model/backend.h"

namespace kiln {

namespace {

constexpr uint64_t kJobBytes = 1 << 20;  // of a tensor, packed at a time by a thread
constexpr uint64_t kPage = 4096, kReadAheadBytes = 64 << 20, kAlignment = 64;

// A "Name:   123 kB" line of a /proc file, in bytes.
uint64_t proc_bytes(const char* path, const std::string& name) {
  std::ifstream file(path);
  std::string word;
  uint64_t kib = 0;
  while (file >> word)
    if (word == name + ":" && file >> kib) return kib * 1024;
  fail(path, ": no line '", name, "'");
}

class HostMemory : public Memory {
 public:
  void* allocate(uint64_t bytes) override {
    void* data = std::aligned_alloc(kAlignment, (bytes + kAlignment) & ~(kAlignment - 1));
    if (!data) fail("out of memory: no ", bytes, " bytes");
    live_ += bytes;
    peak_ = std::max(peak_, live_);
    return data;
  }
  void release(void* data, uint64_t bytes) noexcept override {
    std::free(data);
    live_ -= bytes;
  }
  uint64_t peak() const { return peak_; }

 private:
  uint64_t live_ = 0, peak_ = 0;
};

// Zeros that cost nothing before they are written: a cache's unused end takes no memory.
class ZeroPages : public Memory {
 public:
  void* allocate(uint64_t bytes) override {
    void* data = mmap(nullptr, std::max<uint64_t>(bytes, 1), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) fail("out of memory: no ", bytes, " bytes");
    return data;
  }
  void release(void* data, uint64_t bytes) noexcept override { munmap(data, std::max<uint64_t>(bytes, 1)); }
};

// Rows of one tensor.
struct Job {
  const RawWeights::Piece* piece;
  uint64_t first, rows;
};

void run_job(const Job& job, std::string& raw, char* to) {
  const RawWeights::Piece& p = *job.piece;
  const uint64_t offset = p.offset + job.first * p.row_bytes, bytes = job.rows * p.row_bytes;
  if (!p.packing) return p.file->read(offset, bytes, to + p.words + job.first * p.row_bytes, 1);
  raw.resize(std::max<size_t>(raw.size(), bytes));
  p.file->read(offset, bytes, raw.data(), 1);  // not through the mapping: a file that was cut meanwhile is an error, not a signal
  p.packing->pack(raw.data(), p.row_bytes, job.rows, p.groups, reinterpret_cast<uint32_t*>(to + p.words) + job.first,
                  reinterpret_cast<uint16_t*>(to + p.halves) + job.first, p.n);
}

// Packs all pieces to where they belong from `to` on, on all threads of the CPU; `progress` is called on this one.
void pack_all(const RawWeights& weights, char* to, const Progress& progress) {
  std::vector<Job> jobs;
  for (const RawWeights::Piece& p : weights.pieces()) {
    const uint64_t step = std::max<uint64_t>(1, kJobBytes / p.row_bytes / 128) * 128;
    for (uint64_t row = 0; row < p.rows; row += step) jobs.push_back({&p, row, std::min(step, p.rows - row)});
  }
  std::atomic<size_t> next{0};
  std::atomic<uint64_t> done{0};
  std::mutex mutex;
  std::exception_ptr error;
  auto work = [&](const std::function<void()>& after) {
    std::string raw;
    try {
      for (size_t i; (i = next++) < jobs.size();) {
        run_job(jobs[i], raw, to);
        done += jobs[i].rows * jobs[i].piece->row_bytes;
        after();
      }
    } catch (...) {
      next = jobs.size();
      std::lock_guard<std::mutex> lock(mutex);
      if (!error) error = std::current_exception();
    }
  };
  if (progress) progress(0, weights.raw_bytes());
  std::vector<std::thread> others;
  for (int i = 1; i < cpu_threads(); ++i) {
    try {
      others.emplace_back(work, [] {});
    } catch (const std::system_error&) {  // no thread to be had: those that are there do its work
      break;
    }
  }
  work([&] {
    if (progress) progress(done, weights.raw_bytes());
  });
  for (std::thread& other : others) other.join();
  if (error) std::rethrow_exception(error);
  if (progress) progress(weights.raw_bytes(), weights.raw_bytes());
}

class CpuTimeline : public Timeline {
 public:
  explicit CpuTimeline(uint64_t weights) : weights_(weights) {}
  bool asynchronous() const override { return false; }
  void synchronize() override {}
  Surroundings surroundings(const std::string&) override {
    Surroundings s;
    s.memory = temporaries_;
    return s;
  }
  Tensor make(Scalar scalar, const std::vector<int64_t>& shape) override { return Tensor::make(lasting_, {}, scalar, shape); }
  void zero(const Tensor& t) override { std::memset(t.data(), 0, t.bytes()); }
  void fill(const Tensor& t, int64_t value) override {
    if (t.scalar == Scalar::I64)
      *static_cast<int64_t*>(t.data()) = value;
    else
      *static_cast<int32_t*>(t.data()) = static_cast<int32_t>(value);
  }
  void fill_low(const Tensor& t, uint32_t value) override { fill(t, int64_t{value}); }
  void fill(const Tensor& t, float value) override { *static_cast<float*>(t.data()) = value; }
  void copy(const Tensor& to, const Tensor& from) override { std::memcpy(to.data(), from.data(), to.bytes()); }
  void write(const Tensor& to, const void* from) override { std::memcpy(to.data(), from, to.bytes()); }
  void read(void* to, const Tensor& from) override { std::memcpy(to, from.data(), from.bytes()); }
  void send(const Tensor& token) override { sent_.push_back(*static_cast<const int64_t*>(token.data())); }
  int64_t receive() override {
    if (sent_.empty()) fail("internal error: no token was sent");
    int64_t token = sent_.front();
    sent_.pop_front();
    return token;
  }
  size_t capture(const std::function<void()>&, const std::vector<std::string>&) override { fail("internal error: capture on the CPU"); }
  void replay(size_t) override { fail("internal error: replay on the CPU"); }
  void measure(MemoryReport& report) const override {
    report.activations = temporaries_->peak();
    uint64_t anonymous = proc_bytes("/proc/self/status", "RssAnon"), ours = report.kv() + report.activations + weights_;
    report.other = anonymous > ours ? anonymous - ours : 0;
  }

 private:
  std::shared_ptr<HostMemory> temporaries_ = std::make_shared<HostMemory>();
  std::shared_ptr<ZeroPages> lasting_ = std::make_shared<ZeroPages>();
  std::deque<int64_t> sent_;
  uint64_t weights_;  // bytes of them that this process's own memory holds
};

class CpuBackend : public Backend {
 public:
  Device device() const override { return {}; }
  uint64_t free_bytes() const override { return proc_bytes("/proc/meminfo", "MemAvailable"); }
  Tensor load(const MappedFile& file, uint64_t offset, uint64_t bytes, bool, const Progress& progress) const override {
    // Every page once, so that the wait for the disk is here and seen, not in the first prompt.
    for (uint64_t at = 0, next = 0; at < bytes; at = next) {
      next = std::min(bytes, at + kReadAheadBytes);
      if (progress) progress(at, bytes);
      for (uint64_t page = at; page < next; page += kPage) static_cast<void>(*static_cast<const volatile char*>(file.data() + offset + page));
    }
    if (progress) progress(bytes, bytes);
    // The mapping is read-only: a compiled model that wrote to a weight would fault instead of corrupting it.
    return Tensor::over(const_cast<char*>(file.data()) + offset, {}, Scalar::U8, {static_cast<int64_t>(bytes)});
  }
  std::array<Tensor, 2> load(const RawWeights& weights, const LoaderCode*, const Progress& progress) const override {
    Tensor blob = Tensor::make(std::make_shared<ZeroPages>(), {}, Scalar::U8, {static_cast<int64_t>(weights.bytes())});
    auto* to = static_cast<char*>(blob.data());
    for (const RawWeights::Made& m : weights.made()) std::memcpy(to + m.at, m.bytes.data(), m.bytes.size());
    pack_all(weights, to, progress);
    mprotect(to, weights.bytes(), PROT_READ);  // a compiled model that wrote to a weight would fault instead of corrupting it
    packed_ = weights.bytes();
    return {blob, {}};
  }
  std::unique_ptr<Timeline> make_timeline() const override { return std::make_unique<CpuTimeline>(packed_); }
  std::shared_ptr<Memory> memory_to_keep(bool) const override { return std::make_shared<ZeroPages>(); }
  Tensor to_host(const Tensor&, std::shared_ptr<Memory>) const override { fail("internal error: the CPU's memory is the host's"); }

 private:
  mutable uint64_t packed_ = 0;  // of its one load
};

}  // namespace

std::unique_ptr<Backend> make_cpu_backend() { return std::make_unique<CpuBackend>(); }

}  // namespace kiln
