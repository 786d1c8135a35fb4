#include "cuda/load.h"

#include <fcntl.h>

#include <algorithm>
#include <array>
#include <condition_variable>
#include <functional>
#include <map>
#include <mutex>
#include <numeric>
#include <thread>

#include "cuda/handles.h"
#include "cuda/memory.h"

namespace kiln {

using namespace cuda;

namespace {

constexpr uint64_t kStagingBytes = 64 << 20;
constexpr uint64_t kAlone = 1 << 20;  // below it one thread reads
constexpr uint64_t kGap = 1 << 16;    // between two tensors, at most, that are read at once
constexpr uint64_t kOverrun = 4;      // bytes behind a block that a kernel may read
constexpr int kMaxDynamicShared = 8;  // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES

struct Extent {
  const MappedFile* file;
  uint64_t offset, bytes;
};

// Reads extents of files into two buffers by turns, on threads of its own, ahead of the consumer.
class Reader {
 public:
  Reader(const std::vector<Extent>& extents, char* first, char* second) : extents_(extents), buffers_{first, second}, thread_([this] { run(); }) {}
  ~Reader() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }

  // Waits until buffer `i % 2` holds extent i.
  void wait_full(uint64_t i) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return filled_ > i || !error_.empty(); });
    if (!error_.empty()) fail(error_);
  }
  void release() {  // the oldest full buffer may be overwritten
    {
      std::lock_guard<std::mutex> lock(mutex_);
      ++released_;
    }
    changed_.notify_all();
  }

 private:
  void run() {
    for (uint64_t i = 0; i < extents_.size(); ++i) {
      const Extent& e = extents_[i];
      if (i == 0 || extents_[i - 1].file != e.file) posix_fadvise(e.file->fd(), static_cast<off_t>(e.offset), 0, POSIX_FADV_SEQUENTIAL);
      {
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait(lock, [&] { return i < released_ + 2 || stop_; });
        if (stop_) return;
      }
      std::string error;
      try {
        e.file->read(e.offset, e.bytes, buffers_[i % 2], e.bytes < kAlone ? 1 : kReaders);
      } catch (const std::exception& e) {
        error = e.what();
      }
      {
        std::lock_guard<std::mutex> lock(mutex_);
        error_ = error;
        filled_ = i + 1;
      }
      changed_.notify_all();
      if (!error.empty()) return;
    }
  }

  const std::vector<Extent>& extents_;
  char* buffers_[2];
  std::mutex mutex_;
  std::condition_variable changed_;
  uint64_t filled_ = 0, released_ = 0;  // extents
  bool stop_ = false;
  std::string error_;
  std::thread thread_;
};

// Has `take(i, data)` queue copies from each extent's bytes, in order, and `then(i)` what does not need them any more; waits for all of it.
void through_pinned(const Gpu& gpu, const std::vector<Extent>& extents, Stream stream, const std::function<void(size_t, const char*)>& take,
                    const std::function<void(size_t)>& then, const Progress& progress) {
  PinnedBuffer buffers[2] = {PinnedBuffer(gpu, kStagingBytes), PinnedBuffer(gpu, kStagingBytes)};
  OwnEvent copied[2];
  uint64_t total = 0, done = 0;
  for (const Extent& e : extents) total += e.bytes;
  if (progress) progress(0, total);
  Reader reader(extents, static_cast<char*>(buffers[0].data), static_cast<char*>(buffers[1].data));
  // The buffers must not go while a copy reads them, whatever is thrown below.
  struct Wait {
    ~Wait() { driver().stream_wait(stream); }
    Stream stream;
  } wait{stream};
  for (size_t i = 0; i < extents.size(); ++i) {
    reader.wait_full(i);
    take(i, static_cast<const char*>(buffers[i % 2].data));
    driver().check(driver().event_record(copied[i % 2].event, stream), "cannot record an event");
    then(i);
    if (i > 0) {  // the copy before this one: while we wait for it, this one is queued already
      driver().check(driver().event_wait(copied[(i - 1) % 2].event), "cannot copy weights to the GPU");
      reader.release();
      done += extents[i - 1].bytes;
      if (progress) progress(done, total);
    }
  }
  driver().check(driver().stream_wait(stream), "cannot copy weights to the GPU");
  if (progress) progress(total, total);
}

void to_device(Pointer to, const void* from, uint64_t bytes, Stream stream) {
  driver().check(driver().copy_to_device(to, from, bytes, stream), "cannot copy weights to the GPU");
}

