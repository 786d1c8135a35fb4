#include "kiln/batch.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <deque>
#include <map>
#include <numeric>

#include "caches/not_finite.h"
#include "caches/snapshot_state.h"
#include "draft/drafting.h"
#include "draft/model_drafter.h"
#include "kiln/draft.h"
#include "model/compiled_model.h"
#include "model/turn.h"

namespace kiln {

namespace {

using Clock = std::chrono::steady_clock;

constexpr char kInUse[] = "the batch is in use by another thread";

struct RowDrafts {
  RowDrafts(int64_t most, bool model) : by_model(model), acceptance(most) {}
  bool by_model;       // else by what occurred before
  NgramDrafter ngram;  // its text is the timeline's, with what was sampled last
  Acceptance acceptance;
  std::vector<int64_t> now;  // of the step that is taken
};

// `position` and the rest of Caches are of the timeline in it, or of the one that was.
struct Row : Caches {
  using Caches::Caches;
  int64_t handle = -1;      // of the timeline that is in it, or that was the last
  bool in_use = false;
  Request request;          // prompt: what is to be fed now
  size_t read = 0;          // tokens of that which are in the caches
  bool by_steps = false;    // it takes steps, as sampled tokens do
  int64_t next = -1;        // sampled, not fed yet
  int64_t produced = 0;     // tokens handed out
  std::vector<float> logits;
  std::unique_ptr<RowDrafts> drafts;  // null: none
  bool hidden = false;      // that of the token before `next` is in the batch's rows of them

  bool used() const { return in_use; }
  size_t left() const { return request.prompt.size() - read; }  // of the prompt
  // A prompt's last token is a step's, as any other: a prefill call takes two or more.
  bool steps() const { return used() && (by_steps || left() <= 1); }
  bool waits() const { return used() && !steps(); }
  int64_t token() const { return left() ? request.prompt[read] : next; }
  void feed(std::vector<int64_t> tokens, bool one_by_one) { request.prompt = std::move(tokens), read = 0, by_steps = one_by_one, next = -1; }
  void end() { in_use = false, feed({}, false); }
  void clear() { lineage.cut(0), position = written = 0, logits.clear(); }
};

constexpr uint64_t kBetween = 64;  // bytes, of what inputs begin at a multiple of: compiled code asks for 16

// A token of a step.
struct Place {
  int64_t token, position, row;
  Sampling sampling;
};

// A decode entry: what it is given at fixed addresses, and on a GPU its recording.
struct Step {
  std::unique_ptr<CompiledModel> model;
  Tensor block, host;  // all inputs, on the device and as the host writes them: one copy takes them there
  TensorMap values;    // views of the block
  std::map<std::string, uint64_t> offsets;
  int64_t tokens = 0;
  CompiledModel::Output out;
  std::optional<size_t> recording;
  int64_t runs = 0;
};

}  // namespace

struct Batch::Impl {
  Impl(std::shared_ptr<const Model> m, const BatchOptions& options);
  ~Impl();

  int64_t join(const Request& request);
  void extend(Row& row, const std::vector<int64_t>& tokens, bool by_steps);
  std::vector<RowEvent> step();

  void make_caches();
  TensorMap row_tensors(int64_t row) const;  // one timeline's slices of the caches, and the weights
  CompiledModel& prefill_of(int64_t row);
  Step& decode_of(int64_t row);
  Step make_step(const std::string& entry, int64_t tokens, const TensorMap& tensors);
  void run(Step& step);
  void record(Step& step, const std::string& entry);
  void warm_up();
  CompiledModel::Output run_prefill(int64_t row, const int64_t* tokens, int64_t n, int64_t position);
  void write(Step& step, const std::vector<Place>& places);
  BatchProbe probe(const std::vector<int64_t>& tokens, const std::vector<int64_t>& positions, const std::vector<int64_t>& numbers,
                   const std::vector<Sampling>& sampling, int64_t times);
  void read_chunk(int64_t row, std::vector<RowEvent>& events);
  void take_step(const std::vector<int64_t>& rows, std::vector<RowEvent>& events);
  RowEvent took(int64_t row, int64_t token);
  void draft(const std::vector<int64_t>& rows);
  void keep_hidden(int64_t row, const Tensor& lines, int64_t at);
  Tensor hidden_of(int64_t row) const { return line_of(hidden, row); }
  void keep_logits(Row& row, const Tensor& logits, int64_t at);
  void check_tokens(const std::vector<int64_t>& tokens, int64_t after, const char* what) const;
  Row& free_row(const Request& request);
  // Rows of the caches: an entry of several tokens may touch all that it was compiled for.
  int64_t made() const { return shared.artifact.steps().empty() ? options.rows : shared.artifact.rows; }
  std::vector<int64_t> in_order(bool (Row::*which)() const) const;  // numbers of rows, the one that joined first first
  Row& row_of(int64_t handle);
  size_t next_reader() const;

