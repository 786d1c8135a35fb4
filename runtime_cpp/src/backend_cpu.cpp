#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <deque>
#include <fstream>

#include "backend.h"
#include "file.h"

namespace kiln {

namespace {

constexpr uint64_t kPage = 4096, kReadAheadBytes = 64 << 20;

// A "Name:   123 kB" line of a /proc file, in bytes.
uint64_t proc_bytes(const char* path, const std::string& name) {
  std::ifstream file(path);
  std::string word;
  uint64_t kib = 0;
  while (file >> word)
    if (word == name + ":" && file >> kib) return kib * 1024;
  fail(path, ": no line '", name, "'");
}

class CpuTimeline : public Timeline {
 public:
  bool asynchronous() const override { return false; }
  std::optional<c10::Stream> stream() const override { return std::nullopt; }
  void* handle() const override { return nullptr; }
  void synchronize() override {}
  void send(const at::Tensor& token) override { sent_.push_back(*token.const_data_ptr<int64_t>()); }
  int64_t receive() override {
    if (sent_.empty()) fail("internal error: no token was sent");
    int64_t token = sent_.front();
    sent_.pop_front();
    return token;
  }
  void capture(const std::function<void()>&, const std::vector<std::string>&) override { fail("internal error: capture on the CPU"); }
  void replay() override { fail("internal error: replay on the CPU"); }

 private:
  std::deque<int64_t> sent_;
};

class CpuBackend : public Backend {
 public:
  c10::Device device() const override { return c10::Device(c10::DeviceType::CPU); }
  uint64_t free_bytes() const override { return proc_bytes("/proc/meminfo", "MemAvailable"); }
  at::Tensor load(const MappedFile& file, uint64_t offset, uint64_t bytes, const Progress& progress) const override {
    // Every page once, so that the wait for the disk is here and seen, not in the first prompt.
    for (uint64_t at = 0, next = 0; at < bytes; at = next) {
      next = std::min(bytes, at + kReadAheadBytes);
      if (progress) progress(at, bytes);
      for (uint64_t page = at; page < next; page += kPage) static_cast<void>(*static_cast<const volatile char*>(file.data() + offset + page));
    }
    if (progress) progress(bytes, bytes);
    // The mapping is read-only: a compiled model that wrote to a weight would fault instead of corrupting it.
    return at::from_blob(const_cast<char*>(file.data()) + offset, {static_cast<int64_t>(bytes)}, at::TensorOptions(at::kByte));
  }
  void measure(MemoryReport& report) const override {
    uint64_t anonymous = proc_bytes("/proc/self/status", "RssAnon");
    report.other = anonymous > report.kv() ? anonymous - report.kv() : 0;
  }
  std::unique_ptr<Timeline> make_timeline() const override { return std::make_unique<CpuTimeline>(); }
};

}  // namespace

std::unique_ptr<Backend> make_cpu_backend() { return std::make_unique<CpuBackend>(); }

#ifndef KILN_CUDA
int cuda_device_count(std::string* why) {
  *why = "this runner was built without CUDA";
  return 0;
}
std::pair<int, int> cuda_compute_capability(int) { fail("this runner was built without CUDA"); }
std::unique_ptr<Backend> make_cuda_backend(int, bool) { fail("this runner was built without CUDA"); }
#endif

}  // namespace kiln
