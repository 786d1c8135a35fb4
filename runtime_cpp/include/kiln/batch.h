#pragma once
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kiln/session.h"

namespace kiln {

struct BatchOptions {
  // Timelines at once, 1 .. those of the artifact; 0: the artifact's. Fewer take less memory where the artifact has no steps of several tokens.
  int64_t rows = 0;
  int64_t prefill_chunk = 0;  // as SessionOptions
  // How long prompts may keep those waiting that are written already, in milliseconds. At least one chunk is read between two steps: what bounds
  // the wait below a chunk's time is a shorter chunk.
  double max_gap_ms = 0;
  bool keep_logits = false;   // for logits()
  bool graph = true, early_launch = true;  // as SessionOptions
};

struct Request {
  std::vector<int64_t> prompt;
  Sampling sampling;
  int64_t max_new_tokens = 0;  // 0: as many as fit
  bool stop_at_eog = true;
  Drafting drafting = {};      // what its tokens are drafted by; `own` is no row's
};

// What a step did for one timeline. Where drafts were right a timeline has several, in order.
struct RowEvent {
  int64_t handle = 0;
  int64_t token = -1;        // sampled; -1: none
  std::optional<Stop> stop;  // it has ended, and its row is free
  std::string error;         // why it has ended, where nothing can be sampled
};

// Of a step as it was given.
struct BatchProbe {
  std::vector<int64_t> tokens;  // sampled
  std::vector<float> logits;    // [tokens, vocab_size]
  double seconds = 0;           // of all its repeats
};

// Several timelines over one model, each with its own prompt, sampling, seed and end. Those whose prompts are read take their tokens in the same
// steps. A timeline's tokens are those that it would have alone, bit for bit, whatever the others do. A second call at the same time, from another
// thread, is an Error.
class Batch {
 public:
  // Throws Error as Session's constructor.
  explicit Batch(std::shared_ptr<const Model> model, const BatchOptions& options = {});
  ~Batch();

  // A handle for a new timeline, which begins with the next step. Error, before anything changes, when no row is free, or as Session::prefill().
  int64_t join(const Request& request);
  // Reads a chunk of the prompt that waits longest, then takes one token of every timeline whose prompt is read. Where it throws, no timeline has
  // moved but for chunks that were read. Drafts of all timelines share what room the step has.
  std::vector<RowEvent> step();
  void leave(int64_t handle);  // Error for a timeline that has ended or left

  DraftCounts draft_counts() const;  // of all steps of timelines whose tokens are drafted, those that have ended too
  int64_t rows() const;    // timelines that it takes
  int64_t active() const;  // timelines in it
  int64_t position(int64_t handle) const;  // tokens in its caches
  // Logits [vocab_size] that the timeline's last token was sampled from; with keep_logits.
  const std::vector<float>& logits(int64_t handle) const;
  MemoryReport memory() const;
  // For measurements and tests: a step of `tokens` at `positions` of `rows`, whatever the caches hold, `times` over and queued one behind the
  // other. Error where the artifact has no step of as many tokens, or a timeline is in the batch.
  BatchProbe probe(const std::vector<int64_t>& tokens, const std::vector<int64_t>& positions, const std::vector<int64_t>& rows,
                   const std::vector<Sampling>& sampling, int64_t times = 1);
  int64_t early_launches() const;  // kernels of a step of one token that start early
  std::vector<Session::CacheMemory> cache_memory() const;  // for measurements: those of all rows, one row's behind the other's

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace kiln
