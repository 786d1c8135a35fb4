#include "kiln/session.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/StreamGuard.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <set>

#include "model_impl.h"

namespace kiln {

namespace {

using TensorMap = std::unordered_map<std::string, at::Tensor>;

size_t index_of(const std::vector<ValueSpec>& values, const char* name) {
  auto it = std::find_if(values.begin(), values.end(), [&](const ValueSpec& v) { return v.name == name; });
  return static_cast<size_t>(it - values.begin());
}

// One compiled model of the package, opened for one session.
class CompiledModel {
 public:
  CompiledModel(const Model::Impl& model, const char* name, const EntryPoint& point)
      : name_(name),
        package_(model.artifact.path(model.target->file)),
        point_(point),
        token_(index_of(point.outputs, "token")),
        logits_(index_of(point.outputs, "logits")),
        loader_(open(model.backend->device())) {}

  // Gives the compiled model its constants, views of `tensors`. Returns the names it uses.
  // AOTInductor checks neither dtype nor completeness of user-managed constants, and runs into a segfault without them.
  std::set<std::string> bind(const TensorMap& tensors) {
    TensorMap used;
    std::set<std::string> names;
    auto dtypes = loader_->get_runner()->getConstantNamesToDtypes();
    for (const auto& [inner, fqn] : loader_->get_runner()->getConstantNamesToOriginalFQNs()) {
      auto it = tensors.find(fqn);
      if (it == tensors.end()) fail(package_, ": '", name_, "' uses the constant '", fqn, "', which the manifest does not name");
      auto dtype = static_cast<at::ScalarType>(dtypes.at(inner));
      if (dtype != it->second.scalar_type())
        fail(package_, ": '", name_, "' wants '", fqn, "' as ", at::toString(dtype), ", the manifest has ", at::toString(it->second.scalar_type()));
      used[fqn] = it->second;
      names.insert(fqn);
    }
    if (!used.empty()) loader_->load_constants(used, /*use_inactive=*/false, /*check_full_update=*/true, /*user_managed=*/true);
    return names;
  }

  struct Output {
    at::Tensor token, logits;  // [1] int64, [1, V] float32
  };
  Output run(const TensorMap& values, void* stream) {
    std::vector<at::Tensor> inputs;
    for (const ValueSpec& v : point_.inputs) inputs.push_back(values.at(v.name));
    std::vector<at::Tensor> out;
    try {
      out = loader_->run(inputs, stream);
    } catch (const c10::Error& e) {
      fail(package_, ": '", name_, "' failed: ", e.what_without_backtrace());
    } catch (const std::exception& e) {
      fail(package_, ": '", name_, "' failed: ", e.what());
    }
    if (out.size() != point_.outputs.size()) fail(package_, ": '", name_, "' gave ", out.size(), " outputs, the manifest says ", point_.outputs.size());
    return {out[token_], out[logits_]};
  }

 private:
  std::unique_ptr<torch::inductor::AOTIModelPackageLoader> open(c10::Device device) {
    try {
      // A single-threaded runner: the default one queries events, which a CUDA graph capture forbids.
      return std::make_unique<torch::inductor::AOTIModelPackageLoader>(package_, name_, /*run_single_threaded=*/true, /*num_runners=*/1,
                                                                       device.is_cuda() ? device.index() : -1);
    } catch (const c10::Error& e) {
      fail(package_, ": cannot open the model '", name_, "': ", e.what_without_backtrace());
    } catch (const std::exception& e) {
      fail(package_, ": cannot open the model '", name_, "': ", e.what());
    }
  }

  std::string name_, package_;
  const EntryPoint& point_;
  size_t token_, logits_;
  std::unique_ptr<torch::inductor::AOTIModelPackageLoader> loader_;
};

}  // namespace

struct Session::Impl {
  Impl(std::shared_ptr<const Model> m, const SessionOptions& options);

  int64_t append(const std::vector<int64_t>& tokens);
  int64_t step();
  Stop generate(int64_t max_new_tokens, const std::function<bool(int64_t)>& on_token, bool stop_at_eog);
  void reset();
  void set_sampling(const Sampling& sampling);

