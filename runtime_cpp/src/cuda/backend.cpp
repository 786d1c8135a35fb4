#include <array>
#include <cstdlib>
#include <cstring>

#include "model/backend.h"
#include "cuda/calls.h"
#include "cuda/memory.h"
#include "cuda/decode_graph.h"
#include "cuda/handles.h"
#include "cuda/load.h"

namespace kiln {

using namespace cuda;

namespace {

constexpr size_t kStackBytes = 128;  // of a GPU thread; the driver grows it for a kernel that needs more

uint64_t less(uint64_t a, uint64_t b) { return a > b ? a - b : 0; }

// What belongs to the context; made and destroyed while it is current.
struct StreamState {
  OwnStream stream;
  std::array<OwnEvent, Timeline::kInFlight> events;
  std::vector<std::unique_ptr<DecodeGraph>> graphs;
};

class CudaTimeline : public Timeline {
 public:
  CudaTimeline(std::shared_ptr<const Gpu> gpu, std::shared_ptr<Modules> modules)
      : gpu_(std::move(gpu)),
        lasting_(std::make_shared<DevicePool>(gpu_)),
        prefill_(std::make_shared<DevicePool>(gpu_)),
        decode_(std::make_shared<DevicePool>(gpu_)),
        calls_(std::in_place, gpu_, std::move(modules), lasting_),
        ring_(*gpu_, kInFlight * sizeof(int64_t)) {
    Current current(*gpu_);
    state_.emplace();
  }
  ~CudaTimeline() override {
    try {
      Current current(*gpu_);
      driver().stream_wait(stream());
      state_.reset();
      calls_.reset();
    } catch (const Error&) {  // the driver is gone
    }
  }

  bool asynchronous() const override { return true; }
  void enter() override { driver().check(driver().context_push(gpu_->context()), "cannot select the GPU"); }
  void leave() noexcept override {
    Context old = nullptr;
    driver().context_pop(&old);
  }
  void synchronize() override { driver().check(driver().stream_wait(stream()), "the GPU failed"); }

  Surroundings surroundings(const std::string& entry) override {
    Surroundings s;
    s.memory = entry == "prefill" ? prefill_ : decode_;
    // For compute-sanitizer, which sees the bounds of the driver's allocations only. Freeing one waits for the device; no graph can hold one.
    if (std::getenv("KILN_NO_POOLS")) s.memory = std::make_shared<DeviceMemory>(gpu_);
    s.device = device();
    s.stream = stream();
    s.cuda = &*calls_;
    return s;
  }

  Tensor make(Scalar scalar, const std::vector<int64_t>& shape) override {
    Tensor t = Tensor::make(lasting_, device(), scalar, shape);
    zero(t);
    return t;
  }
  void zero(const Tensor& t) override { driver().check(driver().set_bytes(at(t), 0, t.bytes(), stream()), "cannot zero memory of the GPU"); }
  void fill(const Tensor& t, int64_t value) override {
    uint32_t words[2];
    std::memcpy(words, &value, sizeof value);
    for (size_t i = 0; i < scalar_bytes(t.scalar) / sizeof *words; ++i)
      driver().check(driver().set_words(at(t) + i * sizeof *words, words[i], 1, stream()), "cannot write to the GPU");
  }
  void fill_low(const Tensor& t, uint32_t value) override { driver().check(driver().set_words(at(t), value, 1, stream()), "cannot write to the GPU"); }
  void fill(const Tensor& t, float value) override {
    uint32_t word;
    std::memcpy(&word, &value, sizeof word);
    driver().check(driver().set_words(at(t), word, 1, stream()), "cannot write to the GPU");
  }
  void copy(const Tensor& to, const Tensor& from) override {
    if (!from.device.cuda) return write(to, from.data());
    if (!to.device.cuda) return driver().check(driver().copy_to_host(to.data(), at(from), from.bytes(), stream()), "cannot copy from the GPU");
    driver().check(driver().copy(at(to), at(from), to.bytes(), stream()), "cannot copy on the GPU");
  }
  void write(const Tensor& to, const void* from) override {  // the driver has copied pageable memory when it returns
    driver().check(driver().copy_to_device(at(to), from, to.bytes(), stream()), "cannot copy to the GPU");
  }
  void read(void* to, const Tensor& from) override {
    driver().check(driver().copy_to_host(to, at(from), from.bytes(), stream()), "cannot copy from the GPU");
    synchronize();
  }

  void send(const Tensor& token) override {
    if (sent_ - received_ >= kInFlight) fail("internal error: more than ", kInFlight, " tokens in flight");
    size_t slot = sent_++ % kInFlight;
    driver().check(driver().copy_to_host(host(slot), at(token), sizeof(int64_t), stream()), "cannot copy the token");
    driver().check(driver().event_record(state_->events[slot].event, stream()), "cannot record an event");
  }
  int64_t receive() override {
    if (sent_ == received_) fail("internal error: no token was sent");
    size_t slot = received_++ % kInFlight;
    driver().check(driver().event_wait(state_->events[slot].event), "the GPU failed");
    return *host(slot);
  }

