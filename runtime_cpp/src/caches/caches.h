#pragma once
#include <algorithm>
#include <atomic>
#include <memory>

#include "model/compiled_model.h"
#include "kiln/snapshot.h"
#include "model/backend.h"
#include "caches/lineage.h"
#include "model/model_impl.h"
#include "caches/slots.h"

namespace kiln {

// The caches of one timeline and what they hold: a session's, or those of a row of a batch.
struct Caches {
  explicit Caches(std::shared_ptr<const Model> m) : model(std::move(m)), shared(model->impl()) {}

  // Tokens at `position` are in the caches from here on.
  void wrote(const int64_t* tokens, int64_t n) {
    if (!pretended) lineage.write(position, tokens, n);
    position += n;
    written = std::max<int64_t>(written, position);
  }
  void needs_history() const;
  int64_t earliest() const;
  void rewind(int64_t to);
  bool stands_at(const Snapshot& snapshot) const;
  bool can_restore(const Snapshot& snapshot, bool from_others) const;
  uint64_t kept_bytes(bool whole) const;
  // A snapshot's state but for the token that is next; the copies may be under way. self: who has what is not copied.
  std::unique_ptr<Snapshot::State> keep(const SnapshotOptions& options, std::weak_ptr<Caches> self) const;
  // The caches become those of the snapshot. Error, and nothing changes, where that cannot be.
  void restore(const Snapshot& snapshot);
  std::vector<int64_t> tokens() const;

  // f(spec, cache, offset, bytes) for what goes into a copy of the caches at `at`: of those that forget their past, or of those that do not.
  template <typename F>
  void pieces(int64_t at, bool forgetful, F&& f) const {
    for (const KvSpec& k : shared.artifact.kv)
      if (k.forgets() == forgetful)
        Slots(k, shared.artifact.max_seq_len).pieces(at, [&](uint64_t offset, uint64_t bytes) { f(k, kv.at(k.name), offset, bytes); });
  }

  std::shared_ptr<const Model> model;
  const Model::Impl& shared;
  Timeline* line = nullptr;             // whose work the caches' is in order with
  std::atomic<bool>* taken = nullptr;   // by a call, of the session or the batch that they are of
  TensorMap kv;                         // by fully qualified name
  std::atomic<int64_t> position{0};     // tokens in the caches
  Lineage lineage;                      // of the caches by position, which may reach further than `position`
  int64_t written = 0;                  // positions below it have been written to the rings as they are now
  bool pretended = false;               // Session::pretend: nobody knows what the caches hold
};

}  // namespace kiln
