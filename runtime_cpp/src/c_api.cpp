// kiln.h over the C++ classes. Handles are numbers that are never used twice, looked up in a table: what is none is told, not followed.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <numeric>
#include <optional>
#include <type_traits>

#include "compiled/host.h"
#include "kiln.h"
#include "kiln/snapshot.h"

namespace {

thread_local std::string last_error;
std::atomic<uintptr_t> handles_made{0};

kiln_status failed(kiln_status status, std::string text) {
  last_error = std::move(text);
  return status;
}

struct Misused : kiln::Error {
  using Error::Error;
};

template <typename... Parts>
[[noreturn]] void misused(const Parts&... parts) {
  std::ostringstream line;
  (line << ... << parts);
  throw Misused(kiln::one_line(line.str()));
}

// Runs `body`; nothing is thrown across the interface.
template <typename Body>
kiln_status guarded(const char* function, const Body& body) {
  try {
    body();
    return KILN_OK;
  } catch (const Misused& e) {
    return failed(KILN_MISUSED, std::string(function) + ": " + e.what());
  } catch (const std::bad_alloc&) {
    return failed(KILN_FAILED, std::string(function) + ": out of memory");
  } catch (const std::exception& e) {
    return failed(KILN_FAILED, e.what());
  } catch (...) {
    return failed(KILN_FAILED, std::string(function) + ": an unknown error");
  }
}

// Objects by handle. A caller holds a share while it uses one, so that another may free the handle meanwhile.
template <typename Object, typename Handle>
class Table {
 public:
  explicit Table(const char* name) : name_(name) {}

  Handle* add(std::shared_ptr<Object> object) {
    const uintptr_t number = 2 * ++handles_made + 1;  // odd: no address of an object
    std::lock_guard lock(mutex_);
    objects_.emplace(number, std::move(object));
    return reinterpret_cast<Handle*>(number);
  }

  std::shared_ptr<Object> get(const Handle* handle) {
    std::lock_guard lock(mutex_);
    return find(handle)->second;
  }

  void free(const Handle* handle) {
    std::shared_ptr<Object> last;  // is destroyed outside of the lock
    std::lock_guard lock(mutex_);
    auto at = find(handle);
    last = std::move(at->second);
    objects_.erase(at);
  }

 private:
  auto find(const Handle* handle) {
    if (!handle) misused("the ", name_, " is NULL");
    auto at = objects_.find(reinterpret_cast<uintptr_t>(handle));
    if (at == objects_.end()) misused("not a ", name_, ", or one that was freed");
    return at;
  }

