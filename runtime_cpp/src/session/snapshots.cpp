// What a session leaves and goes on from: snapshots, a file, an earlier position.
#include "caches/saved.h"
#include "session/session_impl.h"

namespace kiln {

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

void Session::Impl::save(const std::string& path) { kiln::save(*snapshot({/*whole=*/true, /*host=*/true}, {}), path); }

void Session::Impl::load(const std::string& path) { restore(Snapshot(load_saved(model, path))); }

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
bool Session::can_restore(const Snapshot& snapshot, bool from_others) const {
  Turn turn(impl_->busy, *impl_->timeline);
  return impl_->can_restore(snapshot, from_others);
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
void Session::save(const std::string& path) const {
  Turn turn(impl_->busy, *impl_->timeline);
  impl_->save(path);
}
void Session::load(const std::string& path) {
  Turn turn(impl_->busy, *impl_->timeline);
  impl_->load(path);
}

}  // namespace kiln