  std::shared_ptr<const Model> model;
  const Model::Impl& shared;
  BatchOptions options;
  int64_t chunk = 0;
  std::unique_ptr<Timeline> timeline;
  Surroundings prefill_surroundings, decode_surroundings;
  TensorMap kv;  // [made(), ...] by fully qualified name
  TensorMap prefill_values;  // the sampling inputs [1]
  std::vector<std::unique_ptr<CompiledModel>> prefills;  // of each row
  std::vector<std::unique_ptr<Step>> decodes;
  std::map<int64_t, Step> several;  // by their number of tokens
  std::unique_ptr<ModelDrafter> drafter;  // made when a timeline asks for it
  Tensor hidden;                          // [rows, D], what it is given of each
  std::deque<Row> rows;
  int64_t last_handle = 0;
  StepCosts costs;
  DraftCounts counts;
  size_t read_last = 0;  // number of the row whose prompt a chunk was read of last
  mutable std::atomic<bool> busy{false};
};

static std::vector<int64_t> all_sizes(const Artifact& artifact) {
  std::vector<int64_t> sizes = artifact.steps();
  sizes.insert(sizes.begin(), 1);
  return sizes;
}

Batch::Impl::Impl(std::shared_ptr<const Model> m, const BatchOptions& o)
    : model(std::move(m)), shared(model->impl()), options(o), timeline(shared.backend->make_timeline()), costs(all_sizes(shared.artifact)) {
  const Artifact& artifact = shared.artifact;
  chunk = options.prefill_chunk ? options.prefill_chunk : artifact.prefill_chunk;
  counts.tried.resize(static_cast<size_t>(costs.sizes().back() - 1)), counts.right = counts.tried;
  if (chunk < 2 || chunk > artifact.prefill_chunk) fail("prefill chunk ", chunk, ": the artifact takes 2 to ", artifact.prefill_chunk, " tokens at a time");
  if (options.rows == 0) options.rows = artifact.rows;
  if (options.rows < 1 || options.rows > artifact.rows)
    fail(options.rows, " rows: the artifact takes 1 to ", artifact.rows, "; export it with a larger --rows");
  if (!(options.max_gap_ms >= 0)) fail("max_gap_ms is ", options.max_gap_ms, ", must be 0 or more");
  for (int64_t i = 0; i < options.rows; ++i) rows.emplace_back(model);
  prefills.resize(rows.size()), decodes.resize(rows.size());
  Entered entered(*timeline);
  prefill_surroundings = timeline->surroundings("prefill");
  decode_surroundings = timeline->surroundings("decode");
  make_caches();
  for (size_t i = 0; i < rows.size(); ++i) {
    rows[i].line = timeline.get(), rows[i].taken = &busy, rows[i].kv = row_tensors(static_cast<int64_t>(i));
    for (const auto& [name, weight] : shared.constants) rows[i].kv.erase(name);
  }
  for (const ValueSpec& v : artifact.entry("prefill").inputs)
    if (v.name != "tokens" && v.name != "pos") prefill_values.emplace(v.name, timeline->make(scalar_of(v.dtype), {1}));
  TensorMap tensors = shared.constants;
  for (const auto& [name, cache] : kv) tensors.emplace(name, cache);
  for (int64_t m : artifact.steps()) several.emplace(m, make_step("decode_" + std::to_string(m), m, tensors));
  if (timeline->asynchronous()) warm_up();
}

// Work may be queued that uses the memory which goes now.
Batch::Impl::~Impl() {
  try {
    Entered entered(*timeline);
    timeline->synchronize();
  } catch (const Error&) {  // a device that failed has told its user already
  }
}

void Batch::Impl::make_caches() {
  uint64_t need = 0;
  for (const KvSpec& k : shared.artifact.kv) need += k.bytes;
  need *= static_cast<uint64_t>(made());
  const uint64_t free = shared.backend->free_bytes();
  if (need > free)
    fail("the KV caches of ", made(), " rows for ", shared.artifact.max_seq_len, " tokens take ", gigabytes(need), " (", need, " bytes), ",
         shared.backend->device().str(), " has ", gigabytes(free), " (", free, " bytes) free; give fewer rows, or export with a smaller --max-seq-len");
  for (const KvSpec& k : shared.artifact.kv) {
    std::vector<int64_t> shape{made()};
    shape.insert(shape.end(), k.shape.begin(), k.shape.end());
    kv[k.name] = timeline->make(scalar_of(k.dtype), shape);
  }
}

TensorMap Batch::Impl::row_tensors(int64_t row) const {
  TensorMap all = shared.constants;
  for (const KvSpec& k : shared.artifact.kv) {
    auto* data = static_cast<char*>(kv.at(k.name).data()) + static_cast<uint64_t>(row) * k.bytes;
    if (!all.emplace(k.name, Tensor::over(data, shared.backend->device(), scalar_of(k.dtype), k.shape)).second)
      fail("manifest.json: '", k.name, "' is both a constant and a KV cache");
  }
  return all;
}

CompiledModel& Batch::Impl::prefill_of(int64_t row) {
  auto& found = prefills[static_cast<size_t>(row)];
  if (!found) {
    auto made = std::make_unique<CompiledModel>(shared, "prefill", prefill_surroundings);
    made->bind(row_tensors(row));
    found = std::move(made);
  }
  return *found;
}

Step& Batch::Impl::decode_of(int64_t row) {
  auto& found = decodes[static_cast<size_t>(row)];
  if (!found) found = std::make_unique<Step>(make_step("decode", 1, row_tensors(row)));
  return *found;
}

Step Batch::Impl::make_step(const std::string& entry, int64_t tokens, const TensorMap& tensors) {
  Step step;
  step.model = std::make_unique<CompiledModel>(shared, entry, decode_surroundings);
  step.model->bind(tensors);
  uint64_t end = 0;
  for (const ValueSpec& v : shared.artifact.entry(entry).inputs) {
    const bool known = v.name == "temperature" || v.name == "top_p" ? v.dtype == DType::F32
                       : v.name == "top_k"                          ? v.dtype == DType::I32
                       : v.name == "tokens" || v.name == "pos" || v.name == "row" || v.name == "seed" ? v.dtype == DType::I64
                                                                                                       : false;
    if (!known) fail("manifest.json: the input '", v.name, "' (", dtype_name(v.dtype), ") of ", entry, " is none that this runner gives");
    step.offsets.emplace(v.name, end);
    end += (scalar_bytes(scalar_of(v.dtype)) * static_cast<uint64_t>(tokens) + kBetween - 1) / kBetween * kBetween;
  }
  step.tokens = tokens;
  step.block = timeline->make(Scalar::U8, {static_cast<int64_t>(end)});
  step.host = shared.backend->keep(end, true);
  std::memset(step.host.data(), 0, end);
  for (const ValueSpec& v : shared.artifact.entry(entry).inputs)
    step.values.emplace(v.name, Tensor::over(static_cast<char*>(step.block.data()) + step.offsets.at(v.name), shared.backend->device(), scalar_of(v.dtype), {tokens}));
  return step;
}

void Batch::Impl::run(Step& step) {
  if (step.recording)
    timeline->replay(*step.recording);
  else
    step.out = CompiledModel::Output(), step.out = step.model->run(step.values);
}

void Batch::Impl::record(Step& step, const std::string& entry) {
  for (int i = 0; i < 2; ++i) run(step);
  if (!options.graph) return;
  const bool early = options.early_launch && shared.target->major >= 9;
  step.recording = timeline->capture([&] { step.out = CompiledModel::Output(), step.out = step.model->run(step.values); },
                                     early ? shared.artifact.entry(entry).waits : std::vector<std::string>());
}

// As Session's: the longest prefill first, then each decode entry twice and once more to be recorded.
void Batch::Impl::warm_up() {
  if (int64_t n = std::min(chunk, shared.artifact.max_seq_len); n >= 2) {
    const std::vector<int64_t> zeros(static_cast<size_t>(n), 0);
    run_prefill(0, zeros.data(), n, 0);
  }
  for (int64_t row = 0; row < options.rows; ++row) prefill_of(row), record(decode_of(row), "decode");
  for (auto& [m, step] : several) record(step, "decode_" + std::to_string(m));
  for (auto& [name, cache] : kv) timeline->zero(cache);
  timeline->synchronize();
}

void Batch::Impl::check_tokens(const std::vector<int64_t>& tokens, int64_t after, const char* what) const {
  if (tokens.empty()) fail("the ", what, " has no tokens");
  for (int64_t t : tokens)
    if (t < 0 || t >= shared.vocab_size) fail("token ", t, " is outside of the vocabulary of ", shared.vocab_size);
  if (static_cast<int64_t>(tokens.size()) > shared.artifact.max_seq_len - after)
    fail("the ", what, " has ", tokens.size(), " tokens", after ? " after " + std::to_string(after) + " in the cache" : "", ", the artifact holds ",
         shared.artifact.max_seq_len, "; shorten it or export with a larger --max-seq-len");
}

// The row that the request asks for; or a free one, an empty one first, then the one whose timeline joined first.
Row& Batch::Impl::free_row(const Request& request) {
  if (request.row < 0) {
    Row* found = nullptr;
    auto age = [](const Row& r) { return std::pair(r.position > 0, r.handle); };
    for (Row& r : rows)
      if (!r.used() && (!found || age(r) < age(*found))) found = &r;
    if (!found) fail("all ", rows.size(), " rows of the batch are in use; wait until one leaves");
    return *found;
  }
  if (request.row >= options.rows) fail("row ", request.row, ": the batch has ", options.rows);
  Row& row = rows[static_cast<size_t>(request.row)];
  if (row.used()) fail("row ", request.row, " is in use by timeline ", row.handle);
  const int64_t held = row.position;
  if (held >= static_cast<int64_t>(request.prompt.size()) || !std::equal(request.prompt.begin(), request.prompt.begin() + held, row.lineage.ids().begin()))
    fail("row ", request.row, " holds ", held, " tokens with which the prompt does not begin, or behind which none is left; rewind() it");
  return row;
}

int64_t Batch::Impl::join(const Request& request) {
  check_tokens(request.prompt, 0, "prompt");
  if (request.max_new_tokens < 0) fail("max_new_tokens is ", request.max_new_tokens, ", must be 0 (as many as fit) or more");
  check_sampling(request.sampling);
  if (request.drafting.own) fail("drafts of a batch: a drafter of one's own is a session's");
  const bool drafts = request.drafting.source != DraftSource::Off;
  const int64_t most = drafts ? step_sizes(shared.artifact, request.drafting).back() - 1 : 0;
  const auto& values = decode_of(0).values;
  if (request.sampling.temperature > 0)
    for (const char* name : {"temperature", "top_k", "top_p", "seed"})
      if (!values.count(name)) fail("the artifact is greedy only: its decode model has no input '", name, "'");
  const bool by_model = request.drafting.source == DraftSource::Mtp;
  if (by_model && !drafter) {
    TensorMap tensors = shared.constants;
    tensors.insert(kv.begin(), kv.end());
    auto opened = std::make_unique<ModelDrafter>(shared, *timeline, decode_surroundings, tensors, options.graph, options.early_launch);
    hidden = timeline->make(Scalar::F32, {options.rows, shared.artifact.hidden_size()});
    drafter = std::move(opened);
  }
  Row& row = free_row(request);
  if (request.row < 0) row.clear();
  row.request = request;
  row.feed({request.prompt.begin() + row.position, request.prompt.end()}, false);
  row.produced = 0, row.in_use = true, row.handle = ++last_handle;
  row.logits.clear();
  row.hidden = false;
  row.drafts = drafts ? std::make_unique<RowDrafts>(most, by_model) : nullptr;
  if (drafts && !by_model) row.drafts->ngram.append(request.prompt);
  return last_handle;
}

void Batch::Impl::extend(Row& row, const std::vector<int64_t>& tokens, bool by_steps) {
  if (row.left()) fail("timeline ", row.handle, " has ", row.left(), " tokens still to be read");
  check_tokens(tokens, row.position, "text");
  if (row.next >= 0 && row.produced) --row.produced;
  if (row.drafts && !row.drafts->by_model) {
    if (row.next >= 0) row.drafts->ngram.cut(row.drafts->ngram.length() - 1);
    row.drafts->ngram.append(tokens);
  }
  row.feed(tokens, by_steps);
}

std::vector<int64_t> Batch::Impl::in_order(bool (Row::*which)() const) const {
  std::vector<int64_t> found;
  for (size_t i = 0; i < rows.size(); ++i)
    if ((rows[i].*which)()) found.push_back(static_cast<int64_t>(i));
  std::sort(found.begin(), found.end(), [&](int64_t a, int64_t b) { return rows[static_cast<size_t>(a)].handle < rows[static_cast<size_t>(b)].handle; });
  return found;
}

Row& Batch::Impl::row_of(int64_t handle) {
  for (Row& row : rows)
    if (row.used() && row.handle == handle) return row;
  fail("no timeline ", handle, " is in the batch: it has ended or left, or never was");
}

CompiledModel::Output Batch::Impl::run_prefill(int64_t row, const int64_t* tokens, int64_t n, int64_t position) {
  std::vector<int64_t> positions(static_cast<size_t>(n));
  std::iota(positions.begin(), positions.end(), position);
  TensorMap inputs = prefill_values;
  for (const auto& [name, from] : {std::pair("tokens", tokens), std::pair("pos", static_cast<const int64_t*>(positions.data()))}) {
    inputs[name] = Tensor::make(prefill_surroundings.memory, shared.backend->device(), Scalar::I64, {n});
    timeline->write(inputs[name], from);
  }
  return prefill_of(row).run(inputs);
}

// The token was sampled for the row: what becomes of it.
RowEvent Batch::Impl::took(int64_t number, int64_t token) {
  Row& row = rows[static_cast<size_t>(number)];
  RowEvent event;
  event.handle = row.handle;
  if (token < 0) {
    event.error = "the logits after position " + std::to_string(row.position - 1) + " are not finite: " +
                  trace_not_finite(shared.artifact, *timeline, shared.constants, row.kv, row.position);
    row.end(), row.clear();
    return event;
  }
  row.next = token;
  if (row.drafts && !row.drafts->by_model) row.drafts->ngram.append({token});
  if (row.request.stop_at_eog && model->is_eog(token)) {
    event.stop = Stop::Eog;
  } else {
    event.token = token;
    ++row.produced;
    if (row.request.max_new_tokens && row.produced >= row.request.max_new_tokens)
      event.stop = Stop::Length;
    else if (row.position >= shared.artifact.max_seq_len)
      event.stop = Stop::MaxSeqLen;
  }
  if (event.stop) row.end();
  return event;
}

// The logits of a run that sampled the row's token are its line `at`.
void Batch::Impl::keep_logits(Row& row, const Tensor& logits, int64_t at) {
  if (!options.keep_logits && !row.request.keep_logits) return;
  if (!logits.dense()) fail("internal error: logits with gaps");
  row.logits.resize(static_cast<size_t>(shared.vocab_size));
  auto* line = static_cast<char*>(logits.data()) + static_cast<uint64_t>(at * shared.vocab_size) * sizeof(float);
  timeline->read(row.logits.data(), Tensor::over(line, logits.device, Scalar::F32, {shared.vocab_size}));
}

// Line `at` of what a run gave is the hidden row of the token that the row has fed last.
void Batch::Impl::keep_hidden(int64_t number, const Tensor& lines, int64_t at) {
  Row& row = rows[static_cast<size_t>(number)];
  if (!row.drafts || !row.drafts->by_model) return;
  timeline->copy(hidden_of(number), line_of(lines, at));
  row.hidden = true;
}

void Batch::Impl::read_chunk(int64_t number, std::vector<RowEvent>& events) {
  Row& row = rows[static_cast<size_t>(number)];
  const auto n = std::min(chunk, static_cast<int64_t>(row.left()));
  const Sampling& s = row.request.sampling;
  for (const auto& [name, t] : prefill_values) {
    if (name == "temperature") timeline->fill(t, s.temperature);
    if (name == "top_k") timeline->fill(t, int64_t{s.top_k});
    if (name == "top_p") timeline->fill(t, s.top_p);
    if (name == "seed") timeline->fill(t, s.seed);
  }
  CompiledModel::Output out = run_prefill(number, &row.request.prompt[row.read], n, row.position);
  int64_t token = 0;
  timeline->read(&token, out.token);
  row.wrote(&row.request.prompt[row.read], n);
  row.read += static_cast<size_t>(n);
  if (row.left()) return;
  keep_hidden(number, out.hidden, 0);
  keep_logits(row, out.logits, 0);
  events.push_back(took(number, token));
}

// What step.values hold for `places`; the last is repeated where the entry takes more: it writes what it has written. The step before has been
// waited for, so that nothing reads step.host.
void Batch::Impl::write(Step& step, const std::vector<Place>& places) {
  auto put = [&](const char* name, size_t i, auto value) {
    if (auto found = step.offsets.find(name); found != step.offsets.end())
      std::memcpy(static_cast<char*>(step.host.data()) + found->second + i * sizeof value, &value, sizeof value);
  };
  for (size_t i = 0; i < static_cast<size_t>(step.tokens); ++i) {
    const Place& p = places[std::min(i, places.size() - 1)];
    put("tokens", i, p.token), put("pos", i, p.position), put("row", i, p.row);
    put("temperature", i, p.sampling.temperature), put("top_k", i, int32_t{p.sampling.top_k}), put("top_p", i, p.sampling.top_p);
    put("seed", i, p.sampling.seed);
  }
  timeline->copy(step.block, step.host);
}

BatchProbe Batch::Impl::probe(const std::vector<int64_t>& tokens, const std::vector<int64_t>& positions, const std::vector<int64_t>& numbers,
                              const std::vector<Sampling>& sampling, int64_t times) {
  if (!in_order(&Row::used).empty()) fail("probe() while timelines are in the batch: it writes over what they have read");
  const auto m = static_cast<int64_t>(tokens.size());
  if (m != 1 && !several.count(m)) fail("probe() of ", m, " tokens: the artifact has no step of as many");
  if (positions.size() != tokens.size() || numbers.size() != tokens.size() || sampling.size() != tokens.size() || times < 1)
    fail("probe() of ", m, " tokens: ", positions.size(), " positions, ", numbers.size(), " rows, ", sampling.size(), " samplings, ", times, " times");
  std::vector<Place> places;
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (tokens[i] < 0 || tokens[i] >= shared.vocab_size || positions[i] < 0 || positions[i] >= shared.artifact.max_seq_len || numbers[i] < 0 ||
        numbers[i] >= options.rows)
      fail("probe(): token ", tokens[i], " at position ", positions[i], " of row ", numbers[i], " is outside of the artifact");
    check_sampling(sampling[i]);
    places.push_back({tokens[i], positions[i], numbers[i], sampling[i]});
  }
  for (Row& row : rows) row.clear();  // what it held is written over
  Step& step = m == 1 ? decode_of(numbers[0]) : several.at(m);
  write(step, places);
  timeline->synchronize();
  const auto began = Clock::now();
  for (int64_t i = 0; i < times; ++i) run(step);
  timeline->synchronize();
  BatchProbe found;
  found.seconds = std::chrono::duration<double>(Clock::now() - began).count();
  found.tokens.resize(tokens.size()), found.logits.resize(tokens.size() * static_cast<size_t>(shared.vocab_size));
  timeline->read(found.tokens.data(), step.out.token);
  timeline->read(found.logits.data(), step.out.logits);
  return found;
}

