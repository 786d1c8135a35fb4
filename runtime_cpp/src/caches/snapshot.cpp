// Snapshots of a session or of a row of a batch, going on from one, and moving the position back.
#include "session/session_impl.h"
#include "caches/snapshot_state.h"

namespace kiln {

namespace {

Tensor part(const Tensor& of, uint64_t offset, uint64_t bytes) {
  return Tensor::over(static_cast<char*>(of.data()) + offset, of.device, Scalar::U8, {static_cast<int64_t>(bytes)});
}

}  // namespace

Snapshot::Snapshot(std::unique_ptr<const State> state) : state_(std::move(state)) {}
Snapshot::~Snapshot() = default;
int64_t Snapshot::position() const { return state_->mark.position; }
const std::vector<int64_t>& Snapshot::tokens() const { return state_->past.ids(); }
bool Snapshot::whole() const { return state_->whole; }
bool Snapshot::on_device() const { return state_->copies.device.cuda; }
uint64_t Snapshot::device_bytes() const { return on_device() ? state_->copies.bytes() : 0; }
uint64_t Snapshot::host_bytes() const {
  return state_->logits.size() * sizeof(float) + tokens().size() * sizeof(int64_t) + (on_device() ? 0 : state_->copies.bytes());
}
std::shared_ptr<const Snapshot> Snapshot::to_host() const {
  if (!on_device()) fail("the snapshot's copies are the host's already");
  auto moved = std::make_unique<State>(*state_);
  moved->copies = state_->model->impl().backend->to_host(state_->copies);
  return std::make_shared<const Snapshot>(std::move(moved));
}

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

bool Caches::can_restore(const Snapshot& snapshot) const {
  const Snapshot::State& from = snapshot.state();
  return from.model == model && (from.whole || (!pretended && lineage.holds(from.mark)));
}

bool Caches::stands_at(const Snapshot& snapshot) const {
  const Mark& there = snapshot.state().mark;
  return snapshot.state().model == model && !pretended && position == there.position && lineage.holds(there);
}

std::unique_ptr<Snapshot::State> Caches::keep(const SnapshotOptions& options, std::weak_ptr<Caches> self) const {
  needs_history();
  auto state = std::make_unique<Snapshot::State>();
  state->copies = shared.backend->keep(kept_bytes(options.whole), options.host);
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

std::shared_ptr<const Snapshot> Session::Impl::snapshot(const SnapshotOptions& options, std::weak_ptr<Impl> self) {
  std::unique_ptr<Snapshot::State> state = keep(options, std::move(self));
  if (copied || logits.defined()) state->logits = host_logits();
  timeline->synchronize();
  state->next = next, state->handed_out = handed_out;
  return std::make_shared<const Snapshot>(std::move(state));
}

void Session::Impl::restore(const Snapshot& snapshot) {
  Caches::restore(snapshot);
  const Snapshot::State& from = snapshot.state();
  stand_at(position, from.next, from.handed_out, from.logits);
}

// The caches are those of `to` positions; `row`: logits of the last, where somebody has them.
void Session::Impl::stand_at(int64_t to, int64_t next_token, bool was_handed_out, std::vector<float> row) {
  position = to;
  next = next_token, handed_out = was_handed_out;
  forget_step();
  copied = !row.empty();
  logits_copy = std::move(row);
}

void Session::Impl::rewind(int64_t to) {
  if (to == position) return needs_history();
  Caches::rewind(to);
  stand_at(to, -1, false, {});
}

std::shared_ptr<const Snapshot> Session::snapshot(const SnapshotOptions& options) const {
  Turn turn(impl_->busy, *impl_->timeline);
  return impl_->snapshot(options, impl_);
}
uint64_t Session::snapshot_bytes(bool whole) const {
  Turn turn(impl_->busy, *impl_->timeline);
  return impl_->kept_bytes(whole);
}
void Session::restore(const Snapshot& snapshot) {
  Turn turn(impl_->busy, *impl_->timeline);
  impl_->restore(snapshot);
}
bool Session::can_restore(const Snapshot& snapshot) const {
  Turn turn(impl_->busy, *impl_->timeline);
  return impl_->can_restore(snapshot);
}
bool Session::stands_at(const Snapshot& snapshot) const {
  Turn turn(impl_->busy, *impl_->timeline);
  return impl_->stands_at(snapshot);
}
void Session::rewind(int64_t position) {
  Turn turn(impl_->busy, *impl_->timeline);
  impl_->rewind(position);
}
int64_t Session::earliest() const {
  Turn turn(impl_->busy, *impl_->timeline);
  return impl_->earliest();
}
std::vector<int64_t> Session::tokens() const {
  Turn turn(impl_->busy, *impl_->timeline);
  return impl_->tokens();
}

}  // namespace kiln