// A kernel that packs blocks into one plane of any packing; loaded for as long as it lives.
class PackingKernel {
 public:
  explicit PackingKernel(const LoaderCode::Kernel& code) : spec_(code.spec) {
    Among others;
    driver().check(driver().module_load(&module_, code.image.data()), "cannot load the kernel that packs weights");
    Result found = driver().module_function(&function_, module_, spec_.name.c_str());
    if (found == kSuccess && spec_.shared > 0) found = driver().function_set(function_, kMaxDynamicShared, static_cast<int>(spec_.shared));
    if (found != kSuccess) driver().module_unload(module_);
    driver().check(found, "cannot use the kernel that packs weights");
  }
  ~PackingKernel() {
    Among others;
    driver().module_unload(module_);
  }
  PackingKernel(const PackingKernel&) = delete;
  PackingKernel& operator=(const PackingKernel&) = delete;

  // What it is told of a plane: int32 [most terms of a unit][offset, mask, shift][units], then the most terms of each `units` units.
  std::vector<int32_t> table(const Packing::Plane& plane) const {
    const size_t units = plane.units.size(), step = static_cast<size_t>(spec_.units);
    size_t most = 0;
    for (const Packing::Unit& unit : plane.units) most = std::max(most, unit.size());
    std::vector<int32_t> table(most * 3 * units);
    for (size_t u = 0; u < units; ++u)
      for (size_t i = 0; i < plane.units[u].size(); ++i) {
        const Packing::Term& t = plane.units[u][i];
        const int32_t values[3] = {static_cast<int32_t>(t.offset), static_cast<int32_t>(t.mask), t.shift & 31};
        for (size_t k = 0; k < 3; ++k) table[(i * 3 + k) * units + u] = values[k];
      }
    for (size_t first = 0; first < units; first += step) {
      size_t terms = 0;
      for (size_t u = first; u < std::min(first + step, units); ++u) terms = std::max(terms, plane.units[u].size());
      table.push_back(static_cast<int32_t>(terms));
    }
    return table;
  }

  // `raw`: `rows` rows of the piece; `out`: the plane, at the first of them; `terms`, `counts`: the plane's table.
  void launch(Pointer raw, Pointer out, Pointer terms, Pointer counts, const RawWeights::Piece& piece, uint64_t rows, const Packing::Plane& plane,
              Stream stream) const {
    auto number = [](uint64_t n) { return static_cast<int32_t>(n); };
    int32_t count = number(rows), row_bytes = number(piece.row_bytes), block_bytes = number(piece.packing->bytes()), n = number(piece.n);
    int32_t units = number(plane.units.size());
    uint64_t grain = std::gcd(std::gcd(raw, piece.row_bytes), std::gcd(piece.packing->bytes(), uint64_t{4}));  // of the addresses of all pieces
    for (uint32_t offset : plane.offsets) grain = std::gcd(grain, uint64_t{offset});
    int32_t step = number(grain);
    Pointer none[2] = {0, 0};  // scratch that the compiler's convention has room for
    void* arguments[] = {&raw, &out, &terms, &counts, &count, &row_bytes, &block_bytes, &n, &units, &step, &none[0], &none[1]};
    auto across = static_cast<unsigned>((rows + static_cast<uint64_t>(spec_.rows) - 1) / static_cast<uint64_t>(spec_.rows));
    Among others;
    driver().check(driver().launch(function_, across, static_cast<unsigned>(piece.groups), 1, static_cast<unsigned>(spec_.threads), 1, 1,
                                   static_cast<unsigned>(spec_.shared), stream, arguments, nullptr),
                   "cannot pack weights on the GPU");
  }

 private:
  PackKernel spec_;
  Module module_ = nullptr;
  Function function_ = nullptr;
};

// A packing's table of one plane on the device.
struct PlaneTable {
  Tensor memory;
  Pointer terms = 0, counts = 0;
};

// Rows of a piece in an extent: `at` bytes from its start.
struct Segment {
  const RawWeights::Piece* piece;
  uint64_t first, rows, at;
};

// Whole rows, in the order of the files, at most kStagingBytes at once.
void split(const RawWeights& weights, std::vector<Extent>* extents, std::vector<std::vector<Segment>>* segments) {
  for (const RawWeights::Piece& p : weights.pieces()) {
    if (p.row_bytes > kStagingBytes) fail(p.file->path(), ": a tensor has rows of ", p.row_bytes, " bytes, the runner takes ", kStagingBytes);
    for (uint64_t row = 0; row < p.rows;) {
      const uint64_t from = p.offset + row * p.row_bytes;
      Extent* e = extents->empty() ? nullptr : &extents->back();
      const bool near = e && e->file == p.file && from >= e->offset + e->bytes && from - (e->offset + e->bytes) <= kGap;
      if (!near || from + p.row_bytes - e->offset > kStagingBytes) {
        extents->push_back({p.file, from, 0});
        segments->emplace_back();
        e = &extents->back();
      }
      const uint64_t at = from - e->offset, rows = std::min(p.rows - row, (kStagingBytes - at) / p.row_bytes);
      segments->back().push_back({&p, row, rows, at});
      e->bytes = at + rows * p.row_bytes;
      row += rows;
    }
  }
}

}  // namespace