// What each of the timelines drafts for the step that all of them take.
void Batch::Impl::draft(const std::vector<int64_t>& numbers) {
  std::vector<std::vector<double>> chances(numbers.size());
  std::vector<double> seconds(numbers.size());
  int64_t room = costs.sizes().back() - static_cast<int64_t>(numbers.size());
  for (size_t i = 0; i < numbers.size(); ++i) {
    Row& row = rows[static_cast<size_t>(numbers[i])];
    if (!row.drafts) continue;
    row.drafts->now.clear();
    if (row.left() > 1) continue;  // what comes is given
    const int64_t length = row.request.drafting.length ? row.request.drafting.length : costs.sizes().back() - 1;
    int64_t most = std::min({length, room, shared.artifact.max_seq_len - row.position - 1});
    if (row.request.max_new_tokens) most = std::min(most, row.request.max_new_tokens - row.produced - 1);
    chances[i] = row.drafts->acceptance.chances();
    if (row.drafts->by_model) {
      seconds[i] = drafter->seconds();
      chances[i].resize(row.hidden && most > 0 ? static_cast<size_t>(most) : 0);
    } else {
      row.drafts->now = row.drafts->ngram.draft(most);
      chances[i].resize(row.drafts->now.size());
    }
  }
  const std::vector<int64_t> shares = share_drafts(chances, costs, seconds);
  for (int64_t share : shares) room -= share;
  for (size_t i = 0; i < numbers.size(); ++i) {
    Row& row = rows[static_cast<size_t>(numbers[i])];
    if (!row.drafts) continue;
    const int64_t offered = static_cast<int64_t>(chances[i].size()) - shares[i];
    const int64_t more = std::min(room, row.request.drafting.fixed ? offered : int64_t{!shares[i] && offered && row.drafts->acceptance.due()});
    room -= more;
    if (row.drafts->by_model && shares[i] + more > 0)
      row.drafts->now = drafter->draft({row.token(), row.position, numbers[i], hidden_of(numbers[i]), row.request.sampling}, shares[i] + more);
    else
      row.drafts->now.resize(static_cast<size_t>(shares[i] + more));
  }
}

