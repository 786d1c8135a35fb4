#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAAllocatorConfig.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#include <fcntl.h>

#include <algorithm>
#include <array>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <thread>

#include "backend.h"
#include "decode_graph.h"
#include "file.h"

namespace kiln {

namespace {

constexpr uint64_t kStagingBytes = 64 << 20;
constexpr unsigned kReaders = 4;  // threads that fill a staging buffer
constexpr size_t kStackBytes = 128;  // of a GPU thread; the driver grows it for a kernel that needs more

void check(cudaError_t code, const char* what) {
  if (code == cudaSuccess) return;
  cudaGetLastError();
  fail(what, ": ", cudaGetErrorString(code));
}

uint64_t less(uint64_t a, uint64_t b) { return a > b ? a - b : 0; }

uint64_t reserved_bytes(c10::DeviceIndex index) {
  return static_cast<uint64_t>(c10::cuda::CUDACachingAllocator::getDeviceStats(index).reserved_bytes[0].current);
}

struct PinnedBuffer {
  explicit PinnedBuffer(uint64_t bytes) { check(cudaHostAlloc(&data, bytes, cudaHostAllocDefault), "cannot allocate pinned host memory"); }
  ~PinnedBuffer() { cudaFreeHost(data); }
  PinnedBuffer(const PinnedBuffer&) = delete;
  PinnedBuffer& operator=(const PinnedBuffer&) = delete;
  void* data = nullptr;
};

struct Event {
  Event() { check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cannot create an event"); }
  ~Event() { cudaEventDestroy(event); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  cudaEvent_t event = nullptr;
};

class CudaTimeline : public Timeline {
 public:
  // The current device must be `index`: the events and the ring belong to it.
  explicit CudaTimeline(c10::DeviceIndex index) : stream_(c10::cuda::getStreamFromPool(false, index)), ring_(kInFlight * sizeof(int64_t)) {}
  ~CudaTimeline() override { cudaStreamSynchronize(stream_.stream()); }

  bool asynchronous() const override { return true; }
  std::optional<c10::Stream> stream() const override { return stream_.unwrap(); }
  void* handle() const override { return stream_.stream(); }
  void synchronize() override { check(cudaStreamSynchronize(stream_.stream()), "the GPU failed"); }

  void send(const at::Tensor& token) override {
    if (sent_ - received_ >= kInFlight) fail("internal error: more than ", kInFlight, " tokens in flight");
    size_t slot = sent_++ % kInFlight;
    check(cudaMemcpyAsync(host(slot), token.const_data_ptr(), sizeof(int64_t), cudaMemcpyDeviceToHost, stream_.stream()), "cannot copy the token");
    check(cudaEventRecord(events_[slot].event, stream_.stream()), "cannot record an event");
  }
  int64_t receive() override {
    if (sent_ == received_) fail("internal error: no token was sent");
    size_t slot = received_++ % kInFlight;
    check(cudaEventSynchronize(events_[slot].event), "the GPU failed");
    return *host(slot);
  }

  void capture(const std::function<void()>& step, const std::vector<std::string>& waits) override {
    synchronize();
    uint64_t before = reserved_bytes(stream_.device_index());
    graph_.capture(step, waits);
    graph_bytes_ = less(reserved_bytes(stream_.device_index()), before);
  }
  void replay() override { graph_.replay(); }
  int64_t early_launches() const override { return graph_.early_launches(); }
  uint64_t graph_bytes() const override { return graph_bytes_; }

 private:
  int64_t* host(size_t slot) const { return static_cast<int64_t*>(ring_.data) + slot; }

  c10::cuda::CUDAStream stream_;
  PinnedBuffer ring_;  // [kInFlight] int64
  std::array<Event, kInFlight> events_;
  size_t sent_ = 0, received_ = 0;
  DecodeGraph graph_;
  uint64_t graph_bytes_ = 0;
};

// Reads a file front to back into two buffers by turns, on threads of its own, ahead of the consumer.
class Reader {
 public:
  Reader(const MappedFile& file, uint64_t offset, uint64_t bytes, char* first, char* second)
      : file_(file), offset_(offset), bytes_(bytes), buffers_{first, second}, thread_([this] { run(); }) {}
  ~Reader() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }

  // Waits until buffer `i % 2` holds chunk i.
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
    posix_fadvise(file_.fd(), static_cast<off_t>(offset_), static_cast<off_t>(bytes_), POSIX_FADV_SEQUENTIAL);
    for (uint64_t i = 0; i * kStagingBytes < bytes_; ++i) {
      {
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait(lock, [&] { return i < released_ + 2 || stop_; });
        if (stop_) return;
      }
      std::string error;
      try {
        file_.read(offset_ + i * kStagingBytes, std::min(kStagingBytes, bytes_ - i * kStagingBytes), buffers_[i % 2], kReaders);
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

  const MappedFile& file_;
  uint64_t offset_, bytes_;
  char* buffers_[2];
  std::mutex mutex_;
  std::condition_variable changed_;
  uint64_t filled_ = 0, released_ = 0;  // chunks
  bool stop_ = false;
  std::string error_;
  std::thread thread_;
};

class CudaBackend : public Backend {
 public:
  CudaBackend(int index, bool small_context) : index_(static_cast<c10::DeviceIndex>(index)) {
    // Chunks of other lengths would otherwise leave gigabytes of blocks that fit nothing; a setting of the user's own stays.
    if (!std::getenv("PYTORCH_CUDA_ALLOC_CONF")) setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True", /*overwrite=*/0);
    // Left to itself the allocator first asks for memory to share among hosts, an error wherever there is no fabric for that.
    using namespace c10::cuda::CUDACachingAllocator;
    CUDAAllocatorConfig::set_expandable_segments_handle_type(Expandable_Segments_Handle_Type::POSIX_FD);
    at::globalContext().lazyInitDevice(c10::DeviceType::CUDA);  // the allocator answers nothing, not even its statistics, before
    if (small_context) {  // the driver keeps a stack for every thread the GPU can hold, 1 KiB each by default
      c10::cuda::CUDAGuard guard(index_);
      check(cudaDeviceSetLimit(cudaLimitStackSize, kStackBytes), "cannot set the stack size of GPU threads");
    }
  }

  c10::Device device() const override { return c10::Device(c10::DeviceType::CUDA, index_); }

  uint64_t free_bytes() const override {
    c10::cuda::CUDAGuard guard(index_);
    size_t free = 0, total = 0;
    check(cudaMemGetInfo(&free, &total), "cannot ask the GPU for its free memory");
    // Memory the allocator keeps for later counts as free to us.
    auto stats = c10::cuda::CUDACachingAllocator::getDeviceStats(index_);
    return free + static_cast<uint64_t>(stats.reserved_bytes[0].current - stats.allocated_bytes[0].current);
  }

  at::Tensor load(const MappedFile& file, uint64_t offset, uint64_t bytes, const Progress& progress) const override {
    c10::cuda::CUDAGuard guard(index_);
    at::Tensor blob = at::empty({static_cast<int64_t>(bytes)}, at::TensorOptions(at::kByte).device(device()));
    auto* to = static_cast<char*>(blob.mutable_data_ptr());
    auto stream = c10::cuda::getStreamFromPool(false, index_);
    PinnedBuffer buffers[2] = {PinnedBuffer(kStagingBytes), PinnedBuffer(kStagingBytes)};
    Event copied[2];
    uint64_t chunks = (bytes + kStagingBytes - 1) / kStagingBytes;
    if (progress) progress(0, bytes);
    Reader reader(file, offset, bytes, static_cast<char*>(buffers[0].data), static_cast<char*>(buffers[1].data));
    for (uint64_t i = 0; i < chunks; ++i) {
      reader.wait_full(i);
      uint64_t at = i * kStagingBytes, n = std::min(kStagingBytes, bytes - at);
      check(cudaMemcpyAsync(to + at, buffers[i % 2].data, n, cudaMemcpyHostToDevice, stream.stream()), "cannot copy weights to the GPU");
      check(cudaEventRecord(copied[i % 2].event, stream.stream()), "cannot record an event");
      if (i > 0) {  // the copy before this one: while we wait for it, this one is queued already
        check(cudaEventSynchronize(copied[(i - 1) % 2].event), "cannot copy weights to the GPU");
        reader.release();
        if (progress) progress(at, bytes);
      }
    }
    check(cudaStreamSynchronize(stream.stream()), "cannot copy weights to the GPU");
    if (progress) progress(bytes, bytes);
    return blob;
  }

  void measure(MemoryReport& report) const override {
    c10::cuda::CUDAGuard guard(index_);
    auto stats = c10::cuda::CUDACachingAllocator::getDeviceStats(index_);
    uint64_t held = static_cast<uint64_t>(stats.reserved_bytes[0].current), accounted = report.weights + report.kv();
    report.activations = std::min(less(static_cast<uint64_t>(stats.allocated_bytes[0].peak), accounted), less(held, accounted + report.graph));
    report.other = less(held, accounted + report.activations + report.graph);
    size_t free = 0, total = 0;
    check(cudaMemGetInfo(&free, &total), "cannot ask the GPU for its free memory");
    report.outside = less(total - free, held);
  }

  std::unique_ptr<Timeline> make_timeline() const override {
    c10::cuda::CUDAGuard guard(index_);
    return std::make_unique<CudaTimeline>(index_);
  }

 private:
  c10::DeviceIndex index_;
};

}  // namespace

int cuda_device_count(std::string* why) {
  int count = 0;
  cudaError_t code = cudaGetDeviceCount(&count);
  if (code != cudaSuccess) {
    cudaGetLastError();
    *why = cudaGetErrorString(code);
    return 0;
  }
  if (count == 0) *why = "no GPU found";
  return count;
}

std::pair<int, int> cuda_compute_capability(int index) {
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index), "cannot ask the GPU for its compute capability");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index), "cannot ask the GPU for its compute capability");
  return {major, minor};
}

std::unique_ptr<Backend> make_cuda_backend(int index, bool small_context) { return std::make_unique<CudaBackend>(index, small_context); }

}  // namespace kiln