Tensor load_file(const std::shared_ptr<const Gpu>& gpu, const MappedFile& file, uint64_t offset, uint64_t bytes, const Progress& progress) {
  Current current(*gpu);
  Tensor blob = Tensor::make(std::make_shared<DeviceMemory>(gpu), {true, gpu->index()}, Scalar::U8, {static_cast<int64_t>(bytes)});
  const Pointer to = address(blob.data());
  std::vector<Extent> extents;
  for (uint64_t at = 0; at < bytes; at += kStagingBytes) extents.push_back({&file, offset + at, std::min(kStagingBytes, bytes - at)});
  OwnStream own;
  through_pinned(
      *gpu, extents, own.stream, [&](size_t i, const char* data) { to_device(to + i * kStagingBytes, data, extents[i].bytes, own.stream); }, [](size_t) {},
      progress);
  return blob;
}

Tensor load_raw(const std::shared_ptr<const Gpu>& gpu, const RawWeights& weights, const Tensor& host, const LoaderCode& loader, const Progress& progress) {
  Current current(*gpu);
  auto memory = std::make_shared<DeviceMemory>(gpu);
  auto make = [&](uint64_t bytes) { return Tensor::make(memory, {true, gpu->index()}, Scalar::U8, {static_cast<int64_t>(bytes)}); };
  Tensor blob = make(weights.bytes()), staging = make(kStagingBytes + kOverrun);
  const Pointer to[2] = {address(blob.data()), weights.bytes(true) ? address(host.data()) : 0}, staged = address(staging.data());
  OwnStream own;
  for (const RawWeights::Made& m : weights.made()) to_device(to[m.host] + m.at, m.bytes.data(), m.bytes.size(), own.stream);

  const PackingKernel words(loader.words), halves(loader.halves);
  std::map<const Packing*, std::array<PlaneTable, 2>> tables;
  for (const auto& [type, packing] : weights.map().packings())
    for (size_t half : {0, 1}) {
      const Packing::Plane& plane = half ? packing.halves() : packing.words();
      const PackingKernel& kernel = half ? halves : words;
      std::vector<int32_t> table = kernel.table(plane);
      const auto& spec = half ? loader.halves.spec : loader.words.spec;
      const size_t units = plane.units.size(), counts = (units + static_cast<size_t>(spec.units) - 1) / static_cast<size_t>(spec.units);
      PlaneTable& on_device = tables[&packing][half];
      on_device.memory = make(table.size() * sizeof(int32_t));
      on_device.terms = address(on_device.memory.data());
      on_device.counts = on_device.terms + (table.size() - counts) * sizeof(int32_t);
      to_device(on_device.terms, table.data(), table.size() * sizeof(int32_t), own.stream);  // pageable: copied when this returns
    }

  std::vector<Extent> extents;
  std::vector<std::vector<Segment>> segments;
  split(weights, &extents, &segments);
  auto take = [&](size_t i, const char* data) {
    const bool packs = std::any_of(segments[i].begin(), segments[i].end(), [](const Segment& s) { return s.piece->packing; });
    if (packs) to_device(staged, data, extents[i].bytes, own.stream);
    for (const Segment& s : segments[i])
      if (!s.piece->packing) to_device(to[s.piece->host] + s.piece->words + s.first * s.piece->row_bytes, data + s.at, s.rows * s.piece->row_bytes, own.stream);
  };
  auto then = [&](size_t i) {
    for (const Segment& s : segments[i]) {
      const RawWeights::Piece& p = *s.piece;
      if (!p.packing) continue;
      const auto& planes = tables.at(p.packing);
      words.launch(staged + s.at, to[p.host] + p.words + s.first * sizeof(uint32_t), planes[0].terms, planes[0].counts, p, s.rows, p.packing->words(), own.stream);
      halves.launch(staged + s.at, to[p.host] + p.halves + s.first * sizeof(uint16_t), planes[1].terms, planes[1].counts, p, s.rows, p.packing->halves(), own.stream);
    }
  };
  through_pinned(*gpu, extents, own.stream, take, then, progress);
  return blob;
}

}  // namespace kiln