void Batch::Impl::take_step(const std::vector<int64_t>& numbers, std::vector<RowEvent>& events) {
  draft(numbers);
  std::vector<Place> places;
  for (int64_t number : numbers) {
    const Row& r = rows[static_cast<size_t>(number)];
    places.push_back({r.token(), r.position, number, r.request.sampling});
    if (r.drafts)
      for (int64_t token : r.drafts->now) places.push_back({token, places.back().position + 1, number, r.request.sampling});
  }
  const auto size = static_cast<int64_t>(places.size());
  Step& step = size == 1 ? decode_of(numbers[0]) : several.lower_bound(size)->second;
  const auto began = Clock::now();
  write(step, places);
  run(step);
  std::vector<int64_t> tokens(static_cast<size_t>(step.out.token.numel()));
  timeline->read(tokens.data(), step.out.token);
  if (++step.runs > kColdRuns) costs.took(size, std::chrono::duration<double>(Clock::now() - began).count());
  int64_t at = 0;  // of the row's first token in the step
  for (int64_t number : numbers) {
    Row& row = rows[static_cast<size_t>(number)];
    const int64_t* sampled = &tokens[static_cast<size_t>(at)];
    const int64_t line = at, drafted = row.drafts ? static_cast<int64_t>(row.drafts->now.size()) : 0;
    const int64_t fed = row.token();
    at += drafted + 1;
    row.read += row.left() ? 1 : 0;
    row.written = std::max<int64_t>(row.written, row.position + drafted + 1);
    row.wrote(&fed, 1);
    keep_hidden(number, step.out.hidden, line);
    if (row.left() && *sampled >= 0) continue;  // the next is given
    int64_t agreed = 0;
    if (row.drafts) {
      agreed = Acceptance::agreed(row.drafts->now, {sampled, sampled + drafted + 1});
      if (agreed) keep_hidden(number, step.out.hidden, line + agreed);
      row.drafts->acceptance.took(drafted, agreed);
      for (int64_t i = 0; i < drafted && i <= agreed; ++i) ++counts.tried[static_cast<size_t>(i)], counts.right[static_cast<size_t>(i)] += i < agreed;
      ++counts.steps, counts.tokens += agreed + 1;
    }
    for (int64_t i = 0; i <= agreed; ++i) {
      if (i) row.wrote(&sampled[i - 1], 1);
      keep_logits(row, step.out.logits, line + i);
      events.push_back(took(number, sampled[i]));
      if (events.back().stop || !events.back().error.empty()) break;
    }
  }
}

