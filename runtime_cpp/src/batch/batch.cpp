#include "kiln/batch.h"

#include <chrono>

#include "batch/batch_impl.h"
#include "caches/snapshot_state.h"
#include "model/turn.h"

namespace kiln {

namespace {

using Clock = std::chrono::steady_clock;

constexpr char kInUse[] = "the batch is in use by another thread";

}  // namespace

Batch::Batch(std::shared_ptr<const Model> model, const BatchOptions& options) : impl_(std::make_shared<Impl>(std::move(model), options)) {}
Batch::~Batch() = default;

int64_t Batch::join(const Request& request) {
  Turn turn(impl_->busy, *impl_->timeline, kInUse);
  return impl_->join(request);
}
std::vector<RowEvent> Batch::step() {
  Turn turn(impl_->busy, *impl_->timeline, kInUse);
  return impl_->step();
}
int64_t Batch::early_launches() const { return impl_->timeline->early_launches(); }
void Batch::leave(int64_t handle) {
  Turn turn(impl_->busy, *impl_->timeline, kInUse);
  impl_->rows->of(handle).end();
}
void Batch::extend(int64_t handle, const std::vector<int64_t>& tokens, bool by_steps) {
  Turn turn(impl_->busy, *impl_->timeline, kInUse);
  impl_->extend(impl_->rows->of(handle), tokens, by_steps);
}
BatchRow Batch::row(int64_t number) const {
  impl_->rows->at(number);
  return {impl_, number};
}
int64_t Batch::rows() const { return impl_->options.rows; }
int64_t Batch::active() const {
  Turn turn(impl_->busy, *impl_->timeline, kInUse);
  return static_cast<int64_t>(impl_->rows->in_order(&Row::used).size());
}
int64_t Batch::position(int64_t handle) const {
  Turn turn(impl_->busy, *impl_->timeline, kInUse);
  return impl_->rows->of(handle).position;
}
DraftCounts Batch::draft_counts() const {
  Turn turn(impl_->busy, *impl_->timeline, kInUse);
  return impl_->drafts->counts();
}
const std::vector<float>& Batch::logits(int64_t handle) const {
  Turn turn(impl_->busy, *impl_->timeline, kInUse);
  for (const Row& row : *impl_->rows) {
    if (row.handle != handle) continue;
    if (!impl_->options.keep_logits && !row.request.keep_logits) fail("logits are kept only for a timeline or by a batch that is made with keep_logits");
    if (row.logits.empty()) fail("no logits: nothing was sampled for timeline ", handle);
    return row.logits;
  }
  fail("timeline ", handle, " is in no row: another has joined in its place, or it never was");
}

std::vector<Session::CacheMemory> Batch::cache_memory() const {
  std::vector<Session::CacheMemory> found;
  for (const auto& [name, cache] : impl_->entries->caches()) found.push_back({name, cache.data(), cache.bytes()});
  return found;
}

MemoryReport Batch::memory() const {
  const Impl& b = *impl_;
  Turn turn(b.busy, *b.timeline, kInUse);
  MemoryReport report;
  b.shared.count(&report);
  for (const KvSpec& k : b.shared.artifact.kv) (k.ring ? report.kv_ring : k.state ? report.kv_state : report.kv_global) += k.bytes * static_cast<uint64_t>(b.entries->made());
  b.timeline->measure(report);
  return report;
}

BatchProbe Batch::probe(const std::vector<int64_t>& tokens, const std::vector<int64_t>& positions, const std::vector<int64_t>& numbers,
                        const std::vector<Sampling>& sampling, int64_t times) {
  Turn turn(impl_->busy, *impl_->timeline, kInUse);
  Rows& rows = *impl_->rows;
  Entries& entries = *impl_->entries;
  const Model::Impl& shared = impl_->shared;
  if (!rows.in_order(&Row::used).empty()) fail("probe() while timelines are in the batch: it writes over what they have read");
  const auto m = static_cast<int64_t>(tokens.size());
  if (!entries.takes(m)) fail("probe() of ", m, " tokens: the artifact has no step of as many");
  if (positions.size() != tokens.size() || numbers.size() != tokens.size() || sampling.size() != tokens.size() || times < 1)
    fail("probe() of ", m, " tokens: ", positions.size(), " positions, ", numbers.size(), " rows, ", sampling.size(), " samplings, ", times, " times");
  std::vector<Entries::Place> places;
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (tokens[i] < 0 || tokens[i] >= shared.vocab_size || positions[i] < 0 || positions[i] >= shared.artifact.max_seq_len || numbers[i] < 0 ||
        numbers[i] >= rows.size())
      fail("probe(): token ", tokens[i], " at position ", positions[i], " of row ", numbers[i], " is outside of the artifact");
    check_sampling(sampling[i]);
    places.push_back({tokens[i], positions[i], numbers[i], sampling[i]});
  }
  impl_->forget_ahead();
  for (Row& row : rows) row.clear();  // what it held is written over
  Entries::Step& step = entries.step(m, numbers[0]);
  entries.write(step, places);
  impl_->timeline->synchronize();
  const auto began = Clock::now();
  for (int64_t i = 0; i < times; ++i) entries.run(step);
  impl_->timeline->synchronize();
  BatchProbe found;
  found.seconds = std::chrono::duration<double>(Clock::now() - began).count();
  found.tokens.resize(tokens.size()), found.logits.resize(tokens.size() * static_cast<size_t>(shared.vocab_size));
  impl_->timeline->read(found.tokens.data(), step.out.token);
  impl_->timeline->read(found.logits.data(), step.out.logits);
  return found;
}

const Model& BatchRow::model() const { return *batch_->model; }
int64_t BatchRow::position() const { return (*batch_->rows)[number_].position; }

// Runs f(row) as a call of the batch; `free`: only while no timeline is in it.
template <typename F>
static auto with_row(Batch::Impl& batch, int64_t number, bool free, F&& f) {
  Turn turn(batch.busy, *batch.timeline, kInUse);
  Row& row = (*batch.rows)[number];
  if (free && row.used()) fail("row ", number, " is in use by timeline ", row.handle);
  return f(row);
}

std::vector<int64_t> BatchRow::tokens() const {
  return with_row(*batch_, number_, false, [](const Row& row) { return row.tokens(); });
}
std::shared_ptr<const Snapshot> BatchRow::snapshot(const SnapshotOptions& options) const {
  return with_row(*batch_, number_, false, [&](Row& row) {
    std::unique_ptr<Snapshot::State> state = row.keep(options, std::shared_ptr<Caches>(batch_, &row));
    batch_->timeline->synchronize();
    return std::make_shared<const Snapshot>(std::move(state));
  });
}
uint64_t BatchRow::snapshot_bytes(bool whole) const {
  return with_row(*batch_, number_, false, [&](const Row& row) { return row.kept_bytes(whole); });
}
void BatchRow::restore(const Snapshot& snapshot) {
  with_row(*batch_, number_, true, [&](Row& row) { row.restore(snapshot); });
}
bool BatchRow::can_restore(const Snapshot& snapshot, bool from_others) const {
  return with_row(*batch_, number_, false, [&](const Row& row) { return row.can_restore(snapshot, from_others); });
}
bool BatchRow::stands_at(const Snapshot& snapshot) const {
  return with_row(*batch_, number_, false, [&](const Row& row) { return row.stands_at(snapshot); });
}
void BatchRow::rewind(int64_t position) {
  with_row(*batch_, number_, true, [&](Row& row) { row.rewind(position); });
}
int64_t BatchRow::earliest() const {
  return with_row(*batch_, number_, false, [](const Row& row) { return row.earliest(); });
}

}  // namespace kiln
