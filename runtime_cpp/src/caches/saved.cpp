#include "caches/saved.h"

#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <thread>

#include "artifact/file.h"
#include "artifact/sha256.h"
#include "caches/session_file.h"
#include "cpu/ops.h"

namespace kiln {

namespace {

constexpr const char *kTokens = "tokens", *kLogits = "logits";

// A part of the file and where its bytes are, or are to be.
struct Place {
  std::string name;
  char* data;
  uint64_t bytes;
};

// As a whole snapshot on the host has them.
std::vector<Place> places(const Artifact& artifact, int64_t position, std::vector<int64_t>& ids, std::vector<float>& logits, const Tensor& copies) {
  std::vector<Place> found = {{kTokens, reinterpret_cast<char*>(ids.data()), ids.size() * sizeof(int64_t)},
                              {kLogits, reinterpret_cast<char*>(logits.data()), logits.size() * sizeof(float)}};
  auto* at = static_cast<char*>(copies.data());
  for (bool forgetful : {true, false})
    for (const KvSpec& k : artifact.kv)
      if (k.forgets() == forgetful) {
        found.push_back({k.name, at, Slots(k, artifact.max_seq_len).bytes(position)});
        at += found.back().bytes;
      }
  return found;
}

std::vector<std::string> hashes(const std::vector<Place>& parts) {
  std::vector<std::string> found(parts.size());
  std::atomic<size_t> next{0};
  auto work = [&] {
    for (size_t i; (i = next++) < parts.size();) found[i] = sha256(parts[i].data, parts[i].bytes);
  };
  std::vector<std::thread> others;
  for (int i = 1; i < cpu_threads(); ++i) {
    try {
      others.emplace_back(work);
    } catch (const std::system_error&) {  // no thread to be had
      break;
    }
  }
  work();
  for (std::thread& other : others) other.join();
  return found;
}

// A new file that takes the place of `path` when commit() has run. What was said is in it: it is its owner's alone.
class NewFile {
 public:
  explicit NewFile(const std::string& path) : path_(path), name_(path + ".XXXXXX") {
    fd_ = mkstemp(name_.data());
    if (fd_ < 0) fail(path_, ": cannot save the session: ", std::strerror(errno));
  }
  ~NewFile() {
    if (fd_ < 0) return;
    close(fd_);
    unlink(name_.c_str());
  }
  NewFile(const NewFile&) = delete;
  NewFile& operator=(const NewFile&) = delete;

  void write(const char* data, uint64_t bytes) {
    while (bytes) {
      const ssize_t wrote = ::write(fd_, data, bytes);
      if (wrote < 0 && errno == EINTR) continue;
      if (wrote < 0) fail(path_, ": cannot save the session: ", std::strerror(errno));
      data += wrote, bytes -= static_cast<uint64_t>(wrote);
    }
  }
  void commit() {
    if (fsync(fd_) != 0 || rename(name_.c_str(), path_.c_str()) != 0) fail(path_, ": cannot save the session: ", std::strerror(errno));
    close(fd_);
    fd_ = -1;
  }

 private:
  std::string path_, name_;
  int fd_ = -1;
};

}  // namespace

void save(const Snapshot& whole, const std::string& path) {
  const Snapshot::State& s = whole.state();
  const Model::Impl& shared = s.model->impl();
  std::vector<int64_t> ids = s.past.ids();
  std::vector<float> row = s.logits;
  const std::vector<Place> parts = places(shared.artifact, s.mark.position, ids, row, s.copies);
  const std::vector<std::string> sums = hashes(parts);
  SessionRecord record{shared.identity, shared.target->target, s.mark.position, s.next, s.handed_out, s.written, {}};
  for (size_t i = 0; i < parts.size(); ++i) record.parts.push_back({parts[i].name, parts[i].bytes, sums[i]});
  NewFile file(path);
  const std::string head = session_head(record);
  file.write(head.data(), head.size());
  for (const Place& part : parts) file.write(part.data, part.bytes);
  file.commit();
}

std::unique_ptr<Snapshot::State> load_saved(std::shared_ptr<const Model> model, const std::string& path) {
  const Model::Impl& shared = model->impl();
  const MappedFile file(path);
  std::string head(std::min(file.size(), kSessionPrelude), '\0');
  file.read(0, head.size(), head.data(), 1);
  head.resize(std::min(file.size(), session_head_bytes(head, path)));
  file.read(0, head.size(), head.data(), 1);
  const SessionRecord record = parse_session(head, file.size(), path);
  if (record.artifact != shared.identity) fail(path, ": a session of another artifact, or of other weights");
  if (record.target != shared.target->target) fail(path, ": a session of the target ", record.target, ", this is ", shared.target->target);
  if (record.position > shared.artifact.max_seq_len || record.next >= shared.vocab_size || record.written > shared.artifact.max_seq_len)
    fail(path, ": damaged: position ", record.position, ", next token ", record.next, ", written to ", record.written);

  auto state = std::make_unique<Snapshot::State>();
  std::vector<int64_t> ids(static_cast<size_t>(record.position));
  std::vector<float>& row = state->logits;
  if (record.parts.size() > 1 && record.parts[1].bytes) row.resize(static_cast<size_t>(shared.vocab_size));
  uint64_t total = 0;
  for (const KvSpec& k : shared.artifact.kv) total += Slots(k, shared.artifact.max_seq_len).bytes(record.position);
  state->copies = shared.backend->keep(total, true);
  const std::vector<Place> parts = places(shared.artifact, record.position, ids, row, state->copies);
  if (parts.size() != record.parts.size()) fail(path, ": damaged: it has ", record.parts.size(), " parts, needed are ", parts.size());
  uint64_t at = head.size();
  for (size_t i = 0; i < parts.size(); ++i) {
    const SessionRecord::Part& said = record.parts[i];
    if (said.name != parts[i].name || said.bytes != parts[i].bytes)
      fail(path, ": damaged: '", said.name, "' has ", said.bytes, " bytes, expected is '", parts[i].name, "' with ", parts[i].bytes);
    file.read(at, said.bytes, parts[i].data, 1);
    at += said.bytes;
  }
  const std::vector<std::string> sums = hashes(parts);
  for (size_t i = 0; i < parts.size(); ++i)
    if (sums[i] != record.parts[i].sha256) fail(path, ": damaged: '", parts[i].name, "' has another SHA-256 than the file says");
  for (int64_t id : ids)
    if (id < 0 || id >= shared.vocab_size) fail(path, ": damaged: token ", id, " is outside of the vocabulary of ", shared.vocab_size);

  state->model = std::move(model);
  state->past.write(0, ids.data(), record.position);
  state->past = state->past.until(record.position);
  state->mark = state->past.mark(record.position);
  state->whole = true;
  state->next = record.next, state->handed_out = record.handed_out, state->written = record.written;
  return state;
}

}  // namespace kiln