// The row behind the one that was read last, of those whose prompts wait; rows.size(): none waits.
size_t Batch::Impl::next_reader() const {
  for (size_t i = 1; i <= rows.size(); ++i)
    if (const size_t number = (read_last + i) % rows.size(); rows[number].waits()) return number;
  return rows.size();
}

std::vector<RowEvent> Batch::Impl::step() {
  std::vector<RowEvent> events;
  const std::vector<int64_t> ready = in_order(&Row::steps);
  const auto began = Clock::now();
  auto milliseconds = [](Clock::duration d) { return std::chrono::duration<double, std::milli>(d).count(); };
  for (auto before = began;;) {
    const size_t next = next_reader();
    if (next == rows.size()) break;
    read_chunk(static_cast<int64_t>(read_last = next), events);
    const auto now = Clock::now();
    if (ready.empty() || milliseconds(now - began) + milliseconds(now - before) > options.max_gap_ms) break;
    before = now;
  }
  const size_t most = several.empty() ? 1 : static_cast<size_t>(several.rbegin()->first);
  for (size_t at = 0; at < ready.size(); at += most)
    take_step({ready.begin() + static_cast<int64_t>(at), ready.begin() + static_cast<int64_t>(std::min(at + most, ready.size()))}, events);
  return events;
}

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
BatchProbe Batch::probe(const std::vector<int64_t>& tokens, const std::vector<int64_t>& positions, const std::vector<int64_t>& rows,
                        const std::vector<Sampling>& sampling, int64_t times) {
  Turn turn(impl_->busy, *impl_->timeline, kInUse);
  return impl_->probe(tokens, positions, rows, sampling, times);
}
int64_t Batch::early_launches() const { return impl_->timeline->early_launches(); }
void Batch::leave(int64_t handle) {
  Turn turn(impl_->busy, *impl_->timeline, kInUse);
  impl_->row_of(handle).end();
}
void Batch::extend(int64_t handle, const std::vector<int64_t>& tokens, bool by_steps) {
  Turn turn(impl_->busy, *impl_->timeline, kInUse);
  impl_->extend(impl_->row_of(handle), tokens, by_steps);
}
BatchRow Batch::row(int64_t number) const {
  if (number < 0 || number >= impl_->options.rows) fail("row ", number, ": the batch has ", impl_->options.rows);
  return {impl_, number};
}
int64_t Batch::rows() const { return impl_->options.rows; }
int64_t Batch::active() const {
  Turn turn(impl_->busy, *impl_->timeline, kInUse);
  return static_cast<int64_t>(impl_->in_order(&Row::used).size());
}
int64_t Batch::position(int64_t handle) const {
  Turn turn(impl_->busy, *impl_->timeline, kInUse);
  return impl_->row_of(handle).position;
}
DraftCounts Batch::draft_counts() const {
  Turn turn(impl_->busy, *impl_->timeline, kInUse);
  return impl_->counts;
}
const std::vector<float>& Batch::logits(int64_t handle) const {
  Turn turn(impl_->busy, *impl_->timeline, kInUse);
  for (const Row& row : impl_->rows) {
    if (row.handle != handle) continue;
    if (!impl_->options.keep_logits && !row.request.keep_logits) fail("logits are kept only for a timeline or by a batch that is made with keep_logits");
    if (row.logits.empty()) fail("no logits: nothing was sampled for timeline ", handle);
    return row.logits;
  }
  fail("timeline ", handle, " is in no row: another has joined in its place, or it never was");
}

