#include "session/session_impl.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <exception>
#include <numeric>
#include <tuple>

#include "caches/not_finite.h"
#include "draft/drafting.h"

namespace kiln {

namespace {

// The inputs of the compiled models that one number each fills.
constexpr std::pair<const char*, Scalar> kValues[] = {{"tokens", Scalar::I64}, {"pos", Scalar::I64},   {"temperature", Scalar::F32},
                                                      {"top_k", Scalar::I32},  {"top_p", Scalar::F32}, {"seed", Scalar::I64}};

bool has_input(const EntryPoint& point, const char* name) {
  return std::any_of(point.inputs.begin(), point.inputs.end(), [&](const ValueSpec& v) { return v.name == name; });
}

}  // namespace

Session::Impl::Impl(std::shared_ptr<const Model> m, const SessionOptions& o)
    : Caches(std::move(m)), timeline(shared.backend->make_timeline()), options(o) {
  line = timeline.get(), taken = &busy;
  const Artifact& artifact = shared.artifact;
  chunk = options.prefill_chunk ? options.prefill_chunk : artifact.prefill_chunk;
  if (chunk < 1 || chunk > artifact.prefill_chunk) fail("prefill chunk ", chunk, ": the artifact takes 1 to ", artifact.prefill_chunk, " tokens at a time");
  options.read_by_step = read_by_step(artifact, *timeline, options.read_by_step);
  Entered entered(*timeline);
  prefill_surroundings = timeline->surroundings("prefill");
  decode_surroundings = timeline->surroundings("decode");
  prefill = std::make_unique<CompiledModel>(shared, "prefill", prefill_surroundings);
  decode = std::make_unique<CompiledModel>(shared, "decode", decode_surroundings);
  make_caches();
  bind_constants();
  for (const auto& [name, scalar] : kValues) values.emplace(name, timeline->make(scalar, {1}));
  timeline->fill(values.at("top_p"), 1.f);
  for (const char* entry : {"prefill", "decode"})
    for (const ValueSpec& v : artifact.entry(entry).inputs)
      if (scalar_of(v.dtype) != values.at(v.name).scalar)
        fail("manifest.json: the input '", v.name, "' is ", dtype_name(v.dtype), ", this runner gives ", scalar_name(values.at(v.name).scalar));
  if (timeline->asynchronous()) warm_up();
}

// Work may be queued that uses the memory which goes now.
Session::Impl::~Impl() {
  try {
    Entered entered(*timeline);
    timeline->synchronize();
  } catch (const Error&) {  // a device that failed has told its user already
  }
}

void Session::Impl::make_caches() {
  uint64_t need = 0;
  for (const KvSpec& k : shared.artifact.kv) need += k.bytes;
  uint64_t free = shared.backend->free_bytes();
  if (need > free)
    fail("the KV caches for ", shared.artifact.max_seq_len, " tokens take ", gigabytes(need), " (", need, " bytes), ", shared.backend->device().str(), " has ",
         gigabytes(free), " (", free, " bytes) free; export with a smaller --max-seq-len");
  for (const KvSpec& k : shared.artifact.kv) kv[k.name] = timeline->make(scalar_of(k.dtype), k.shape);
}

void Session::Impl::bind_constants() {
  TensorMap all = shared.constants;
  for (const auto& [name, cache] : kv)
    if (!all.emplace(name, cache).second) fail("manifest.json: '", name, "' is both a constant and a KV cache");
  std::set<std::string> used = prefill->bind(all);
  used.merge(decode->bind(all));
  if (ModelDrafter::in(shared.artifact))  // opened when it is needed
    for (const auto& [name, constant] : shared.package->library(ModelDrafter::kEntry).constants()) used.insert(name);
  for (const auto& [name, tensor] : all)
    if (!used.count(name)) fail("manifest.json names '", name, "', which the compiled models do not use; export the model again");
}

// First runs load the kernels and make the libraries' workspaces: a capture cannot do that, and a first prompt should not.
// They write to the caches, which are zeroed again afterwards.
// The longest prefill goes first: memory that shorter ones had split into pieces would be too small for it.
void Session::Impl::warm_up() {
  if (int64_t n = std::min(chunk, shared.artifact.max_seq_len); n >= 2) {
    std::vector<int64_t> zeros(static_cast<size_t>(n), 0);
    run_prefill(zeros.data(), n);
  }
  for (int i = 0; i < 2; ++i) run_step();
  if (options.graph) {
    // Before compute capability 9.0 no kernel can wait inside.
    bool early = options.early_launch && shared.target->major >= 9;
    timeline->capture([this] { run_step(); }, early ? shared.artifact.entry("decode").waits : std::vector<std::string>());
    graph_logits = logits, graph_hidden = hidden;
  }
  zero_caches();
  logits.reset(), hidden.reset();
  timeline->synchronize();
}

void Session::Impl::check_tokens(const std::vector<int64_t>& tokens) const {
  if (tokens.empty()) fail("the prompt has no tokens");
  for (int64_t t : tokens)
    if (t < 0 || t >= shared.vocab_size) fail("token ", t, " is outside of the vocabulary of ", shared.vocab_size);
  auto n = static_cast<int64_t>(tokens.size());
  int64_t most = shared.artifact.max_seq_len;
  if (n > most - position)
    fail("the prompt has ", n, " tokens", position ? " after " + std::to_string(position) + " in the cache" : "", ", the artifact holds ", most,
         "; shorten it or export with a larger --max-seq-len");
}

CompiledModel::Output Session::Impl::run_prefill(const int64_t* tokens, int64_t n) {
  std::vector<int64_t> positions(static_cast<size_t>(n));
  std::iota(positions.begin(), positions.end(), position.load());
  TensorMap inputs = values;
  for (const auto& [name, from] : {std::pair("tokens", tokens), std::pair("pos", static_cast<const int64_t*>(positions.data()))}) {
    inputs[name] = Tensor::make(prefill_surroundings.memory, shared.backend->device(), Scalar::I64, {n});
    timeline->write(inputs[name], from);
  }
  logits.reset(), hidden.reset();  // their memory may serve this call
  return prefill->run(inputs);
}

void Session::Impl::prefill_chunk(const int64_t* tokens, int64_t n) {
  CompiledModel::Output out = run_prefill(tokens, n);
  wrote(tokens, n);
  logits = out.logits, hidden = out.hidden;
  copied = false;
  timeline->copy(values.at("tokens"), out.token);
  in_step = true;
  took_logits();
}

// The decode step: everything in here is captured. The sampled token stays on the device.
void Session::Impl::run_step() {
  CompiledModel::Output out = decode->run(values);
  timeline->copy(values.at("tokens"), out.token);
  logits = out.logits, hidden = out.hidden;
}

void Session::Impl::launch() {
  if (!in_step) {
    timeline->fill_low(values.at("tokens"), static_cast<uint32_t>(next));
    in_step = true;
  }
  timeline->fill_low(values.at("pos"), static_cast<uint32_t>(position));
  if (graph_logits.defined())
    timeline->replay(), logits = graph_logits, hidden = graph_hidden;
  else
    run_step();
  wrote(&next, 1);
  copied = false;
  try {
    took_logits();
  } catch (...) {  // as if the step had not run: its cache entry is written again by the next one
    lineage.cut(--position);
    forget_step();
    throw;
  }
}

const std::vector<float>& Session::Impl::host_logits() {
  if (!copied) {
    if (!logits.defined()) fail("no logits: nothing has run, or the last step was discarded");
    if (!logits.dense()) fail("internal error: logits with gaps");
    logits_copy.resize(static_cast<size_t>(logits.numel()));
    timeline->read(logits_copy.data(), logits);
    copied = true;
  }
  return logits_copy;
}

const char* stop_name(Stop stop) {
  switch (stop) {
    case Stop::Eog: return "eog";
    case Stop::Length: return "length";
    case Stop::MaxSeqLen: return "max_seq_len";
    case Stop::Callback: return "callback";
  }
  return "";
}

// Runs `f`; where it throws, the session stands where it stood, caches too. A ring has forgotten what a chunk overwrote: where a sink may throw
// it is copied before, and so is a state. (A step overwrites only what is out of every later window, and writes a state beside the one before it.)
template <typename F>
auto Session::Impl::all_or_nothing(F&& f) -> decltype(f()) {
  const int64_t before = position, next_before = next, written_before = written;
  const bool handed_out_before = handed_out;
  TensorMap rings;
  if (sink)
    for (const KvSpec& k : shared.artifact.kv)
      if (k.forgets() && before > 0) timeline->copy(rings[k.name] = timeline->make(scalar_of(k.dtype), k.shape), kv.at(k.name));
  try {
    return f();
  } catch (...) {
    if (before == 0) zero_caches();
    for (const auto& [name, copy] : rings) timeline->copy(kv.at(name), copy);
    if (before == 0 || !rings.empty()) written = written_before;
    lineage.cut(before);
    position = before, next = next_before, handed_out = handed_out_before;
    forget_step();
    throw;
  }
}

int64_t Session::Impl::append(const std::vector<int64_t>& tokens) {
  check_tokens(tokens);
  if (look) look();
  auto total = static_cast<int64_t>(tokens.size());
  std::exception_ptr ended;  // by look(), between two chunks
  bool known = false;        // what was sampled
  all_or_nothing([&] {
    for (int64_t at = 0; at < total && !ended;) {
      const bool end = total - at <= options.read_by_step;
      int64_t n = end ? total - at : std::min(chunk, total - at);
      if (end && n > 1) {
        read_step(&tokens[static_cast<size_t>(at)], n);
        known = true;
      } else if (n > 1) {
        prefill_chunk(&tokens[static_cast<size_t>(at)], n);
      } else {  // a prefill call takes two tokens or more
        next = tokens[static_cast<size_t>(at)];
        in_step = false;
        launch();
      }
      at += n;
      try {
        if (look && at < total) look();
      } catch (...) {
        ended = std::current_exception();
      }
    }
  });
  if (known) {
    check_next();
  } else {
    timeline->send(values.at("tokens"));
    take_next(1);
  }
  if (ended) std::rethrow_exception(ended);
  return next;
}

// Takes the oldest of `unread` sampled tokens. Where it is none, because a logit is not finite, the steps behind it are void.
void Session::Impl::take_next(int64_t unread) {
  next = timeline->receive();
  handed_out = false;
  if (next >= 0) return;
  for (int64_t i = 1; i < unread; ++i, --position) timeline->receive();
  check_next();
}

// `next` was sampled at position() - 1. Error where it is no token.
void Session::Impl::check_next() {
  if (next >= 0) return;
  lineage.cut(position);
  next = -1;
  forget_step();
  timeline->fill(values.at("tokens"), int64_t{0});  // fill_low() would leave the upper half of -1
  fail("the logits after position ", position - 1, " are not finite: ", trace_not_finite(shared.artifact, *timeline, shared.constants, kv, position));
}

int64_t Session::Impl::step() {
  if (next < 0) fail("decode() before prefill(), or after an error: there is no token to feed");
  if (position >= shared.artifact.max_seq_len) fail("the cache is full: the artifact holds ", shared.artifact.max_seq_len, " tokens");
  next_step();
  return next;
}

int64_t Session::Impl::step(int64_t token) {
  check_tokens({token});
  const auto before = std::pair(next, handed_out);
  next = token;
  in_step = false;
  try {
    launch();
  } catch (...) {
    std::tie(next, handed_out) = before;
    throw;
  }
  timeline->send(values.at("tokens"));
  take_next(1);
  return next;
}

Stop Session::Impl::generate(int64_t max_new_tokens, const std::function<bool(int64_t)>& on_token, bool stop_at_eog) {
  if (max_new_tokens < 1) fail("max_new_tokens is ", max_new_tokens, ", must be 1 or more");
  if (next < 0) fail("generate() before prefill(), or after an error: there is no token to start from");
  const int64_t most = shared.artifact.max_seq_len;
  if (handed_out) {
    if (position >= most) return Stop::MaxSeqLen;
    next_step();
  }
  begin_drafts();
  // On a GPU one step stays queued behind the one whose token is awaited, so that the device never waits for the host.
  const int64_t run_ahead = timeline->asynchronous() && !sink ? 2 : 1;
  int64_t unread = 0;  // steps launched whose token was not received
  auto discard = [&] {
    if (speculation && !speculation->ahead.empty()) speculation->ahead.clear(), lineage.cut(position);
    if (!unread) return;
    for (; unread; --unread, --position) timeline->receive();
    lineage.cut(position);
    // The steps' cache entries lie at positions >= position, which the next tokens overwrite. A state is kept twice, for there is one such step.
    forget_step();
  };
  Stop stop;
  try {
    for (int64_t produced = 0;;) {
      if (stop_at_eog && model->is_eog(next)) {
        stop = Stop::Eog;
        break;
      }
      handed_out = true;
      ++produced;
      if (!on_token(next)) {
        stop = Stop::Callback;
        break;
      }
      if (produced == max_new_tokens) {
        stop = Stop::Length;
        break;
      }
      if (!unread && position >= most) {
        stop = Stop::MaxSeqLen;
        break;
      }
      if (speculation && !unread && take_drafts(std::min(max_new_tokens - produced, most - position), stop_at_eog)) {
        if (look && speculation->ahead.empty()) look();
        continue;
      }
      const bool queued = unread > 0;
      const auto began = std::chrono::steady_clock::now();
      const int64_t depth = speculation && speculation->hopes() ? 1 : run_ahead;  // what a draft follows must be known
      for (; unread < depth && position < most && produced + unread < max_new_tokens; ++unread) {
        launch();
        timeline->send(values.at("tokens"));
      }
      const int64_t waiting = unread;
      unread = 0;  // where take_next() throws there is none left
      take_next(waiting);
      unread = waiting - 1;
      if (unread && !pretended) lineage.name(position - unread, next);  // a step that was queued has fed it already
      if (speculation) took_one(began, queued);
      if (look) look();
    }
  } catch (...) {
    discard();
    throw;
  }
  discard();
  return stop;
}

void Session::Impl::reset() {
  zero_caches();
  lineage.cut(0);
  pretended = false;
  written = 0;
  stand_at(0, -1, false, {});
}

void check_sampling(const Sampling& sampling) {
  if (!(sampling.temperature >= 0) || !std::isfinite(sampling.temperature)) fail("temperature is ", sampling.temperature, ", must be 0 or more");
  if (sampling.top_k < 0) fail("top_k is ", sampling.top_k, ", must be 0 (off) or more");
  if (!(sampling.top_p > 0 && sampling.top_p <= 1)) fail("top_p is ", sampling.top_p, ", must be above 0 and at most 1");
}

void Session::Impl::set_sampling(const Sampling& wanted) {
  check_sampling(wanted);
  if (wanted.temperature > 0)
    for (const char* name : {"temperature", "top_k", "top_p", "seed"})
      if (!has_input(shared.artifact.entry("decode"), name))
        fail("the artifact is greedy only: its decode model has no input '", name, "'");
  sampling = wanted;
  timeline->fill(values.at("temperature"), sampling.temperature);
  timeline->fill(values.at("top_k"), int64_t{sampling.top_k});
  timeline->fill(values.at("top_p"), sampling.top_p);
  timeline->fill(values.at("seed"), sampling.seed);
}

Session::Session(std::shared_ptr<const Model> model, const SessionOptions& options) : impl_(std::make_shared<Impl>(std::move(model), options)) {}
Session::~Session() = default;

int64_t Session::prefill(const std::vector<int64_t>& tokens) {
  Turn turn(impl_->busy, *impl_->timeline);
  return impl_->append(tokens);
}
int64_t Session::decode() {
  Turn turn(impl_->busy, *impl_->timeline);
  return impl_->step();
}
int64_t Session::decode(int64_t token) {
  Turn turn(impl_->busy, *impl_->timeline);
  return impl_->step(token);
}
Stop Session::generate(int64_t max_new_tokens, const std::function<bool(int64_t)>& on_token, bool stop_at_eog) {
  Turn turn(impl_->busy, *impl_->timeline);
  return impl_->generate(max_new_tokens, on_token, stop_at_eog);
}
void Session::reset() {
  Turn turn(impl_->busy, *impl_->timeline);
  impl_->reset();
}
void Session::set_sampling(const Sampling& sampling) {
  Turn turn(impl_->busy, *impl_->timeline);
  impl_->set_sampling(sampling);
}
const std::vector<float>& Session::logits() {
  Turn turn(impl_->busy, *impl_->timeline);
  return impl_->host_logits();
}
int64_t Session::position() const { return impl_->position; }
void Session::set_logits_sink(std::function<void(const std::vector<float>&)> sink) {
  Turn turn(impl_->busy, *impl_->timeline);
  impl_->sink = std::move(sink);
}
void Session::set_look(std::function<void()> look) {
  Turn turn(impl_->busy, *impl_->timeline);
  impl_->look = std::move(look);
}

std::vector<Session::CacheMemory> Session::cache_memory() const {
  std::vector<CacheMemory> found;
  for (const auto& [name, cache] : impl_->kv) found.push_back({name, cache.data(), cache.bytes()});
  return found;
}

void Session::pretend(int64_t position) {
  Turn turn(impl_->busy, *impl_->timeline);
  if (position < 0 || position > impl_->shared.artifact.max_seq_len)
    fail("position ", position, ": the artifact holds ", impl_->shared.artifact.max_seq_len, " tokens");
  impl_->lineage.cut(0);
  impl_->pretended = true;
  impl_->position = position;
  impl_->next = 0;
  impl_->in_step = impl_->handed_out = false;
}

MemoryReport Session::memory() const {
  const Impl& s = *impl_;
  Turn turn(s.busy, *s.timeline);
  MemoryReport report;
  s.shared.count(&report);
  for (const KvSpec& k : s.shared.artifact.kv) (k.ring ? report.kv_ring : k.state ? report.kv_state : report.kv_global) += k.bytes;
  s.timeline->measure(report);
  return report;
}

int64_t Session::early_launches() const { return impl_->timeline->early_launches(); }

const Model& Session::model() const { return *impl_->model; }

}  // namespace kiln
