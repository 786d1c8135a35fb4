#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace kiln {

// Names what the caches of a session hold below a position, bit for bit: two marks of any sessions are equal only where that is.
struct Mark {
  int64_t position = 0;
  uint64_t stamp = 0;  // of the run of writes that reached the position; 0: nothing was written
};

// What a session's caches by position hold: the token of each position, and which run of writes put it there. A run ends where a position is
// written again: what follows it has another past.
class Lineage {
 public:
  int64_t filled() const { return static_cast<int64_t>(ids_.size()); }
  const std::vector<int64_t>& ids() const { return ids_; }

  // Positions [at, at + n) are written now, and nothing behind them counts any more; at <= filled().
  void write(int64_t at, const int64_t* tokens, int64_t n) {
    if (at < filled()) cut(at);
    if (closed_ || runs_.empty()) runs_.push_back({at, next_stamp()}), closed_ = false;
    ids_.insert(ids_.end(), tokens, tokens + n);
  }
  // The device fed the token before the host knew it.
  void name(int64_t at, int64_t token) { ids_[static_cast<size_t>(at)] = token; }
  void cut(int64_t at) {
    if (at < filled()) ids_.resize(static_cast<size_t>(at));
    while (!runs_.empty() && runs_.back().start >= at) runs_.pop_back();
    closed_ = true;
  }

  // position <= filled().
  Mark mark(int64_t position) const {
    for (auto run = runs_.rbegin(); run != runs_.rend(); ++run)
      if (run->start < position) return {position, run->stamp};
    return {};
  }
  bool holds(const Mark& m) const { return m.position <= filled() && mark(m.position).stamp == m.stamp; }
  // What lies below a position, as a copy of the caches has it.
  Lineage until(int64_t position) const {
    Lineage past = *this;
    past.cut(position);
    return past;
  }

 private:
  struct Run {
    int64_t start;
    uint64_t stamp;
  };
  static uint64_t next_stamp() {
    static std::atomic<uint64_t> made{0};
    return ++made;
  }

  std::vector<int64_t> ids_;
  std::vector<Run> runs_;  // by start; a run reaches to the next one's
  bool closed_ = false;     // the last run ends here: what was or will be written behind it elsewhere is another's
};

}  // namespace kiln