std::vector<Session::CacheMemory> Batch::cache_memory() const {
  std::vector<Session::CacheMemory> found;
  for (const auto& [name, cache] : impl_->kv) found.push_back({name, cache.data(), cache.bytes()});
  return found;
}

MemoryReport Batch::memory() const {
  const Impl& b = *impl_;
  Turn turn(b.busy, *b.timeline, kInUse);
  MemoryReport report;
  for (const ConstantSpec& c : b.shared.artifact.constants) report.weights += c.bytes;
  for (const KvSpec& k : b.shared.artifact.kv) (k.ring ? report.kv_ring : k.state ? report.kv_state : report.kv_global) += k.bytes * static_cast<uint64_t>(b.made());
  b.timeline->measure(report);
  return report;
}

const Model& BatchRow::model() const { return *batch_->model; }
int64_t BatchRow::position() const { return batch_->rows[static_cast<size_t>(number_)].position; }

// Runs f(row) as a call of the batch; `free`: only while no timeline is in it.
template <typename F>
static auto with_row(Batch::Impl& batch, int64_t number, bool free, F&& f) {
  Turn turn(batch.busy, *batch.timeline, kInUse);
  Row& row = batch.rows[static_cast<size_t>(number)];
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
bool BatchRow::can_restore(const Snapshot& snapshot) const {
  return with_row(*batch_, number_, false, [&](const Row& row) { return row.can_restore(snapshot); });
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
