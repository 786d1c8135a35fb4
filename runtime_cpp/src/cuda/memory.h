#pragma once
#include <map>
#include <memory>

#include "cuda/driver.h"
#include "compiled/tensor.h"

namespace kiln {

// One allocation of the driver's for each tensor: weights.
class DeviceMemory : public Memory {
 public:
  explicit DeviceMemory(std::shared_ptr<const cuda::Gpu> gpu) : gpu_(std::move(gpu)) {}
  void* allocate(uint64_t bytes) override;
  void release(void* data, uint64_t bytes) noexcept override;

 private:
  std::shared_ptr<const cuda::Gpu> gpu_;
};

// A range of addresses that memory is mapped into from its start on, as much as was ever needed at once. What is released may be handed out
// again at once: everything that uses it is queued on one stream, in order. Growing takes no memory that has another use, and is no work of the
// stream's: inside a capture it is allowed.
class DevicePool : public Memory {
 public:
  explicit DevicePool(std::shared_ptr<const cuda::Gpu> gpu);
  ~DevicePool() override;
  DevicePool(const DevicePool&) = delete;
  DevicePool& operator=(const DevicePool&) = delete;

  void* allocate(uint64_t bytes) override;
  void release(void* data, uint64_t bytes) noexcept override;
  uint64_t mapped() const { return mapped_; }  // bytes of the device

 private:
  void grow(uint64_t bytes);

  std::shared_ptr<const cuda::Gpu> gpu_;
  cuda::AllocationProp prop_{};
  uint64_t granularity_ = 0, reserved_ = 0, mapped_ = 0;
  cuda::Pointer base_ = 0;
  std::map<uint64_t, uint64_t> free_;     // offset -> bytes, never two that touch
  std::map<uint64_t, uint64_t> mapping_;  // offset -> bytes of each piece of memory
};

// Host memory that the GPU copies from and to by itself: an allocation of the driver's for each tensor, or one buffer.
class PinnedMemory : public Memory {
 public:
  explicit PinnedMemory(std::shared_ptr<const cuda::Gpu> gpu) : gpu_(std::move(gpu)) {}
  void* allocate(uint64_t bytes) override;
  void release(void* data, uint64_t bytes) noexcept override;

 private:
  std::shared_ptr<const cuda::Gpu> gpu_;
};

class PinnedBuffer {
 public:
  PinnedBuffer(const cuda::Gpu& gpu, uint64_t bytes);
  ~PinnedBuffer();
  PinnedBuffer(const PinnedBuffer&) = delete;
  PinnedBuffer& operator=(const PinnedBuffer&) = delete;
  void* data = nullptr;

 private:
  const cuda::Gpu& gpu_;
};

}  // namespace kiln
