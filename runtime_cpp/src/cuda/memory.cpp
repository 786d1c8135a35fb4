#include "cuda/memory.h"

#include <algorithm>

namespace kiln {

using cuda::Among;
using cuda::Current;
using cuda::driver;

namespace {

constexpr uint64_t kUnit = 512;  // alignment of a tensor, in bytes

uint64_t round_up(uint64_t n, uint64_t unit) { return (n + unit - 1) / unit * unit; }

[[noreturn]] void out_of_memory(uint64_t bytes, cuda::Result code, int gpu) {
  size_t free = 0, total = 0;
  driver().memory_info(&free, &total);
  if (code == cuda::kOutOfMemory) fail("cuda:", gpu, " is out of memory: ", bytes, " bytes more do not fit into the ", free, " that are free");
  driver().complain(code, "cannot allocate memory of the GPU");
}

}  // namespace

void* DeviceMemory::allocate(uint64_t bytes) {
  Current current(*gpu_);
  Among others;
  cuda::Pointer at = 0;
  if (cuda::Result code = driver().memory_alloc(&at, std::max<uint64_t>(bytes, 1)); code != cuda::kSuccess) out_of_memory(bytes, code, gpu_->index());
  return reinterpret_cast<void*>(at);
}

void DeviceMemory::release(void* data, uint64_t) noexcept {
  try {
    Current current(*gpu_);
    Among others;
    driver().memory_free(cuda::address(data));
  } catch (const Error&) {  // the driver is gone: so is the memory
  }
}

DevicePool::DevicePool(std::shared_ptr<const cuda::Gpu> gpu) : gpu_(std::move(gpu)) {
  Current current(*gpu_);
  Among others;
  prop_.type = 1;
  prop_.location = {1, gpu_->index()};
  size_t granularity = 0;
  driver().check(driver().granularity(&granularity, &prop_, 0), "cannot ask the GPU how it maps memory");
  granularity_ = granularity;
  reserved_ = round_up(gpu_->total_bytes(), granularity_);
  driver().check(driver().reserve(&base_, reserved_, 0, 0, 0), "cannot reserve addresses of the GPU");
}

DevicePool::~DevicePool() {
  try {
    Current current(*gpu_);
    Among others;
    for (const auto& [offset, bytes] : mapping_) driver().unmap(base_ + offset, bytes);
    driver().unreserve(base_, reserved_);
  } catch (const Error&) {  // the driver is gone: so is the memory
  }
}

// Maps `bytes` more, a multiple of the granularity, behind what is mapped.
void DevicePool::grow(uint64_t bytes) {
  Current current(*gpu_);
  Among others;
  if (bytes > reserved_ - mapped_) out_of_memory(bytes, cuda::kOutOfMemory, gpu_->index());
  cuda::Allocation memory = 0;
  if (cuda::Result code = driver().create(&memory, bytes, &prop_, 0); code != cuda::kSuccess) out_of_memory(bytes, code, gpu_->index());
  cuda::Result code = driver().map(base_ + mapped_, bytes, 0, memory, 0);
  driver().release(memory);  // the mapping keeps it
  driver().check(code, "cannot map memory of the GPU");
  cuda::AccessDesc access{prop_.location, 3};
  code = driver().set_access(base_ + mapped_, bytes, &access, 1);
  if (code != cuda::kSuccess) driver().unmap(base_ + mapped_, bytes);
  driver().check(code, "cannot map memory of the GPU");
  mapping_[mapped_] = bytes;
  uint64_t offset = mapped_;
  mapped_ += bytes;
  release(reinterpret_cast<void*>(base_ + offset), bytes);
}

void* DevicePool::allocate(uint64_t bytes) {
  bytes = round_up(std::max<uint64_t>(bytes, 1), kUnit);
  auto best = free_.end();
  for (auto it = free_.begin(); it != free_.end(); ++it)
    if (it->second >= bytes && (best == free_.end() || it->second < best->second)) best = it;
  if (best == free_.end()) {
    uint64_t tail = 0;  // free bytes at the end of what is mapped
    if (!free_.empty() && free_.rbegin()->first + free_.rbegin()->second == mapped_) tail = free_.rbegin()->second;
    grow(round_up(bytes - tail, granularity_));
    best = std::prev(free_.end());
  }
  auto [offset, size] = *best;
  free_.erase(best);
  if (size > bytes) free_[offset + bytes] = size - bytes;
  return reinterpret_cast<void*>(base_ + offset);
}

void DevicePool::release(void* data, uint64_t bytes) noexcept {
  bytes = round_up(std::max<uint64_t>(bytes, 1), kUnit);
  uint64_t offset = cuda::address(data) - base_;
  auto next = free_.lower_bound(offset);
  if (next != free_.end() && offset + bytes == next->first) {
    bytes += next->second;
    next = free_.erase(next);
  }
  if (next != free_.begin())
    if (auto before = std::prev(next); before->first + before->second == offset) {
      before->second += bytes;
      return;
    }
  free_.emplace_hint(next, offset, bytes);
}

namespace {

void* pin(const cuda::Gpu& gpu, uint64_t bytes) {
  Current current(gpu);
  Among others;
  void* data = nullptr;
  driver().check(driver().host_alloc(&data, std::max<uint64_t>(bytes, 1), 0), "cannot allocate pinned host memory");
  return data;
}

void unpin(const cuda::Gpu& gpu, void* data) noexcept {
  try {
    Current current(gpu);
    Among others;
    driver().host_free(data);
  } catch (const Error&) {  // the driver is gone: so is the memory
  }
}

}  // namespace

void* PinnedMemory::allocate(uint64_t bytes) { return pin(*gpu_, bytes); }
void PinnedMemory::release(void* data, uint64_t) noexcept { unpin(*gpu_, data); }

PinnedBuffer::PinnedBuffer(const cuda::Gpu& gpu, uint64_t bytes) : data(pin(gpu, bytes)), gpu_(gpu) {}
PinnedBuffer::~PinnedBuffer() { unpin(gpu_, data); }

}  // namespace kiln