  size_t capture(const std::function<void()>& step, const std::vector<std::string>& waits) override {
    synchronize();
    auto graph = std::make_unique<DecodeGraph>();
    {
      Alone alone;
      graph->capture(stream(), step, waits);
    }
    state_->graphs.push_back(std::move(graph));
    captured_ = true;
    return state_->graphs.size() - 1;
  }
  void replay(size_t recording) override {
    if (recording >= state_->graphs.size()) fail("internal error: replay of a decode graph that is not captured");
    state_->graphs[recording]->replay(stream());
  }
  int64_t early_launches() const override { return state_->graphs.empty() ? 0 : state_->graphs.front()->early_launches(); }

  void measure(MemoryReport& report) const override {
    report.activations = prefill_->mapped() + (captured_ ? 0 : decode_->mapped());
    report.graph = captured_ ? decode_->mapped() : 0;
    report.other = less(lasting_->mapped(), report.kv());
    Among others;
    size_t free = 0, total = 0;
    driver().check(driver().memory_info(&free, &total), "cannot ask the GPU for its free memory");
    report.outside = less(total - free, report.total());
  }

 private:
  static Pointer at(const Tensor& t) { return address(t.data()); }
  kiln::Device device() const { return {true, gpu_->index()}; }
  Stream stream() const { return state_->stream.stream; }
  int64_t* host(size_t slot) const { return static_cast<int64_t*>(ring_.data) + slot; }

  std::shared_ptr<const Gpu> gpu_;
  // Caches, inputs and the workspace of matmuls; temporaries and outputs of prefill; those of decode, whose addresses are in its graph.
  std::shared_ptr<DevicePool> lasting_, prefill_, decode_;
  std::optional<CudaCalls> calls_;
  PinnedBuffer ring_;  // [kInFlight] int64
  std::optional<StreamState> state_;
  size_t sent_ = 0, received_ = 0;
  bool captured_ = false;
};

class CudaBackend : public Backend {
 public:
  CudaBackend(int index, bool small_context) : gpu_(std::make_shared<const Gpu>(index)), modules_(std::make_shared<Modules>(gpu_)) {
    Current current(*gpu_);
    Among others;
    if (small_context)  // the driver keeps a stack for every thread the GPU can hold, 1 KiB each by default
      driver().check(driver().context_limit(kLimitStackSize, kStackBytes), "cannot set the stack size of GPU threads");
  }

  kiln::Device device() const override { return {true, gpu_->index()}; }

  uint64_t free_bytes() const override {
    Current current(*gpu_);
    Among others;
    size_t free = 0, total = 0;
    driver().check(driver().memory_info(&free, &total), "cannot ask the GPU for its free memory");
    return free;
  }

  Tensor load(const MappedFile& file, uint64_t offset, uint64_t bytes, bool host, const Progress& progress) const override {
    if (!host) return load_file(gpu_, file, offset, bytes, progress);
    Tensor blob = keep(bytes, true);
    file.read(offset, bytes, static_cast<char*>(blob.data()), kReaders);
    return blob;
  }
  std::array<Tensor, 2> load(const RawWeights& weights, const LoaderCode* loader, const Progress& progress) const override {
    if (!loader) fail("the package has no kernels that pack a GGUF file's weights; export the model again");
    Tensor host = weights.bytes(true) ? keep(weights.bytes(true), true) : Tensor();
    return {load_raw(gpu_, weights, host, *loader, progress), host};
  }

  std::unique_ptr<Timeline> make_timeline() const override { return std::make_unique<CudaTimeline>(gpu_, modules_); }

  std::shared_ptr<Memory> memory_to_keep(bool host) const override {
    if (host) return std::make_shared<PinnedMemory>(gpu_);
    return std::make_shared<DeviceMemory>(gpu_);
  }
  Tensor to_host(const Tensor& kept, std::shared_ptr<Memory> memory) const override {
    Tensor copy = keep(kept.bytes(), true, std::move(memory));
    Current current(*gpu_);
    OwnStream own;
    driver().check(driver().copy_to_host(copy.data(), address(kept.data()), kept.bytes(), own.stream), "cannot copy from the GPU");
    driver().check(driver().stream_wait(own.stream), "the GPU failed");
    return copy;
  }

 private:
  std::shared_ptr<const Gpu> gpu_;
  std::shared_ptr<Modules> modules_;
};

}  // namespace

int cuda_device_count(std::string* why) {
  const Driver& d = try_driver();
  int count = 0;
  if (!d.missing.empty())
    *why = d.missing;
  else if (Result code = d.device_count(&count); code != kSuccess)
    *why = "the driver does not list its GPUs (CUDA error " + std::to_string(code) + ")";
  else if (count == 0)
    *why = "no GPU found";
  return count;
}

std::pair<int, int> cuda_compute_capability(int index) {
  cuda::Device device = 0;
  int major = 0, minor = 0;
  driver().check(driver().device_get(&device, index), "cannot find the GPU");
  driver().check(driver().device_attribute(&major, kMajor, device), "cannot ask the GPU for its compute capability");
  driver().check(driver().device_attribute(&minor, kMinor, device), "cannot ask the GPU for its compute capability");
  return {major, minor};
}

std::unique_ptr<Backend> make_cuda_backend(int index, bool small_context) { return std::make_unique<CudaBackend>(index, small_context); }

}  // namespace kiln