  const char* name_;
  std::mutex mutex_;
  std::map<uintptr_t, std::shared_ptr<Object>> objects_;
};

// Never destroyed: what a process leaves open ends with it, after its static objects would have.
auto& models() {
  static auto* table = new Table<const kiln::Model, kiln_model>("kiln_model");
  return *table;
}

auto& sessions() {
  static auto* table = new Table<kiln::Session, kiln_session>("kiln_session");
  return *table;
}

auto& snapshots() {
  static auto* table = new Table<const kiln::Snapshot, kiln_snapshot>("kiln_snapshot");
  return *table;
}

template <typename T>
T* needed(T* pointer, const char* name) {
  if (!pointer) misused(name, " is NULL");
  return pointer;
}

// A caller's structure, of which it knows the first `size` bytes; the others are zero. NULL: all are.
template <typename Options>
Options options_of(const Options* given) {
  static_assert(std::is_trivially_copyable_v<Options>);
  Options options{};
  if (!given) return options;
  if (given->size < sizeof(size_t) || given->size > 4096) misused("options.size is ", given->size, ", must be the structure's sizeof");
  std::memcpy(static_cast<void*>(&options), given, std::min(given->size, sizeof(Options)));
  return options;
}

// `values` to an array of the caller's, which NULL and 0 ask the number of.
template <typename T>
void give(const std::vector<T>& values, T* out, size_t capacity, size_t* count, size_t extra, const char* what) {
  *count = values.size() - extra;
  if (!out && !capacity) return;
  needed(out, what);
  if (capacity < values.size()) kiln::fail(what, " has room for ", capacity, ", needed are ", values.size());
  std::copy(values.begin(), values.end(), out);
}

std::string_view text_of(const char* text, size_t bytes) { return bytes ? std::string_view(needed(text, "text"), bytes) : std::string_view(); }

std::vector<int64_t> ids_of(const int64_t* ids, size_t count) { return count ? std::vector<int64_t>(needed(ids, "ids"), ids + count) : std::vector<int64_t>(); }

std::vector<int64_t> encoded(const kiln::Model& model, std::string_view text, int how) {
  switch (how) {
    case KILN_CHAT: return model.encode_prompt(text);
    case KILN_TEXT: return model.encode_prompt(text, true);
    case KILN_PIECE: return model.tokenizer().encode(text, kiln::ParseSpecial::None, false);
    case KILN_MARKUP: return model.tokenizer().encode(text, kiln::ParseSpecial::All);
  }
  misused("the encoding ", static_cast<int>(how), " is none");
}

kiln_stop stop_of(kiln::Stop stop) {
  switch (stop) {
    case kiln::Stop::Eog: return KILN_STOP_EOG;
    case kiln::Stop::Length: return KILN_STOP_LENGTH;
    case kiln::Stop::MaxSeqLen: return KILN_STOP_MAX_SEQ_LEN;
    case kiln::Stop::Callback: break;
  }
  return KILN_STOP_CALLBACK;
}

void copy_name(char (&out)[32], const std::string& name) {
  std::memset(out, 0, sizeof(out));
  std::memcpy(out, name.data(), std::min(name.size(), sizeof(out) - 1));
}

}  // namespace

const char* kiln_version(void) {
  static const std::string version = kiln::version();
  return version.c_str();
}

const char* kiln_error(void) { return last_error.c_str(); }

kiln_status kiln_set_threads(int threads) {
  return guarded("kiln_set_threads", [&] {
    if (threads < 0 || threads > 1024) misused("threads is ", threads, ", must be 0 .. 1024");
    kiln::set_threads(threads);
  });
}

kiln_status kiln_model_load(const char* path, const kiln_load_options* given, kiln_model** model) {
  return guarded("kiln_model_load", [&] {
    needed(path, "path"), needed(model, "model");
    const kiln_load_options wanted = options_of(given);
    if (wanted.verify_threads < 0) misused("verify_threads is ", wanted.verify_threads, ", must be 0 or more");
    kiln::LoadOptions options;
    if (wanted.device) options.device = wanted.device;
    if (wanted.weights) options.weights = wanted.weights;
    if (wanted.ple) options.ple = wanted.ple;
    if (wanted.note) options.note = [wanted](const std::string& line) { wanted.note(line.c_str(), wanted.user); };
    options.verify = wanted.verify;
    options.threads = std::max(1, wanted.verify_threads);
    if (wanted.progress) options.progress = [wanted](uint64_t done, uint64_t total) { wanted.progress(done, total, wanted.user); };
    kiln::share_libstdcxx();
    *model = models().add(kiln::Model::load(path, options));
  });
}

kiln_status kiln_model_free(kiln_model* model) {
  return guarded("kiln_model_free", [&] { models().free(model); });
}

kiln_status kiln_model_describe(const kiln_model* handle, kiln_model_info* info) {
  return guarded("kiln_model_describe", [&] {
    const auto model = models().get(handle);
    kiln_model_info found = options_of(needed(info, "info"));
    found.vocab_size = model->vocab_size();
    found.max_seq_len = model->artifact().max_seq_len;
    found.prefill_chunk = model->artifact().prefill_chunk;
    found.has_tokenizer = model->has_tokenizer();
    copy_name(found.device, model->device());
    copy_name(found.target, model->target().target);
    std::memcpy(static_cast<void*>(info), &found, std::min(info->size, sizeof(found)));
  });
}

