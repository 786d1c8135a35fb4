#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kiln/model.h"

namespace kiln {

struct Sampling {
  float temperature = 0;  // 0: greedy
  int32_t top_k = 0;      // 0: off
  float top_p = 1;        // 1: off
  int64_t seed = 0;
};

void check_sampling(const Sampling& sampling);  // Error on values out of range

struct SessionOptions {
  int64_t prefill_chunk = 0;  // tokens of one prefill call, 1 .. the artifact's; 0: the artifact's
  bool graph = true;          // on a GPU: replay the decode step as a CUDA graph
  bool early_launch = true;   // in that graph, let kernels the artifact names start while the one before them ends
  // The end of what is read that one step of several tokens takes instead of a prefill call, in tokens, at most; 0: as many as the largest step
  // takes on a GPU, where it costs a quarter of the call, and 1 on a CPU, where it costs more.
  int64_t read_by_step = 0;
};

class Drafter;  // kiln/draft.h

// Where generate() gets drafts: tokens that the model may write next, which one step then checks together. They change no text, only its speed.
// Ngram: what followed where the end of the text occurred before. Mtp: by the model that was exported with this one to draft for it.
enum class DraftSource { Off, Ngram, Mtp };

DraftSource draft_source(const std::string& name);  // "ngram", "mtp", "off"; Error for another

struct Drafting {
  DraftSource source = DraftSource::Off;
  int64_t length = 0;                    // most drafts of a step; 0: as many as the artifact's largest step takes beside its one token
  // For measurements: drafts by this one instead, as many as it has, whatever they cost. Its text begins with the token that generate() hands out first.
  std::shared_ptr<Drafter> own = {};
  // For measurements: as many drafts a step as there may be, whatever they cost.
  bool fixed = false;
};

// Of a generate() with drafts.
struct DraftCounts {
  int64_t steps = 0, tokens = 0;        // of the model, those of one token too; what they gave
  std::vector<int64_t> tried, right;    // of each place of a draft; a place behind a wrong one is not tried
};

// What the artifact's drafter would draft now.
struct DraftProbe {
  std::vector<int64_t> tokens;
  std::vector<float> logits, hidden;  // [tokens, vocab_size]; [tokens, D], each the next one's
  double seconds = 0;                 // of the same drafts once more, rows unread
};

enum class Stop { Eog, Length, MaxSeqLen, Callback };
const char* stop_name(Stop stop);  // "eog", "length", "max_seq_len", "callback"

struct MemoryReport {  // bytes
  uint64_t weights = 0;       // on the device
  uint64_t host_weights = 0;  // GPU, not in total(): in pinned memory of the host
  uint64_t kv_ring = 0, kv_global = 0, kv_state = 0;
  uint64_t activations = 0;  // the most that this session's model calls took at any time; GPU: the memory kept for them
  uint64_t graph = 0;        // GPU: the same of the decode step, once it is a graph
  uint64_t other = 0;        // GPU: inputs and the workspace of matmuls. CPU: the process's anonymous memory less all of these
  uint64_t outside = 0;      // GPU, not in total(): in use beside all this, by other sessions, CUDA's context, loaded code and other processes
  uint64_t kv() const { return kv_ring + kv_global + kv_state; }
  uint64_t total() const { return weights + kv() + activations + graph + other; }
};

class Memory;
class Snapshot;

struct SnapshotOptions {
  bool whole = false;  // with everything that another session, or this one once it has overwritten its past, needs to go on from it
  bool host = false;   // its copies in pinned memory of the host
  std::shared_ptr<Memory> memory = {};  // of a SnapshotStore: where its copies lie
};

// What a snapshot is taken of and gone back to: a session, or a row of a batch.
class Resumable {
 public:
  virtual ~Resumable() = default;
  virtual const Model& model() const = 0;
  virtual int64_t position() const = 0;              // tokens in the caches; at any time
  virtual std::vector<int64_t> tokens() const = 0;   // [position()], those in the caches
  // As it stands. What goes on from it later equals, bit for bit, what would have gone on now. Bits depend on the tokens and on where the pieces
  // ended in which they were read, so a run from position 0 equals it where its pieces end there too.
  virtual std::shared_ptr<const Snapshot> snapshot(const SnapshotOptions& options = {}) const = 0;
  virtual uint64_t snapshot_bytes(bool whole = false) const = 0;  // of the copies that a snapshot taken now would have
  // Goes on from a snapshot of this one or of another one over the same model. Error, and nothing changes, where the caches that it shares by
  // position have been overwritten here, and are not to be had from what it was taken from.
  virtual void restore(const Snapshot& snapshot) = 0;
  // from_others: with the help of the caches that it was taken of, while they hold what they held.
  virtual bool can_restore(const Snapshot& snapshot, bool from_others = false) const = 0;
  virtual bool stands_at(const Snapshot& snapshot) const = 0;    // position and caches are the snapshot's
  // Forgets the tokens from `position` on. Legal are 0 and earliest() .. position(): a ring has lost what was overwritten. The next token must be given.
  virtual void rewind(int64_t position) = 0;
  virtual int64_t earliest() const = 0;
};

// One timeline over a model: its own KV caches and position; several sessions never share state. A second call at the same time, from another
// thread or from inside a callback, is an Error; position(), cache_memory() and early_launches() may be asked at any time.
class Session final : public Resumable {
 public:
  // Throws Error when the compiled models and the manifest disagree or the KV caches do not fit into the device's memory.
  explicit Session(std::shared_ptr<const Model> model, const SessionOptions& options = {});
  ~Session() override;

