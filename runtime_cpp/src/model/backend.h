#pragma once
#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "kiln/session.h"
#include "compiled/package.h"
#include "compiled/shims.h"
#include "compiled/tensor.h"

namespace kiln {

class MappedFile;
class RawWeights;

using Progress = std::function<void(uint64_t done, uint64_t total)>;

// One session's order of work on a device, and its memory. Everything but the constructor and the destructor runs between enter() and leave().
class Timeline {
 public:
  virtual ~Timeline() = default;

  // True: work is queued, and receive() is the only place that waits for it.
  virtual bool asynchronous() const = 0;
  virtual void enter() {}  // the calling thread works on the device from here on
  virtual void leave() noexcept {}
  virtual void synchronize() = 0;

  // What calls of the compiled models work with: temporaries and outputs of prefill and of decode come from memories of their own.
  virtual Surroundings surroundings(const std::string& entry) = 0;

  // Zeroed memory that is no model's temporary: caches and inputs.
  virtual Tensor make(Scalar scalar, const std::vector<int64_t>& shape) = 0;
  // On the timeline, in order with the models' work. All tensors dense.
  virtual void zero(const Tensor& t) = 0;
  virtual void fill(const Tensor& scalar, int64_t value) = 0;         // one int64 or int32
  virtual void fill(const Tensor& scalar, float value) = 0;           // one float32
  virtual void fill_low(const Tensor& scalar, uint32_t value) = 0;    // one int64 whose upper half is 0 already
  virtual void copy(const Tensor& to, const Tensor& from) = 0;        // of one size; either may be of pinned host memory (Backend::keep)
  virtual void write(const Tensor& to, const void* from) = 0;         // from the host, which may change it afterwards
  virtual void read(void* to, const Tensor& from) = 0;                // to the host; waits

  // A first-in first-out line of sampled tokens to the host: send() takes the value `token` [1] int64 has at this
  // point of the timeline, receive() waits for the oldest one. At most kInFlight may be unreceived.
  static constexpr int kInFlight = 4;
  virtual void send(const Tensor& token) = 0;
  virtual int64_t receive() = 0;

  // Records `step` (already warm) so that replay() repeats it at the same addresses; kernels whose names begin with one of `waits`
  // may start early. Only when asynchronous(). The recordings are numbered from 0; what one leaves in memory of its own lasts until another is
  // replayed.
  virtual size_t capture(const std::function<void()>& step, const std::vector<std::string>& waits) = 0;
  virtual void replay(size_t recording = 0) = 0;
  virtual int64_t early_launches() const { return 0; }

  // Fills in activations, graph and other of what this session holds, and outside; the rest of the report is given.
  virtual void measure(MemoryReport& report) const = 0;
};

// Runs its body between enter() and leave().
class Entered {
 public:
  explicit Entered(Timeline& timeline) : timeline_(timeline) { timeline_.enter(); }
  ~Entered() { timeline_.leave(); }
  Entered(const Entered&) = delete;
  Entered& operator=(const Entered&) = delete;

 private:
  Timeline& timeline_;
};

// What differs between the CPU and a GPU. Shared by the sessions of a model, from any thread.
class Backend {
 public:
  virtual ~Backend() = default;
  virtual Device device() const = 0;
  virtual uint64_t free_bytes() const = 0;
  // uint8 [bytes] on the device, or pinned on the host, from `offset` of the file. On the CPU a view of the mapping: the file must outlive it.
  virtual Tensor load(const MappedFile& file, uint64_t offset, uint64_t bytes, bool host, const Progress& progress) const = 0;
  // uint8 [weights.bytes(host)] on the device and pinned on the host: tensors of GGUF files, packed on the way. `loader` is the package's kernels
  // for that, on a GPU.
  virtual std::array<Tensor, 2> load(const RawWeights& weights, const LoaderCode* loader, const Progress& progress) const = 0;
  virtual std::unique_ptr<Timeline> make_timeline() const = 0;
  // uint8 [bytes] that outlive every timeline, and that any thread may release: on the device, or pinned on the host. On the CPU both are one.
  // memory: of that kind, where it is somebody's own.
  Tensor keep(uint64_t bytes, bool host, std::shared_ptr<Memory> memory = nullptr) const {
    if (!memory) memory = memory_to_keep(host);
    return Tensor::make(std::move(memory), host ? Device{} : device(), Scalar::U8, {static_cast<int64_t>(bytes)});
  }
  virtual std::shared_ptr<Memory> memory_to_keep(bool host) const = 0;
  // A copy of such bytes of a GPU, on the host.
  virtual Tensor to_host(const Tensor& kept, std::shared_ptr<Memory> memory) const = 0;
};

std::unique_ptr<Backend> make_cpu_backend();
std::unique_ptr<Backend> make_cuda_backend(int index, bool small_context);

// GPUs of this machine; when 0, `why` says why.
int cuda_device_count(std::string* why);
std::pair<int, int> cuda_compute_capability(int index);

}  // namespace kiln