kiln_status kiln_encode(const kiln_model* handle, const char* text, size_t bytes, int how, int64_t* ids, size_t capacity, size_t* count) {
  return guarded("kiln_encode", [&] {
    const auto model = models().get(handle);
    needed(count, "count");
    give(encoded(*model, text_of(text, bytes), how), ids, capacity, count, 0, "ids");
  });
}

kiln_status kiln_decode(const kiln_model* handle, const int64_t* ids, size_t count, char* text, size_t capacity, size_t* bytes) {
  return guarded("kiln_decode", [&] {
    const auto model = models().get(handle);
    needed(bytes, "bytes");
    const std::string found = model->tokenizer().decode(ids_of(ids, count));
    give(std::vector<char>(found.c_str(), found.c_str() + found.size() + 1), text, capacity, bytes, 1, "text");
  });
}

kiln_status kiln_is_eog(const kiln_model* handle, int64_t token, int* yes) {
  return guarded("kiln_is_eog", [&] {
    const auto model = models().get(handle);
    *needed(yes, "yes") = model->is_eog(token);
  });
}

kiln_status kiln_session_open(const kiln_model* handle, const kiln_session_options* given, kiln_session** session) {
  return guarded("kiln_session_open", [&] {
    const auto model = models().get(handle);
    needed(session, "session");
    const kiln_session_options wanted = options_of(given);
    *session = sessions().add(std::make_shared<kiln::Session>(model, kiln::SessionOptions{wanted.prefill_chunk, !wanted.no_graph, !wanted.no_early_launch}));
  });
}

kiln_status kiln_session_free(kiln_session* session) {
  return guarded("kiln_session_free", [&] { sessions().free(session); });
}

kiln_status kiln_set_sampling(kiln_session* handle, float temperature, int32_t top_k, float top_p, int64_t seed) {
  return guarded("kiln_set_sampling", [&] { sessions().get(handle)->set_sampling({temperature, top_k, top_p, seed}); });
}

kiln_status kiln_prefill(kiln_session* handle, const int64_t* ids, size_t count, int64_t* next) {
  return guarded("kiln_prefill", [&] {
    const auto session = sessions().get(handle);
    needed(next, "next");
    *next = session->prefill(ids_of(ids, count));
  });
}

kiln_status kiln_step(kiln_session* handle, int64_t token, int64_t* next) {
  return guarded("kiln_step", [&] {
    const auto session = sessions().get(handle);
    needed(next, "next");
    *next = token == KILN_SAMPLED ? session->decode() : session->decode(token);
  });
}

kiln_status kiln_generate(kiln_session* handle, int64_t max_new_tokens, int past_eog, kiln_on_token on_token, void* user, kiln_stop* stop) {
  return guarded("kiln_generate", [&] {
    const auto session = sessions().get(handle);
    needed(on_token, "on_token");
    std::optional<kiln::StreamDecoder> decoder;
    if (session->model().has_tokenizer()) decoder.emplace(session->model().tokenizer());
    const kiln::Stop why = session->generate(
        max_new_tokens,
        [&](int64_t token) {
          const std::string text = decoder ? decoder->push(token) : "";
          return on_token(token, text.c_str(), text.size(), user) == 0;
        },
        !past_eog);
    if (const std::string rest = decoder ? decoder->finish() : ""; !rest.empty()) on_token(-1, rest.c_str(), rest.size(), user);
    if (stop) *stop = stop_of(why);
  });
}

kiln_status kiln_set_drafts(kiln_session* handle, int source, int64_t length) {
  return guarded("kiln_set_drafts", [&] {
    const auto session = sessions().get(handle);
    if (source != KILN_DRAFT_OFF && source != KILN_DRAFT_NGRAM && source != KILN_DRAFT_MTP) misused("the source ", source, " is none");
    const kiln::DraftSource of = source == KILN_DRAFT_NGRAM ? kiln::DraftSource::Ngram : source == KILN_DRAFT_MTP ? kiln::DraftSource::Mtp : kiln::DraftSource::Off;
    session->set_drafts({of, length});
  });
}

