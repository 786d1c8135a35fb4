#include "caches/caches.h"

#include <optional>

#include "caches/snapshot_state.h"
#include "model/turn.h"

namespace kiln {

namespace {

Tensor part(const Tensor& of, uint64_t offset, uint64_t bytes) {
  return Tensor::over(static_cast<char*>(of.data()) + offset, of.device, Scalar::U8, {static_cast<int64_t>(bytes)});
}

}  // namespace

void Caches::needs_history() const {
  if (pretended) fail("the session was moved for a measurement (pretend): nobody knows what its caches hold; reset() it first");
}

std::vector<int64_t> Caches::tokens() const {
  needs_history();
  return {lineage.ids().begin(), lineage.ids().begin() + position};
}

uint64_t Caches::kept_bytes(bool whole) const {
  uint64_t total = 0;
  for (bool forgetful : {true, false})
    if (forgetful || whole) pieces(position, forgetful, [&](const KvSpec&, const Tensor&, uint64_t, uint64_t bytes) { total += bytes; });
  return total;
}

bool Caches::can_restore(const Snapshot& snapshot, bool from_others) const {
  const Snapshot::State& from = snapshot.state();
  if (from.model != model) return false;
  if (from.whole || (!pretended && lineage.holds(from.mark))) return true;
  const std::shared_ptr<Caches> source = from_others ? from.source.lock() : nullptr;
  if (!source || source.get() == this) return false;
  std::optional<Turn> turn;
  try {
    if (source->taken != taken) turn.emplace(*source->taken, *source->line);
  } catch (const Error&) {  // it is in use
    return false;
  }
  return !source->pretended && source->lineage.holds(from.mark);
}

bool Caches::stands_at(const Snapshot& snapshot) const {
  const Mark& there = snapshot.state().mark;
  return snapshot.state().model == model && !pretended && position == there.position && lineage.holds(there);
}

std::unique_ptr<Snapshot::State> Caches::keep(const SnapshotOptions& options, std::weak_ptr<Caches> self) const {
  needs_history();
  auto state = std::make_unique<Snapshot::State>();
  state->copies = shared.backend->keep(kept_bytes(options.whole), options.host, options.memory);
  uint64_t at = 0;
  auto copy = [&](const KvSpec&, const Tensor& cache, uint64_t offset, uint64_t bytes) {
    line->copy(part(state->copies, at, bytes), part(cache, offset, bytes));
    at += bytes;
  };
  pieces(position, true, copy);
  if (options.whole) pieces(position, false, copy);
  state->model = model;
  state->past = lineage.until(position);
  state->mark = lineage.mark(position);
  state->written = written;
  state->whole = options.whole;
  state->source = std::move(self);
  return state;
}

void Caches::restore(const Snapshot& snapshot) {
  const Snapshot::State& from = snapshot.state();
  if (from.model != model) fail("the snapshot is of another model: load the artifact once, and open sessions over that");
  const int64_t to = from.mark.position;
  const bool shares = !pretended && lineage.holds(from.mark);
  std::shared_ptr<Caches> source = shares || from.whole ? nullptr : from.source.lock();
  std::optional<Turn> turn;  // of the session that has the caches by position
  if (!shares && !from.whole) {
    if (source && source->taken != taken) turn.emplace(*source->taken, *source->line);
    if (!source || source.get() == this || source->pretended || !source->lineage.holds(from.mark))
      fail("the session that the snapshot was taken from ", source ? "has overwritten" : "is gone, and with it", " what lay below position ", to,
           "; a snapshot that is to outlive that is taken whole");
    source->line->synchronize();
  }
  uint64_t at = 0;
  auto copy = [&](const KvSpec&, const Tensor& cache, uint64_t offset, uint64_t bytes) {
    line->copy(part(cache, offset, bytes), part(from.copies, at, bytes));
    at += bytes;
  };
  pieces(to, true, copy);
  if (!shares && from.whole) pieces(to, false, copy);
  if (source)
    pieces(to, false, [&](const KvSpec& k, const Tensor& cache, uint64_t offset, uint64_t bytes) {
      line->copy(part(cache, offset, bytes), part(source->kv.at(k.name), offset, bytes));
    });
  line->synchronize();  // the snapshot and the other session may go now
  if (!shares) lineage = from.past, pretended = false;
  position = to, written = from.written;
}

int64_t Caches::earliest() const {
  int64_t found = 0;
  for (const KvSpec& k : shared.artifact.kv)
    if (const Slots layout(k, shared.artifact.max_seq_len); k.forgets())
      found = std::max(found, !k.ring ? position.load() : written <= layout.slots ? 0 : written - layout.slots + k.window - 1);
  return std::min(found, position.load());
}

void Caches::rewind(int64_t to) {
  needs_history();
  if (to < 0 || to > position) fail("rewind to ", to, ": the session is at position ", position);
  if (to != 0 && to < earliest())
    fail("rewind to ", to, " from ", position, ": its rings and states have lost what lay before position ", earliest(), "; take a snapshot where it is to come back to, or begin at 0");
  if (to == 0) written = 0;  // nothing of the caches is needed
  position = to;
}

}  // namespace kiln
