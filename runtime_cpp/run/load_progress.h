#pragma once
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <string>

namespace kiln {

// Weights on their way to the device, for LoadOptions::progress: bytes, seconds, rate on stderr. On a terminal a line that rewrites
// itself; anywhere else nothing until succeeded(), so that a failure stays the only line.
class LoadProgress {
 public:
  void operator()(uint64_t done, uint64_t total) {
    auto now = Clock::now();
    if (done == 0) start_ = now;
    done_ = done, seconds_ = std::chrono::duration<double>(now - start_).count();
    if (terminal_ && now - shown_ > std::chrono::milliseconds(100)) {
      std::fprintf(stderr, "\r\x1b[Kweights: %.2f of %.2f GB%s", gb(done), gb(total), rate().c_str());
      shown_ = now, open_ = true;
    }
  }
  void loaded() {
    if (terminal_) last_line();
  }
  void succeeded() {
    if (!terminal_) last_line();
  }
  ~LoadProgress() {
    if (open_) std::fputc('\n', stderr);  // the load failed: its message gets a line of its own
  }

 private:
  using Clock = std::chrono::steady_clock;
  void last_line() {
    if (done_ == 0) return;  // quiet, or a model without weights
    std::fprintf(stderr, "%sweights: %.3f GB in %.2f s%s\n", open_ ? "\r\x1b[K" : "", gb(done_), seconds_, rate().c_str());
    open_ = false;
  }
  static double gb(uint64_t bytes) { return static_cast<double>(bytes) / 1e9; }
  std::string rate() const {
    char text[32] = "";
    if (seconds_ > 0) std::snprintf(text, sizeof text, ", %.2f GB/s", gb(done_) / seconds_);
    return text;
  }

  const bool terminal_ = isatty(STDERR_FILENO) != 0;
  bool open_ = false;  // the cursor stands behind an unfinished line
  Clock::time_point start_ = Clock::now(), shown_;
  uint64_t done_ = 0;
  double seconds_ = 0;
};

}  // namespace kiln
