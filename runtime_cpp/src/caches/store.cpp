#include <algorithm>

#include "caches/recycled.h"
#include "caches/snapshot_state.h"
#include "model/model_impl.h"

namespace kiln {

namespace {

bool begins(const std::vector<int64_t>& ids, const std::vector<int64_t>& with) {
  return with.size() <= ids.size() && std::equal(with.begin(), with.end(), ids.begin());
}

uint64_t all_bytes(const Snapshot& snapshot) { return snapshot.device_bytes() + snapshot.host_bytes(); }

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

// Where its copies lie is where all of it counts, the ids and logits of what is on a device, too.
SnapshotStore::Budget& SnapshotStore::of(bool on_device) { return on_device ? device_ : host_; }

void SnapshotStore::drop(Entries::iterator entry) {
  of(entry->snapshot->on_device()).used -= all_bytes(*entry->snapshot);
  const std::string conversation = std::move(entry->conversation);
  entries_.erase(entry);
  if (std::none_of(entries_.begin(), entries_.end(), [&](const Entry& e) { return e.conversation == conversation; })) conversations_.erase(conversation);
}

void SnapshotStore::add(std::shared_ptr<const Snapshot> snapshot, const std::string& conversation, uint64_t used) {
  of(snapshot->on_device()).used += all_bytes(*snapshot);
  conversations_.try_emplace(conversation, used);
  entries_.push_back({std::move(snapshot), conversation, used});
}

// False: there is no such room, and nothing was dropped for it.
bool SnapshotStore::make_room(bool on_device, uint64_t bytes) {
  if (bytes > of(on_device).most) return false;
  while (!of(on_device).fits(bytes)) {
    const auto entry = oldest(on_device);
    const Entry moved = *entry;
    drop(entry);
    if (on_device && make_room(false, all_bytes(*moved.snapshot))) {
      try {
        add(moved.snapshot->to_host(memory(*moved.snapshot->state().model, true)), moved.conversation, moved.used);
        ++counts_.moved;
        continue;
      } catch (const Error&) {  // the host has less than the budget says
      }
    }
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
    if (!make_room(!host, copies + rest)) return;
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
