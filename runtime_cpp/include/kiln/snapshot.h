#pragma once
#include <array>
#include <cstdint>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "kiln/session.h"

namespace kiln {

// What a session, or a row of a batch, needs to go on from a position, as it stood there: the token that is next (not of a row), and copies of the caches that lose their past, which
// are rings. The others are shared by position with the session that it was taken from, unless it is `whole`. Immutable; any thread may use and
// drop it. It keeps the model alive.
class Snapshot {
 public:
  ~Snapshot();
  Snapshot(const Snapshot&) = delete;
  Snapshot& operator=(const Snapshot&) = delete;

  int64_t position() const;
  const std::vector<int64_t>& tokens() const;  // [position]: what the caches hold
  bool whole() const;                          // with the caches that others share by position: any session of the model can go on from it
  bool on_device() const;                      // its copies lie in a GPU's memory
  uint64_t device_bytes() const, host_bytes() const;
  // The same with its copies in pinned memory of the host. `this` must be on_device().
  std::shared_ptr<const Snapshot> to_host(std::shared_ptr<Memory> memory = nullptr) const;  // memory: as SnapshotOptions

  struct State;
  explicit Snapshot(std::unique_ptr<const State> state);
  const State& state() const { return *state_; }

 private:
  std::unique_ptr<const State> state_;
};

// Snapshots of many conversations within two budgets of bytes. The conversation that was used least recently goes first, of it the snapshot that
// was used least recently: from the device to the host, from there out. Any thread may use it.
class SnapshotStore {
 public:
  struct Counts {
    uint64_t device_bytes = 0, host_bytes = 0;  // of what is kept now; never above the budgets
    int64_t kept = 0, hits = 0, misses = 0, evicted = 0, moved = 0, refused = 0;  // moved: to the host; refused: larger than the budgets, or than the memory
  };

  // A snapshot counts where its copies lie, its ids and logits with them, which are the host's. On the CPU everything counts as the host's.
  SnapshotStore(uint64_t device_budget, uint64_t host_budget) : device_{device_budget}, host_{host_budget} {}

  // Takes a snapshot of the session or row as it stands and keeps it for `conversation`, once room is made. False: there is no such room.
  bool take(const Resumable& session, const std::string& conversation, bool whole = false);
  // The longest one whose tokens `ids` begins with, one of `ids` at least being left, and that `session` can go on from; it is `conversation`'s from
  // now on. Null: there is none.
  // from_others: as Resumable::can_restore(); what it was taken of must not be used by another thread meanwhile, which would be told that it is in use.
  std::shared_ptr<const Snapshot> longest(const Resumable& session, const std::vector<int64_t>& ids, const std::string& conversation, bool from_others = false);
  void forget(const std::string& conversation);
  Counts counts() const;

 private:
  struct Entry {
    std::shared_ptr<const Snapshot> snapshot;
    std::string conversation;
    uint64_t used;  // when
  };
  using Entries = std::list<Entry>;
  struct Budget {
    uint64_t most, used = 0;
    bool fits(uint64_t bytes) const { return bytes <= most && used <= most - bytes; }
  };

  Entries::iterator oldest(bool on_device);
  std::shared_ptr<Memory> memory(const Model& model, bool host);  // null on the CPU, where it costs nothing
  void drop(Entries::iterator entry);
  Budget& of(bool on_device);
  bool make_room(bool on_device, uint64_t bytes);
  void touch(Entry& entry, const std::string& conversation);
  void add(std::shared_ptr<const Snapshot> snapshot, const std::string& conversation, uint64_t used);

  mutable std::mutex mutex_;
  std::map<std::string, std::array<std::shared_ptr<Memory>, 2>> memory_;  // of a GPU and of its host, by the GPU
  Budget device_, host_;
  Entries entries_;
  std::map<std::string, uint64_t> conversations_;  // when each was used last
  uint64_t clock_ = 0;
  Counts counts_;
};

}  // namespace kiln
