#include <algorithm>
#include <chrono>

#include "batch/batch_impl.h"
#include "caches/not_finite.h"
#include "draft/drafting.h"
#include "model/turn.h"

namespace kiln {

namespace {

using Clock = std::chrono::steady_clock;

}  // namespace

Batch::Impl::Impl(std::shared_ptr<const Model> m, const BatchOptions& o)
    : model(std::move(m)), shared(model->impl()), options(o), timeline(shared.backend->make_timeline()) {
  const Artifact& artifact = shared.artifact;
  int64_t& chunk = options.prefill_chunk;
  if (chunk == 0) chunk = artifact.prefill_chunk;
  if (chunk < 2 || chunk > artifact.prefill_chunk) fail("prefill chunk ", chunk, ": the artifact takes 2 to ", artifact.prefill_chunk, " tokens at a time");
  if (options.rows == 0) options.rows = artifact.rows;
  if (options.rows < 1 || options.rows > artifact.rows)
    fail(options.rows, " rows: the artifact takes 1 to ", artifact.rows, "; export it with a larger --rows");
  if (!(options.max_gap_ms >= 0)) fail("max_gap_ms is ", options.max_gap_ms, ", must be 0 or more");
  options.read_by_step = read_by_step(artifact, *timeline, options.read_by_step);
  rows.emplace(model, options.rows);
  Entered entered(*timeline);
  entries.emplace(shared, *timeline, options);
  drafts.emplace(shared, *timeline, *entries, options);
  for (int64_t i = 0; i < options.rows; ++i) {
    Row& row = (*rows)[i];
    row.line = timeline.get(), row.taken = &busy, row.kv = entries->caches_of(i), row.read_by_step = options.read_by_step;
  }
}

// Work may be queued that uses the memory which goes now.
Batch::Impl::~Impl() {
  try {
    Entered entered(*timeline);
    timeline->synchronize();
  } catch (const Error&) {  // a device that failed has told its user already
  }
}

void Batch::Impl::check_tokens(const std::vector<int64_t>& tokens, int64_t after, const char* what) const {
  if (tokens.empty()) fail("the ", what, " has no tokens");
  for (int64_t t : tokens)
    if (t < 0 || t >= shared.vocab_size) fail("token ", t, " is outside of the vocabulary of ", shared.vocab_size);
  if (static_cast<int64_t>(tokens.size()) > shared.artifact.max_seq_len - after)
    fail("the ", what, " has ", tokens.size(), " tokens", after ? " after " + std::to_string(after) + " in the cache" : "", ", the artifact holds ",
         shared.artifact.max_seq_len, "; shorten it or export with a larger --max-seq-len");
}

int64_t Batch::Impl::join(const Request& request) {
  check_tokens(request.prompt, 0, "prompt");
  if (request.max_new_tokens < 0) fail("max_new_tokens is ", request.max_new_tokens, ", must be 0 (as many as fit) or more");
  check_sampling(request.sampling);
  if (request.drafting.own) fail("drafts of a batch: a drafter of one's own is a session's");
  const bool drafted = request.drafting.source != DraftSource::Off;
  const int64_t most = drafted ? step_sizes(shared.artifact, request.drafting).back() - 1 : 0;
  const auto& values = entries->decode(0).inputs.values();
  if (request.sampling.temperature > 0)
    for (const char* name : {"temperature", "top_k", "top_p", "seed"})
      if (!values.count(name)) fail("the artifact is greedy only: its decode model has no input '", name, "'");
  const bool by_model = request.drafting.source == DraftSource::Mtp;
  if (by_model) drafts->open_model();
  Row& row = rows->free_for(request);
  if (request.row < 0) row.clear();
  row.request = request;
  row.feed({request.prompt.begin() + row.position, request.prompt.end()}, false);
  row.produced = 0, row.in_use = true, row.handle = ++last_handle;
  row.logits.clear();
  row.hidden = false;
  row.drafts = drafted ? std::make_unique<RowDrafts>(most, by_model) : nullptr;
  if (drafted && !by_model) row.drafts->ngram.append(request.prompt);
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

// The token was sampled for the row: what becomes of it.
RowEvent Batch::Impl::took(Row& row, int64_t token) {
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

void Batch::Impl::read_chunk(int64_t number, std::vector<RowEvent>& events) {
  Row& row = (*rows)[number];
  const auto n = std::min(options.prefill_chunk, static_cast<int64_t>(row.left()));
  CompiledModel::Output out = entries->prefill(number, &row.request.prompt[row.read], n, row.position, row.request.sampling);
  int64_t token = 0;
  timeline->read(&token, out.token);
  row.wrote(&row.request.prompt[row.read], n);
  row.read += static_cast<size_t>(n);
  if (row.left()) return;
  drafts->keep_hidden(row, number, out.hidden, 0);
  keep_logits(row, out.logits, 0);
  events.push_back(took(row, token));
}

void Batch::Impl::take_step(const std::vector<int64_t>& numbers, std::vector<RowEvent>& events) {
  // Tokens that are given follow each other in one step, as far as there is room.
  int64_t room = entries->most() - static_cast<int64_t>(numbers.size());
  std::vector<int64_t> given;
  for (int64_t number : numbers) {
    given.push_back(std::clamp(static_cast<int64_t>((*rows)[number].left()) - 1, int64_t{0}, room));
    room -= given.back();
  }
  drafts->draft(*rows, numbers, room);
  std::vector<Entries::Place> places;
  for (size_t i = 0; i < numbers.size(); ++i) {
    const int64_t number = numbers[i];
    const Row& r = (*rows)[number];
    places.push_back({r.token(), r.position, number, r.request.sampling});
    for (int64_t j = 1; j <= given[i]; ++j)
      places.push_back({r.request.prompt[r.read + static_cast<size_t>(j)], places.back().position + 1, number, r.request.sampling});
    if (r.drafts)
      for (int64_t token : r.drafts->now) places.push_back({token, places.back().position + 1, number, r.request.sampling});
  }
  const auto size = static_cast<int64_t>(places.size());
  Entries::Step& step = entries->step(size, numbers[0]);
  const auto began = Clock::now();
  entries->write(step, places);
  entries->run(step);
  std::vector<int64_t> tokens(static_cast<size_t>(step.out.token.numel()));
  timeline->read(tokens.data(), step.out.token);
  if (++step.runs > kColdRuns) drafts->took_step(size, std::chrono::duration<double>(Clock::now() - began).count());
  int64_t at = 0;  // of the row's first token in the step
  for (size_t i = 0; i < numbers.size(); ++i) {
    const int64_t number = numbers[i];
    Row& row = (*rows)[number];
    const int64_t drafted = row.drafts ? static_cast<int64_t>(row.drafts->now.size()) : 0;
    int64_t fed = 0;  // of the given tokens: up to one behind which the logits are not finite
    while (fed < given[i] && tokens[static_cast<size_t>(at + fed)] >= 0) ++fed;
    const int64_t line = at + fed;  // of the last of them
    const int64_t* sampled = &tokens[static_cast<size_t>(line)];
    at += 1 + given[i] + drafted;
    row.written = std::max<int64_t>(row.written, row.position + 1 + given[i] + drafted);
    if (row.left()) {
      row.wrote(&row.request.prompt[row.read], fed + 1);
      row.read += static_cast<size_t>(fed) + 1;
    } else {
      row.wrote(&row.next, 1);
    }
    drafts->keep_hidden(row, number, step.out.hidden, line);
    if (row.left() && *sampled >= 0) continue;  // the next is given
    const int64_t agreed = row.drafts ? drafts->took(row, sampled) : 0;
    if (agreed) drafts->keep_hidden(row, number, step.out.hidden, line + agreed);
    for (int64_t j = 0; j <= agreed; ++j) {
      if (j) row.wrote(&sampled[j - 1], 1);
      keep_logits(row, step.out.logits, line + j);
      events.push_back(took(row, sampled[j]));
      if (events.back().stop || !events.back().error.empty()) break;
    }
  }
}

// The next step of all timelines, where nothing but their tokens can be its.
void Batch::Impl::queue_ahead() {
  if (!options.run_ahead || rows->next_reader(read_last) != rows->size()) return;
  for (const KvSpec& k : shared.artifact.kv)
    if (k.state) return;  // it would not be known whether a state has taken the token
  const std::vector<int64_t> numbers = rows->in_order(&Row::used);
  if (numbers.empty() || static_cast<int64_t>(numbers.size()) > entries->most()) return;
  std::vector<Entries::Place> places;
  std::vector<Ahead::Fed> fed;
  for (int64_t number : numbers) {
    const Row& row = (*rows)[number];
    if (row.left() || row.next < 0 || row.drafts || options.keep_logits || row.request.keep_logits || row.position >= shared.artifact.max_seq_len) return;
    places.push_back({row.next, row.position, number, row.request.sampling});
    fed.push_back({number, row.handle, row.next, row.position});
  }
  Entries::Step& step = entries->step(static_cast<int64_t>(places.size()), numbers[0]);
  entries->write(step, places);
  entries->run(step);
  ++step.runs;
  for (const Ahead::Fed& f : fed) (*rows)[f.number].written = std::max<int64_t>((*rows)[f.number].written, f.position + 1);
  ahead = {&step, std::move(fed)};
}

// What the queued step sampled for those that still stand where it found them. False: it has nothing for anybody.
bool Batch::Impl::take_ahead(std::vector<RowEvent>& events) {
  if (ahead.fed.empty()) return false;
  const std::vector<Ahead::Fed> fed = std::move(ahead.fed);
  ahead.fed.clear();
  std::vector<int64_t> tokens(static_cast<size_t>(ahead.step->out.token.numel()));
  timeline->read(tokens.data(), ahead.step->out.token);
  bool found = false;
  for (size_t i = 0; i < fed.size(); ++i) {
    const Ahead::Fed& f = fed[i];
    Row& row = (*rows)[f.number];
    if (!row.used() || row.handle != f.handle || row.left() || row.next != f.token || row.position != f.position) continue;
    row.wrote(&f.token, 1);
    events.push_back(took(row, tokens[i]));
    found = true;
  }
  return found;
}

// Nobody wants it, but its inputs may be read still.
void Batch::Impl::forget_ahead() {
  if (ahead.fed.empty()) return;
  ahead.fed.clear();
  timeline->synchronize();
}

std::vector<RowEvent> Batch::Impl::step() {
  std::vector<RowEvent> events;
  const std::vector<int64_t> ready = rows->in_order(&Row::steps);
  const auto began = Clock::now();
  auto milliseconds = [](Clock::duration d) { return std::chrono::duration<double, std::milli>(d).count(); };
  for (auto before = began;;) {
    const int64_t next = rows->next_reader(read_last);
    if (next == rows->size()) break;
    read_chunk(read_last = next, events);
    const auto now = Clock::now();
    if (ready.empty() || milliseconds(now - began) + milliseconds(now - before) > options.max_gap_ms) break;
    before = now;
  }
  if (!take_ahead(events)) {  // else those that came since take the next step with the others
    const auto most = static_cast<size_t>(entries->most());
    for (size_t at = 0; at < ready.size(); at += most)
      take_step({ready.begin() + static_cast<int64_t>(at), ready.begin() + static_cast<int64_t>(std::min(at + most, ready.size()))}, events);
  }
  try {
    queue_ahead();
  } catch (const Error&) {  // these events are to be told; who steps again meets the same error
    ahead.fed.clear();
  }
  return events;
}

}  // namespace kiln
