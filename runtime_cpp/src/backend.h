#pragma once
#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <c10/core/Stream.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "kiln/session.h"

namespace kiln {

class MappedFile;

using Progress = std::function<void(uint64_t done, uint64_t total)>;

// One session's order of work on a device.
class Timeline {
 public:
  virtual ~Timeline() = default;

  // True: work is queued, and receive() is the only place that waits for it.
  virtual bool asynchronous() const = 0;
  virtual std::optional<c10::Stream> stream() const = 0;
  virtual void* handle() const = 0;  // of the stream, for AOTInductor
  virtual void synchronize() = 0;

  // A first-in first-out line of sampled tokens to the host: send() takes the value `token` [1] int64 has at this
  // point of the timeline, receive() waits for the oldest one. At most kInFlight may be unreceived.
  static constexpr int kInFlight = 4;
  virtual void send(const at::Tensor& token) = 0;
  virtual int64_t receive() = 0;

  // Records `step` (already warm) so that replay() repeats it at the same addresses; kernels whose names begin with one of `waits`
  // may start early. Only when asynchronous().
  virtual void capture(const std::function<void()>& step, const std::vector<std::string>& waits) = 0;
  virtual void replay() = 0;
  virtual int64_t early_launches() const { return 0; }
  virtual uint64_t graph_bytes() const { return 0; }  // of the device, held by what capture() recorded
};

// What differs between the CPU and a GPU.
class Backend {
 public:
  virtual ~Backend() = default;
  virtual c10::Device device() const = 0;
  virtual uint64_t free_bytes() const = 0;
  // uint8 [bytes] on the device, from `offset` of the file. On the CPU a view of the mapping: the file must outlive it.
  virtual at::Tensor load(const MappedFile& file, uint64_t offset, uint64_t bytes, const Progress& progress) const = 0;
  // Fills in activations, other and outside; the rest of the report is given.
  virtual void measure(MemoryReport& report) const = 0;
  virtual std::unique_ptr<Timeline> make_timeline() const = 0;
};

std::unique_ptr<Backend> make_cpu_backend();
std::unique_ptr<Backend> make_cuda_backend(int index, bool small_context);

// GPUs of this machine; when 0, `why` says why.
int cuda_device_count(std::string* why);
std::pair<int, int> cuda_compute_capability(int index);

}  // namespace kiln