kiln_status kiln_count_drafts(const kiln_session* handle, kiln_draft_counts* counts) {
  return guarded("kiln_count_drafts", [&] {
    const auto session = sessions().get(handle);
    kiln_draft_counts found = options_of(needed(counts, "counts"));
    const kiln::DraftCounts c = session->draft_counts();
    found.steps = c.steps, found.tokens = c.tokens;
    found.tried = std::accumulate(c.tried.begin(), c.tried.end(), int64_t{0}), found.right = std::accumulate(c.right.begin(), c.right.end(), int64_t{0});
    std::memcpy(static_cast<void*>(counts), &found, std::min(counts->size, sizeof(found)));
  });
}

kiln_status kiln_logits(kiln_session* handle, float* logits, size_t capacity) {
  return guarded("kiln_logits", [&] {
    const auto session = sessions().get(handle);
    needed(logits, "logits");
    if (const auto most = static_cast<size_t>(session->model().vocab_size()); capacity < most) misused("logits has room for ", capacity, ", needed are ", most);
    const std::vector<float>& row = session->logits();
    std::copy(row.begin(), row.end(), logits);
  });
}

kiln_status kiln_position(const kiln_session* handle, int64_t* position) {
  return guarded("kiln_position", [&] {
    const auto session = sessions().get(handle);
    *needed(position, "position") = session->position();
  });
}

kiln_status kiln_reset(kiln_session* handle) {
  return guarded("kiln_reset", [&] { sessions().get(handle)->reset(); });
}

kiln_status kiln_tokens(const kiln_session* handle, int64_t* ids, size_t capacity, size_t* count) {
  return guarded("kiln_tokens", [&] {
    const auto session = sessions().get(handle);
    needed(count, "count");
    give(session->tokens(), ids, capacity, count, 0, "ids");
  });
}

kiln_status kiln_rewind(kiln_session* handle, int64_t position) {
  return guarded("kiln_rewind", [&] { sessions().get(handle)->rewind(position); });
}

kiln_status kiln_earliest(const kiln_session* handle, int64_t* earliest) {
  return guarded("kiln_earliest", [&] {
    const auto session = sessions().get(handle);
    *needed(earliest, "earliest") = session->earliest();
  });
}

kiln_status kiln_snapshot_take(const kiln_session* handle, int flags, kiln_snapshot** snapshot) {
  return guarded("kiln_snapshot_take", [&] {
    const auto session = sessions().get(handle);
    needed(snapshot, "snapshot");
    if (flags & ~(KILN_WHOLE | KILN_HOST)) misused("flags is ", flags, ", must be a sum of KILN_WHOLE and KILN_HOST");
    *snapshot = snapshots().add(session->snapshot({(flags & KILN_WHOLE) != 0, (flags & KILN_HOST) != 0}));
  });
}

kiln_status kiln_snapshot_free(kiln_snapshot* snapshot) {
  return guarded("kiln_snapshot_free", [&] { snapshots().free(snapshot); });
}

kiln_status kiln_snapshot_describe(const kiln_snapshot* handle, kiln_snapshot_info* info) {
  return guarded("kiln_snapshot_describe", [&] {
    const auto snapshot = snapshots().get(handle);
    kiln_snapshot_info found = options_of(needed(info, "info"));
    found.position = snapshot->position();
    found.device_bytes = snapshot->device_bytes();
    found.host_bytes = snapshot->host_bytes();
    found.whole = snapshot->whole();
    std::memcpy(static_cast<void*>(info), &found, std::min(info->size, sizeof(found)));
  });
}

kiln_status kiln_restore(kiln_session* handle, const kiln_snapshot* snapshot) {
  return guarded("kiln_restore", [&] {
    const auto session = sessions().get(handle);
    session->restore(*snapshots().get(snapshot));
  });
}

kiln_status kiln_session_save(const kiln_session* handle, const char* path) {
  return guarded("kiln_session_save", [&] {
    const auto session = sessions().get(handle);
    session->save(needed(path, "path"));
  });
}

kiln_status kiln_session_load(kiln_session* handle, const char* path) {
  return guarded("kiln_session_load", [&] {
    const auto session = sessions().get(handle);
    session->load(needed(path, "path"));
  });
}
