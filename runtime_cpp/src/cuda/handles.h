#pragma once
#include "cuda/driver.h"

namespace kiln::cuda {

// A stream and events of the context that is current when they are made.
struct OwnStream {
  OwnStream() {
    Among others;
    driver().check(driver().stream_create(&stream, kNonBlocking), "cannot make a stream");
  }
  ~OwnStream() {
    Among others;
    driver().stream_destroy(stream);
  }
  OwnStream(const OwnStream&) = delete;
  OwnStream& operator=(const OwnStream&) = delete;
  Stream stream = nullptr;
};

struct OwnEvent {
  OwnEvent() {
    Among others;
    driver().check(driver().event_create(&event, kDisableTiming), "cannot make an event");
  }
  ~OwnEvent() {
    Among others;
    driver().event_destroy(event);
  }
  OwnEvent(const OwnEvent&) = delete;
  OwnEvent& operator=(const OwnEvent&) = delete;
  Event event = nullptr;
};

}  // namespace kiln::cuda
