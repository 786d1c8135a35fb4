#pragma once
#include <map>
#include <mutex>

#include "compiled/tensor.h"
#include "kiln/artifact.h"
#include "kiln/error.h"

namespace kiln {

// Held by a session or a batch. A decode kernel whose thread blocks wait for each other needs all of them on the GPU at once: of two such
// steps side by side each may hold multiprocessors that the other waits for. So one of a process has such a kernel on a device.
class Alone {
 public:
  Alone(const TargetSpec& target, Device device) : taken_(target.blocks_at_once > 0), device_(device.str()) {
    if (!taken_) return;
    std::lock_guard lock(mutex());
    if (holders()[device_]++) {
      --holders()[device_];
      fail("another session or batch has ", device_, " with a decode kernel that keeps all of it (--decode-kernel chain); play one at a time, "
           "the rows of one batch, or export with --decode-kernel graph");
    }
  }
  ~Alone() {
    if (!taken_) return;
    std::lock_guard lock(mutex());
    --holders()[device_];
  }
  Alone(const Alone&) = delete;
  Alone& operator=(const Alone&) = delete;

 private:
  static std::mutex& mutex() {
    static std::mutex one;
    return one;
  }
  static std::map<std::string, int>& holders() {
    static std::map<std::string, int> all;
    return all;
  }
  bool taken_;
  std::string device_;
};

}  // namespace kiln