  void make_caches();
  void bind_constants();
  void warm_up(const SessionOptions& options);
  void check_tokens(const std::vector<int64_t>& tokens) const;
  void prefill_chunk(const int64_t* tokens, int64_t n);
  void run_step();
  void launch();
  void next_step() { launch(), timeline->send(values.at("tokens")), next = timeline->receive(), handed_out = false; }
  void zero_caches() {
    for (auto& [name, cache] : kv) cache.zero_();
  }
  const std::vector<float>& host_logits();
  void took_logits() {
    if (sink) sink(host_logits());
  }

  // Destroyed in reverse: the timeline's graph first, then the compiled models, then the tensors whose addresses they hold.
  std::shared_ptr<const Model> model;
  const Model::Impl& shared;
  int64_t chunk = 0;
  TensorMap kv;      // by fully qualified name
  TensorMap values;  // inputs of the decode step at fixed addresses: tokens [1], pos [1], the sampling inputs [1]
  CompiledModel prefill, decode;
  std::unique_ptr<Timeline> timeline;

  at::Tensor logits;        // [1, V] of the last run
  at::Tensor graph_logits;  // the graph's own output; undefined: there is no graph
  std::vector<float> logits_copy;
  bool copied = false;

  int64_t position = 0;     // tokens in the caches
  int64_t next = -1;        // sampled, not fed yet; -1: none
  bool handed_out = false;  // generate() has given `next` to its caller
  bool in_step = false;     // the device's tokens and pos hold `next` and `position`
  std::function<void(const std::vector<float>&)> sink;
};

namespace {

// What every call of a session runs under.
struct Scope {
  explicit Scope(const Timeline& timeline) : stream(timeline.stream()) {}
  c10::InferenceMode inference;
  c10::OptionalStreamGuard stream;
};

}  // namespace

Session::Impl::Impl(std::shared_ptr<const Model> m, const SessionOptions& options)
    : model(std::move(m)),
      shared(model->impl()),
      prefill(shared, "prefill", shared.artifact.prefill),
      decode(shared, "decode", shared.artifact.decode),
      timeline(shared.backend->make_timeline()) {
  const Artifact& artifact = shared.artifact;
  chunk = options.prefill_chunk ? options.prefill_chunk : artifact.prefill_chunk;
  if (chunk < 1 || chunk > artifact.prefill_chunk) fail("prefill chunk ", chunk, ": the artifact takes 1 to ", artifact.prefill_chunk, " tokens at a time");
  Scope scope(*timeline);
  make_caches();
  bind_constants();
  at::TensorOptions on(shared.backend->device());
  values = {{"tokens", at::zeros({1}, on.dtype(at::kLong))},       {"pos", at::zeros({1}, on.dtype(at::kLong))},
            {"temperature", at::zeros({1}, on.dtype(at::kFloat))}, {"top_k", at::zeros({1}, on.dtype(at::kInt))},
            {"top_p", at::full({1}, 1.0, on.dtype(at::kFloat))},   {"seed", at::zeros({1}, on.dtype(at::kLong))}};
  for (const EntryPoint* point : {&artifact.prefill, &artifact.decode})
    for (const ValueSpec& v : point->inputs)
      if (scalar_type(v.dtype) != values.at(v.name).scalar_type())
        fail("manifest.json: the input '", v.name, "' is ", dtype_name(v.dtype), ", this runner gives ", at::toString(values.at(v.name).scalar_type()));
  if (timeline->asynchronous()) warm_up(options);
}

void Session::Impl::make_caches() {
  uint64_t need = 0;
  for (const KvSpec& k : shared.artifact.kv) need += k.bytes;
  uint64_t free = shared.backend->free_bytes();
  if (need > free)
    fail("the KV caches for ", shared.artifact.max_seq_len, " tokens take ", gigabytes(need), " (", need, " bytes), ", shared.backend->device().str(), " has ",
         gigabytes(free), " (", free, " bytes) free; export with a smaller --max-seq-len");
  for (const KvSpec& k : shared.artifact.kv) kv[k.name] = at::zeros(k.shape, at::TensorOptions(shared.backend->device()).dtype(scalar_type(k.dtype)));
}

void Session::Impl::bind_constants() {
  TensorMap all = shared.constants;
  for (const auto& [name, cache] : kv)
    if (!all.emplace(name, cache).second) fail("manifest.json: '", name, "' is both a constant and a KV cache");
  std::set<std::string> used = prefill.bind(all);
  used.merge(decode.bind(all));
  for (const auto& [name, tensor] : all)
    if (!used.count(name)) fail("manifest.json names '", name, "', which the compiled models do not use; export the model again");
}

// First runs load the kernels and make the libraries' workspaces: a capture cannot do that, and a first prompt should not.
// They write to the caches, which are zeroed again afterwards.
// The longest prefill goes first: memory that shorter ones had split into pieces would be too small for it.
void Session::Impl::warm_up(const SessionOptions& options) {
  if (int64_t n = std::min(chunk, shared.artifact.max_seq_len); n >= 2) {
    TensorMap longest = values;
    longest["tokens"] = at::zeros({n}, values.at("tokens").options());
    longest["pos"] = at::arange(n, values.at("pos").options());
    prefill.run(longest, timeline->handle());
  }
  for (int i = 0; i < 2; ++i) {
    values.at("pos").zero_();
    run_step();
  }
  if (options.graph) {
    values.at("pos").zero_();
    // Before compute capability 9.0 no kernel can wait inside.
    bool early = options.early_launch && shared.target->major >= 9;
    timeline->capture([this] { run_step(); }, early ? shared.artifact.decode.waits : std::vector<std::string>());
    graph_logits = logits;
  }
  zero_caches();
  logits.reset();
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

void Session::Impl::prefill_chunk(const int64_t* tokens, int64_t n) {
  at::Tensor host = at::empty({n}, at::TensorOptions(at::kLong));
  std::memcpy(host.mutable_data_ptr<int64_t>(), tokens, static_cast<size_t>(n) * sizeof(int64_t));
  TensorMap inputs = values;
  inputs["tokens"] = host.to(shared.backend->device());
  inputs["pos"] = at::arange(position, position + n, values.at("pos").options());
  auto out = prefill.run(inputs, timeline->handle());
  position += n;
  logits = out.logits;
  copied = false;
  values.at("tokens").copy_(out.token);
  values.at("pos").fill_(position);
  in_step = true;
  took_logits();
}

// The decode step: everything in here is captured. The sampled token and the position after it stay on the device.
void Session::Impl::run_step() {
  auto out = decode.run(values, timeline->handle());
  values.at("tokens").copy_(out.token);
  values.at("pos").add_(1);
  logits = out.logits;
}

void Session::Impl::launch() {
  if (!in_step) {
    values.at("tokens").fill_(next);
    values.at("pos").fill_(position);
    in_step = true;
  }
  if (graph_logits.defined())
    timeline->replay(), logits = graph_logits;
  else
    run_step();
  ++position;
  copied = false;
  took_logits();
}

const std::vector<float>& Session::Impl::host_logits() {
  if (!logits.defined()) fail("no logits: nothing has run, or the last step was discarded");
  if (!copied) {
    at::Tensor host = logits.to(at::kCPU).contiguous();
    const auto* p = host.const_data_ptr<float>();
    logits_copy.assign(p, p + host.numel());
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

int64_t Session::Impl::append(const std::vector<int64_t>& tokens) {
  Scope scope(*timeline);
  check_tokens(tokens);
  auto total = static_cast<int64_t>(tokens.size());
  for (int64_t at = 0; at < total;) {
    int64_t n = std::min(chunk, total - at);
    if (n > 1) {
      prefill_chunk(&tokens[static_cast<size_t>(at)], n);
    } else {  // a prefill call takes two tokens or more
      next = tokens[static_cast<size_t>(at)];
      in_step = false;
      launch();
    }
    at += n;
  }
  timeline->send(values.at("tokens"));
  next = timeline->receive();
  handed_out = false;
  return next;
}

int64_t Session::Impl::step() {
  if (next < 0) fail("decode() before prefill(): there is no token to feed");
  if (position >= shared.artifact.max_seq_len) fail("the cache is full: the artifact holds ", shared.artifact.max_seq_len, " tokens");
  Scope scope(*timeline);
  next_step();
  return next;
}

Stop Session::Impl::generate(int64_t max_new_tokens, const std::function<bool(int64_t)>& on_token, bool stop_at_eog) {
  if (max_new_tokens < 1) fail("max_new_tokens is ", max_new_tokens, ", must be 1 or more");
  if (next < 0) fail("generate() before prefill(): there is no token to start from");
  Scope scope(*timeline);
  const int64_t most = shared.artifact.max_seq_len;
  if (handed_out) {
    if (position >= most) return Stop::MaxSeqLen;
    next_step();
  }
  // On a GPU one step stays queued behind the one whose token is awaited, so that the device never waits for the host.
  const int64_t depth = timeline->asynchronous() && !sink ? 2 : 1;
  int64_t unread = 0;  // steps launched whose token was not received
  auto discard = [&] {
    if (!unread) return;
    for (; unread; --unread, --position) timeline->receive();
    // The steps' cache entries lie at positions >= position, which the next tokens overwrite.
    in_step = false;
    logits.reset();
    copied = false;
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
      for (; unread < depth && position < most && produced + unread < max_new_tokens; ++unread) {
        launch();
        timeline->send(values.at("tokens"));
      }
      next = timeline->receive();
      handed_out = false;
      --unread;
    }
  } catch (...) {
    discard();
    throw;
  }
  discard();
  return stop;
}

void Session::Impl::reset() {
  Scope scope(*timeline);
  zero_caches();
  position = 0;
  next = -1;
  in_step = handed_out = copied = false;
  logits.reset();
}

void Session::Impl::set_sampling(const Sampling& sampling) {
  if (!(sampling.temperature >= 0) || !std::isfinite(sampling.temperature)) fail("temperature is ", sampling.temperature, ", must be 0 or more");
  if (sampling.top_k < 0) fail("top_k is ", sampling.top_k, ", must be 0 (off) or more");
  if (!(sampling.top_p > 0 && sampling.top_p <= 1)) fail("top_p is ", sampling.top_p, ", must be above 0 and at most 1");
  if (sampling.temperature > 0)
    for (const char* name : {"temperature", "top_k", "top_p", "seed"})
      if (index_of(shared.artifact.decode.inputs, name) == shared.artifact.decode.inputs.size())
        fail("the artifact is greedy only: its decode model has no input '", name, "'");
  Scope scope(*timeline);
  values.at("temperature").fill_(sampling.temperature);
  values.at("top_k").fill_(sampling.top_k);
  values.at("top_p").fill_(sampling.top_p);
  values.at("seed").fill_(sampling.seed);
}

Session::Session(std::shared_ptr<const Model> model, const SessionOptions& options)
    : impl_(guarded([&] { return std::make_unique<Impl>(std::move(model), options); })) {}
Session::~Session() = default;

int64_t Session::prefill(const std::vector<int64_t>& tokens) {
  return guarded([&] { return impl_->append(tokens); });
}
int64_t Session::decode() {
  return guarded([&] { return impl_->step(); });
}
int64_t Session::decode(int64_t token) {
  impl_->check_tokens({token});
  impl_->next = token;
  impl_->in_step = false;
  return decode();
}
Stop Session::generate(int64_t max_new_tokens, const std::function<bool(int64_t)>& on_token, bool stop_at_eog) {
  return guarded([&] { return impl_->generate(max_new_tokens, on_token, stop_at_eog); });
}
void Session::reset() {
  guarded([&] { impl_->reset(); });
}
void Session::set_sampling(const Sampling& sampling) {
  guarded([&] { impl_->set_sampling(sampling); });
}
const std::vector<float>& Session::logits() {
  return *guarded([&] {
    Scope scope(*impl_->timeline);
    return &impl_->host_logits();
  });
}
int64_t Session::position() const { return impl_->position; }
void Session::set_logits_sink(std::function<void(const std::vector<float>&)> sink) { impl_->sink = std::move(sink); }

MemoryReport Session::memory() const {
  const Impl& s = *impl_;
  MemoryReport report;
  for (const ConstantSpec& c : s.shared.artifact.constants) report.weights += c.bytes;
  for (const KvSpec& k : s.shared.artifact.kv) (k.ring ? report.kv_ring : report.kv_global) += k.bytes;
  report.graph = s.timeline->graph_bytes();
  s.shared.backend->measure(report);
  return report;
}

int64_t Session::early_launches() const { return impl_->timeline->early_launches(); }

const Model& Session::model() const { return *impl_->model; }

}  // namespace kiln
