#include <algorithm>

#include "caches/recycled.h"
#include "caches/snapshot_state.h"
#include "model/model_impl.h"

namespace kiln {

namespace {

bool begins(const std::vector<int64_t>& ids, const std::vector<int64_t>& with) {
  return with.size() <= ids.size() && std::equal(with.begin(), with.end(), ids.begin());
}

}  // namespace

// Of the conversation that was used least recently, of those that have one there.
SnapshotStore::Entries::iterator SnapshotStore::oldest(bool on_device) {
  auto found = entries_.end();
  auto age = [&](const Entry& e) { return std::pair(conversations_.at(e.conversation), e.used); };
  for (auto e = entries_.begin(); e != entries_.end(); ++e)
    if (e->snapshot->on_device() == on_device && (found == entries_.end() || age(*e) < age(*found))) found = e;
  return found;
}

std::shared_ptr<Memory> SnapshotStore::memory(const Model& model, bool host) {
  if (!model.target().cuda) return nullptr;
  auto& both = memory_[model.device()];
  if (!both[0])
    for (bool on_host : {false, true}) both[on_host] = std::make_shared<Recycled>(model.impl().backend->memory_to_keep(on_host));
  return both[host];
}

void SnapshotStore::drop(Entries::iterator entry) {
  device_.used -= entry->snapshot->device_bytes();
  host_.used -= entry->snapshot->host_bytes();
  const std::string of = std::move(entry->conversation);
  entries_.erase(entry);
  if (std::none_of(entries_.begin(), entries_.end(), [&](const Entry& e) { return e.conversation == of; })) conversations_.erase(of);
}

void SnapshotStore::add(std::shared_ptr<const Snapshot> snapshot, const std::string& conversation, uint64_t used) {
  device_.used += snapshot->device_bytes();
  host_.used += snapshot->host_bytes();
  conversations_.try_emplace(conversation, used);
  entries_.push_back({std::move(snapshot), conversation, used});
}

// False: there is no such room, and nothing was dropped for it.
bool SnapshotStore::make_room(uint64_t device_bytes, uint64_t host_bytes) {
  if (device_bytes > device_.most || host_bytes > host_.most) return false;
  while (!device_.fits(device_bytes)) {
    const auto entry = oldest(true);
    const Entry moved = *entry;
    drop(entry);
    const uint64_t bytes = moved.snapshot->device_bytes() + moved.snapshot->host_bytes();
    if (bytes > host_.most) {
      ++counts_.evicted;
      continue;
    }
    make_room(0, bytes);
    try {
      add(moved.snapshot->to_host(memory(*moved.snapshot->state().model, true)), moved.conversation, moved.used);
      ++counts_.moved;
    } catch (const Error&) {  // the host has less than the budget says
      ++counts_.evicted;
    }
  }
  while (!host_.fits(host_bytes)) {
    auto entry = oldest(false);
    drop(entry == entries_.end() ? oldest(true) : entry);  // ids and logits of what is on the device are the host's
    ++counts_.evicted;
  }
  return true;
}

void SnapshotStore::touch(Entry& entry, const std::string& conversation) {
  const std::string before = std::move(entry.conversation);
  entry.conversation = conversation;
  entry.used = conversations_[conversation] = ++clock_;
  if (std::none_of(entries_.begin(), entries_.end(), [&](const Entry& e) { return e.conversation == before; })) conversations_.erase(before);
}

bool SnapshotStore::take(const Resumable& session, const std::string& conversation, bool whole) {
  std::lock_guard lock(mutex_);
  const uint64_t copies = session.snapshot_bytes(whole), rest = session.tokens().size() * sizeof(int64_t) + static_cast<uint64_t>(session.model().vocab_size()) * sizeof(float);
  for (Entry& e : entries_)
    if (e.snapshot->position() == session.position() && (e.snapshot->whole() || !whole) && session.stands_at(*e.snapshot)) return touch(e, conversation), true;
  const bool gpu = session.model().target().cuda;
  conversations_[conversation] = ++clock_;  // those that go are another's first
  std::shared_ptr<const Snapshot> taken;
  auto take_to = [&](bool host) {
    if (!make_room(host ? 0 : copies, host ? copies + rest : rest)) return;
    try {
      taken = session.snapshot({whole, host, memory(session.model(), host)});
    } catch (const Error&) {  // there is less memory than the budget says
    }
  };
  if (gpu) take_to(false);
  if (!taken) take_to(true);
  if (taken)
    add(taken, conversation, clock_);
  else
    ++counts_.refused;
  if (std::none_of(entries_.begin(), entries_.end(), [&](const Entry& e) { return e.conversation == conversation; })) conversations_.erase(conversation);
  return taken != nullptr;
}

std::shared_ptr<const Snapshot> SnapshotStore::longest(const Resumable& session, const std::vector<int64_t>& ids, const std::string& conversation, bool from_others) {
  std::lock_guard lock(mutex_);
  Entry* found = nullptr;
  for (Entry& e : entries_)
    if ((!found || e.snapshot->position() > found->snapshot->position()) && e.snapshot->tokens().size() < ids.size() && begins(ids, e.snapshot->tokens()) &&
        session.can_restore(*e.snapshot, from_others))
      found = &e;
  ++(found ? counts_.hits : counts_.misses);
  if (!found) return nullptr;
  touch(*found, conversation);
  return found->snapshot;
}

void SnapshotStore::forget(const std::string& conversation) {
  std::lock_guard lock(mutex_);
  for (auto e = entries_.begin(); e != entries_.end();) {
    const auto entry = e++;
    if (entry->conversation == conversation) drop(entry);
  }
}

SnapshotStore::Counts SnapshotStore::counts() const {
  std::lock_guard lock(mutex_);
  Counts now = counts_;
  now.device_bytes = device_.used, now.host_bytes = host_.used, now.kept = static_cast<int64_t>(entries_.size());
  return now;
}

}  // namespace kiln
