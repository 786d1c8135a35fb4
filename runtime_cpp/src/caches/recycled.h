#pragma once
#include <map>
#include <memory>
#include <mutex>

#include "compiled/tensor.h"

namespace kiln {

// Memory for what comes and goes in few sizes, as snapshots do. What is released is handed out again: the driver takes half a second to pin a
// gigabyte. Where no piece has the size, all that wait go back first, so that no more is held than was once in use, but for what rounding adds.
class Recycled : public Memory {
 public:
  explicit Recycled(std::shared_ptr<Memory> of) : of_(std::move(of)) {}
  ~Recycled() override { give_back(); }
  Recycled(const Recycled&) = delete;
  Recycled& operator=(const Recycled&) = delete;

  void* allocate(uint64_t bytes) override {
    bytes = rounded(bytes);
    {
      std::lock_guard lock(mutex_);
      if (auto found = waiting_.find(bytes); found != waiting_.end()) {
        void* data = found->second;
        waiting_.erase(found);
        return data;
      }
      give_back();
    }
    return of_->allocate(bytes);
  }
  void release(void* data, uint64_t bytes) noexcept override {
    bytes = rounded(bytes);
    try {
      std::lock_guard lock(mutex_);
      waiting_.emplace(bytes, data);
    } catch (...) {  // no memory for a line more
      of_->release(data, bytes);
    }
  }

 private:
  static uint64_t rounded(uint64_t bytes) { return (bytes + kUnit - 1) / kUnit * kUnit; }
  void give_back() {
    for (const auto& [bytes, data] : waiting_) of_->release(data, bytes);
    waiting_.clear();
  }

  static constexpr uint64_t kUnit = 2 << 20;  // a page of a GPU
  std::shared_ptr<Memory> of_;
  std::mutex mutex_;
  std::multimap<uint64_t, void*> waiting_;
};

}  // namespace kiln
