#pragma once
#include <atomic>

#include "kiln/error.h"
#include "model/backend.h"

namespace kiln {

// What every call of a session or a batch runs under: it alone, on its device. Error with `busy_text` where another call runs.
class Turn {
 public:
  Turn(std::atomic<bool>& busy, Timeline& timeline, const char* busy_text = kSessionInUse) : busy_(busy), timeline_(timeline) {
    if (busy_.exchange(true)) fail(busy_text);
    try {
      timeline_.enter();
    } catch (...) {
      busy_ = false;
      throw;
    }
  }
  ~Turn() {
    timeline_.leave();
    busy_ = false;
  }
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;

 private:
  static constexpr const char* kSessionInUse =
      "the session is in use: by another thread, or this is a call from inside its own callback; give each thread a session of its own";

  std::atomic<bool>& busy_;
  Timeline& timeline_;
};

}  // namespace kiln
