#pragma once
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kiln/session.h"
#include "kiln/snapshot.h"

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
  int64_t read_by_step = 0;                // as SessionOptions
  // A step is queued before step() returns what the one before it sampled, so that the device does not wait for who looks at that. Not for
  // timelines that draft or keep logits, and not while prompts wait; what became of a timeline meanwhile makes its token void.
  bool run_ahead = false;
};

struct Request {
  std::vector<int64_t> prompt;
  Sampling sampling;
  int64_t max_new_tokens = 0;  // 0: as many as fit
  bool stop_at_eog = true;
  Drafting drafting = {};      // what its tokens are drafted by; `own` is no row's
  // A free row with whose tokens the prompt begins, one of the prompt at least being left: what the row holds is not read again. -1: any row, emptied.
  int64_t row = -1;
  bool keep_logits = false;  // for logits(), as the batch's option for all
};

// What a step did for one timeline. Where drafts were right a timeline has several, in order.
struct RowEvent {
  int64_t handle = 0;
  int64_t token = -1;        // sampled; -1: none
  std::optional<Stop> stop;  // it has ended, and its row is free: the row keeps what it holds until a timeline joins there
  std::string error;         // why it has ended, where nothing can be sampled
};

// A row of a batch, for what lies between two timelines in it. It holds what the last one left, and the next may go on from there. restore() and
// rewind() are an Error while a timeline is in it. A row's snapshot has no next token.
class BatchRow;

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
  // Reads a chunk of a prompt, of those that wait by turns, then takes one token of every timeline whose prompt is read. Where it throws, no timeline
  // has moved but for chunks that were read. Drafts of all timelines share what room the step has.
  std::vector<RowEvent> step();
  void leave(int64_t handle);  // Error for a timeline that has ended or left; its row keeps what it holds
  // `tokens` come next in the place of the token sampled last, which does not count: another choice, what must come, or more of a prompt. They are
  // read as a prompt is, or by_steps: one a step, as sampled tokens are. Error, and nothing changes, where tokens of its prompt are still to be read, or
  // as join().
  void extend(int64_t handle, const std::vector<int64_t>& tokens, bool by_steps);

  DraftCounts draft_counts() const;  // of all steps of timelines whose tokens are drafted, those that have ended too
  int64_t rows() const;    // timelines that it takes
  int64_t active() const;  // timelines in it
  int64_t position(int64_t handle) const;  // tokens in its caches
  BatchRow row(int64_t number) const;      // 0 .. rows() - 1; it keeps the batch's caches alive
  // Logits [vocab_size] that the timeline's last token was sampled from; with keep_logits. Of one that has ended, too, until another joins in its row.
  const std::vector<float>& logits(int64_t handle) const;
  MemoryReport memory() const;
  // For measurements and tests: a step of `tokens` at `positions` of `rows`, whatever the caches hold, `times` over and queued one behind the
  // other. Error where the artifact has no step of as many tokens, or a timeline is in the batch.
  BatchProbe probe(const std::vector<int64_t>& tokens, const std::vector<int64_t>& positions, const std::vector<int64_t>& rows,
                   const std::vector<Sampling>& sampling, int64_t times = 1);
  int64_t early_launches() const;  // kernels of a step of one token that start early
  std::vector<Session::CacheMemory> cache_memory() const;  // for measurements: those of all rows, one row's behind the other's

  struct Impl;

 private:
  std::shared_ptr<Impl> impl_;
};

class BatchRow final : public Resumable {
 public:
  BatchRow(std::shared_ptr<Batch::Impl> batch, int64_t number) : batch_(std::move(batch)), number_(number) {}
  int64_t number() const { return number_; }
  const Model& model() const override;
  int64_t position() const override;
  std::vector<int64_t> tokens() const override;
  std::shared_ptr<const Snapshot> snapshot(const SnapshotOptions& options = {}) const override;
  uint64_t snapshot_bytes(bool whole = false) const override;
  void restore(const Snapshot& snapshot) override;
  bool can_restore(const Snapshot& snapshot, bool from_others = false) const override;
  bool stands_at(const Snapshot& snapshot) const override;
  void rewind(int64_t position) override;
  int64_t earliest() const override;

 private:
  std::shared_ptr<Batch::Impl> batch_;
  int64_t number_;
};

}  // namespace kiln
