#include "caches/snapshot_state.h"

namespace kiln {

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
std::shared_ptr<const Snapshot> Snapshot::to_host(std::shared_ptr<Memory> memory) const {
  if (!on_device()) fail("the snapshot's copies are the host's already");
  auto moved = std::make_unique<State>(*state_);
  moved->copies = state_->model->impl().backend->to_host(state_->copies, std::move(memory));
  return std::make_shared<const Snapshot>(std::move(moved));
}

}  // namespace kiln