  // Appends `tokens` at position() and returns the token sampled after them. Throws Error, before any work, when they are
  // not token ids or do not fit into max_seq_len.
  int64_t prefill(const std::vector<int64_t>& tokens);

  // Feeds the token sampled last (or `token`) at position() and returns the next one.
  int64_t decode();
  int64_t decode(int64_t token);

  // Hands the sampled token and up to max_new_tokens - 1 further ones to `on_token`, until it returns false, an end-of-generation
  // token (which is not handed out) when stop_at_eog, or max_seq_len. The token handed out last is not in the caches yet.
  Stop generate(int64_t max_new_tokens, const std::function<bool(int64_t)>& on_token, bool stop_at_eog = true);

  int64_t position() const override;
  void reset();              // empties the caches: position 0
  std::vector<int64_t> tokens() const override;

  std::shared_ptr<const Snapshot> snapshot(const SnapshotOptions& options = {}) const override;
  uint64_t snapshot_bytes(bool whole = false) const override;
  void restore(const Snapshot& snapshot) override;
  bool can_restore(const Snapshot& snapshot, bool from_others = false) const override;
  bool stands_at(const Snapshot& snapshot) const override;
  void rewind(int64_t position) override;
  int64_t earliest() const override;

  // The filled part of the caches and all else that snapshot() has, with checksums; the file appears whole or not at all.
  void save(const std::string& path) const;
  // Goes on from a saved session. Error, and nothing changes, where the file is damaged, or of another artifact, target or weights.
  void load(const std::string& path);

  void set_sampling(const Sampling& sampling);  // Error on values out of range
  // Of every generate() from here on. Error where the artifact has no steps of several tokens, or none that takes so many, or no drafter for Mtp.
  void set_drafts(const Drafting& drafting);
  DraftCounts draft_counts() const;  // of the last generate()
  // For measurements and tests: `count` drafts of the artifact's drafter behind `token`, or behind the one sampled last. Error where the session has
  // not computed the token before it: at position 0, and behind restore() and rewind().
  DraftProbe probe_drafts(int64_t count, std::optional<int64_t> token = {});

  // Logits [vocab_size] of the last position. Error before the first prefill, and after a generate() on a GPU that stopped
  // with a step in flight, unless a sink is set.
  const std::vector<float>& logits();
  // Called with every logits row as it is computed: one per prefill chunk and decode step. Steps then run one by one. Where it throws, the call
  // ends and the session stands where it stood: before prefill(), before the step. (on_token of generate(): that token has been handed out.)
  void set_logits_sink(std::function<void(const std::vector<float>&)> sink);
  // Called between the chunks of prefill() and the steps of generate(). Where it throws, the call ends and the session stands behind the chunk or
  // step that ran last: position() tokens are in the caches, and the token sampled after them is next.
  void set_look(std::function<void()> look);

  // For measurements. Where each cache lies on the device, by name: what a session computes next is of what is written there.
  struct CacheMemory {
    std::string name;
    void* data;
    uint64_t bytes;
  };
  std::vector<CacheMemory> cache_memory() const;
  // Goes on at `position` with token 0, over the caches as they are. Error when it is beyond max_seq_len.
  void pretend(int64_t position);

  MemoryReport memory() const;
  int64_t early_launches() const;  // kernels of the decode graph that start early
  const Model& model() const override;

  struct Impl;

 private:
  std::shared_ptr<Impl> impl_;
};

}  // namespace kiln
