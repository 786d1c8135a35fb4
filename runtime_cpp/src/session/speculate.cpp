// Steps of a session that check drafts: their tokens are those that steps of one token would give, bit for bit.
#include <algorithm>
#include <chrono>

#include "draft/drafting.h"
#include "session/session_impl.h"

namespace kiln {

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point from) { return std::chrono::duration<double>(Clock::now() - from).count(); }

}  // namespace

void Session::Impl::set_drafts(const Drafting& drafting) {
  if (drafting.source == DraftSource::Off && !drafting.own) {
    speculation = nullptr;
    return;
  }
  const std::vector<int64_t> sizes = step_sizes(shared.artifact, drafting);
  if (!drafts) drafts = std::make_unique<Speculation>(sizes);
  if (drafting.source == DraftSource::Mtp && !drafting.own) model_drafter();
  speculation = drafts.get();
  speculation->drafting = drafting;
}

ModelDrafter& Session::Impl::model_drafter() {
  if (!drafts->model) drafts->model = std::make_unique<ModelDrafter>(shared, *timeline, decode_surroundings, all_rows(), options.graph, options.early_launch);
  return *drafts->model;
}

// Constants, and caches of all the artifact's rows, of which an entry touches those that it is given tokens of. This session is row 0.
TensorMap Session::Impl::all_rows() const {
  TensorMap all = shared.constants;
  for (const KvSpec& k : shared.artifact.kv) {
    std::vector<int64_t> shape{shared.artifact.rows};
    shape.insert(shape.end(), k.shape.begin(), k.shape.end());
    all.emplace(k.name, Tensor::over(kv.at(k.name).data(), shared.backend->device(), scalar_of(k.dtype), shape));
  }
  return all;
}

// The drafter's text is what stands in the caches, and `next`.
void Session::Impl::begin_drafts() {
  draft_counts = {};
  if (!speculation) return;
  speculation->acceptance().count_from_here();
  Drafter* const text_of = speculation->text();
  if (!text_of) return;
  if (speculation->drafting.own) {
    text_of->cut(0);
  } else {
    needs_history();
    const std::vector<int64_t>& text = speculation->ngram.text();
    const auto end = lineage.ids().begin() + position;
    const auto differs = std::mismatch(lineage.ids().begin(), end, text.begin(), text.end());
    speculation->ngram.cut(differs.second - text.begin());
    speculation->ngram.append({differs.first, end});
  }
  text_of->append({next});
}

DecodeStep& Session::Impl::wide_step(int64_t tokens) {
  const std::vector<int64_t> sizes = shared.artifact.steps();
  const int64_t m = *std::lower_bound(sizes.begin(), sizes.end(), tokens);
  DecodeStep& step = wide[m];
  if (step.model) return step;
  const std::string entry = "decode_" + std::to_string(m);
  step.inputs = StepInputs(shared, *timeline, entry, m);
  auto opened = std::make_unique<CompiledModel>(shared, entry, decode_surroundings);
  opened->bind(all_rows());
  step.model = std::move(opened);
  return step;
}

// One step over tokens from `position` on, two or more.
DecodeStep& Session::Impl::run_wide(const std::vector<int64_t>& tokens) {
  DecodeStep& step = wide_step(static_cast<int64_t>(tokens.size()));
  std::vector<StepInputs::Place> places;
  for (size_t i = 0; i < tokens.size(); ++i) places.push_back({tokens[i], position + static_cast<int64_t>(i), 0, sampling});
  step.inputs.write(*timeline, places);
  if (step.runs == kColdRuns && timeline->asynchronous() && options.graph)
    step.record(shared, *timeline, "decode_" + std::to_string(step.inputs.tokens()), options.early_launch);
  ++step.runs;
  step.run(*timeline);
  return step;
}

// The next n tokens of a prompt, two or more. What is sampled behind the last one is next; where logits are not finite, what is behind them is void.
void Session::Impl::read_step(const int64_t* tokens, int64_t n) {
  DecodeStep& step = run_wide({tokens, tokens + n});
  std::vector<int64_t> sampled(static_cast<size_t>(step.inputs.tokens()));
  timeline->read(sampled.data(), step.out.token);
  int64_t last = 0;
  while (last < n - 1 && sampled[static_cast<size_t>(last)] >= 0) ++last;
  wrote(tokens, last + 1);
  written = std::max<int64_t>(written, position + n - last - 1);
  next = sampled[static_cast<size_t>(last)];
  in_step = copied = handed_out = false;
  logits = line_of(step.out.logits, last);
  if (step.out.hidden.defined()) hidden = line_of(step.out.hidden, last);
  took_logits();
}

// One step over `next` and what may follow it. How many of the drafts the model agrees with; what it wrote is `ahead`.
int64_t Session::Impl::run_drafts(const std::vector<int64_t>& drafted) {
  std::vector<int64_t> tokens{next};
  tokens.insert(tokens.end(), drafted.begin(), drafted.end());
  DecodeStep& step = run_wide(tokens);
  std::vector<int64_t> wrote_(static_cast<size_t>(step.inputs.tokens()));
  timeline->read(wrote_.data(), step.out.token);
  const int64_t agreed = Acceptance::agreed(drafted, wrote_);
  if (!pretended) lineage.write(position, tokens.data(), agreed + 1);
  written = std::max<int64_t>(written, position + 1 + static_cast<int64_t>(drafted.size()));
  for (int64_t i = 0; i <= agreed; ++i) speculation->ahead.emplace_back(i, wrote_[static_cast<size_t>(i)]);
  speculation->last = &step;
  return agreed;
}

// At most `most` tokens that may follow `next`, as many as are worth it.
std::vector<int64_t> Session::Impl::draft(int64_t most) {
  Speculation& s = *speculation;
  std::vector<double> chances = s.acceptance().chances();
  auto worth = [&](size_t offered) {
    chances.resize(offered);
    if (s.drafting.fixed) return static_cast<int64_t>(offered);
    return std::min<int64_t>(static_cast<int64_t>(offered), std::max<int64_t>(s.worth(chances), s.acceptance().due()));
  };
  if (!s.text()) {
    if (!hidden.defined()) return {};  // behind restore() and the like: the next step has it
    return s.model->draft(drafts_from(next), worth(static_cast<size_t>(most)));
  }
  std::vector<int64_t> drafted = s.text()->draft(most);
  if (!s.drafting.own) drafted.resize(static_cast<size_t>(worth(drafted.size())));
  return drafted;
}

// Goes on by one token that a step of several gave: one that is there, or the first of a step with at most `room` tokens. False: nothing is worth
// drafting, and nothing has changed.
bool Session::Impl::take_drafts(int64_t room, bool stop_at_eog) {
  Speculation& s = *speculation;
  if (s.ahead.empty()) {
    const int64_t most = std::min(s.most(), room - 1);
    if (most < 1 || !s.hopes()) return false;
    std::vector<int64_t> drafted = draft(most);
    for (size_t i = 0; i < drafted.size(); ++i) {
      if (drafted[i] < 0 || drafted[i] >= shared.vocab_size) fail("drafts: token ", drafted[i], " is outside of the vocabulary of ", shared.vocab_size);
      if (stop_at_eog && model->is_eog(drafted[i])) drafted.resize(i + 1);
    }
    if (drafted.empty()) return false;
    const auto n = static_cast<int64_t>(drafted.size());
    const auto began = Clock::now();
    const int64_t agreed = run_drafts(drafted);
    if (s.last->runs > kColdRuns + 1) s.costs.took(1 + n, seconds_since(began));
    s.acceptance().took(n, agreed);
    ++draft_counts.steps;
  }
  next_of_step();
  return true;
}

// The first of `ahead` is next.
void Session::Impl::next_of_step() {
  const auto [row, token] = speculation->ahead.front();
  speculation->ahead.pop_front();
  ++position;
  in_step = false;
  const CompiledModel::Output& out = speculation->last->out;
  logits = line_of(out.logits, row);
  if (out.hidden.defined()) hidden = line_of(out.hidden, row);
  copied = false;
  try {
    took_logits();
  } catch (...) {  // as if the token had not been fed
    speculation->ahead.clear();
    lineage.cut(--position);
    forget_step();
    throw;
  }
  next = token;
  handed_out = false;
  check_next();
  if (Drafter* text_of = speculation->text()) text_of->append({next});
  ++draft_counts.tokens;
}

// A step of one token gave `next`; `queued`: another one was queued behind it.
void Session::Impl::took_one(Clock::time_point began, bool queued) {
  Speculation& s = *speculation;
  const auto now = Clock::now();
  // A step that was queued ran while the token before it was handed out.
  s.costs.took(1, std::chrono::duration<double>(now - (queued && s.received ? *s.received : began)).count());
  s.received = now;
  s.acceptance().took(0, 0);
  if (Drafter* text_of = s.text()) text_of->append({next});
  ++draft_counts.steps, ++draft_counts.tokens;
}

DraftProbe Session::Impl::probe_drafts(int64_t count, int64_t token) {
  const std::vector<int64_t> sizes = step_sizes(shared.artifact, {DraftSource::Mtp, count});
  if (!drafts) drafts = std::make_unique<Speculation>(sizes);
  ModelDrafter& drafter = model_drafter();
  if (count < 1 || token < 0 || token >= shared.vocab_size) fail("probe_drafts() of ", count, " drafts behind token ", token);
  if (!hidden.defined()) fail("probe_drafts(): the hidden row of position ", position - 1, " is not known; feed a token first");
  DraftProbe found;
  auto add = [&](std::vector<float>& to, const Tensor& row) {
    to.resize(to.size() + static_cast<size_t>(row.numel()));
    timeline->read(to.data() + to.size() - row.numel(), row);
  };
  const Tensor kept = timeline->make(hidden.scalar, {1, hidden.sizes[1]});
  timeline->copy(kept, hidden);
  hidden = kept;  // what the drafter leaves is in the place of the step's results
  host_logits();
  found.tokens = drafter.draft(drafts_from(token), count, [&](const CompiledModel::Output& out) { add(found.logits, out.logits), add(found.hidden, out.hidden); });
  for (int64_t i = 0; i < kColdRuns; i += count) drafter.draft(drafts_from(token), count);
  const auto began = Clock::now();
  drafter.draft(drafts_from(token), count);
  found.seconds = seconds_since(began);
  return found;
}

DraftProbe Session::probe_drafts(int64_t count, std::optional<int64_t> token) {
  Turn turn(impl_->busy, *impl_->timeline);
  return impl_->probe_drafts(count, token.value_or(impl_->next));
}

void Session::set_drafts(const Drafting& drafting) {
  Turn turn(impl_->busy, *impl_->timeline);
  impl_->set_drafts(drafting);
}

DraftCounts Session::draft_counts() const {
  Turn turn(impl_->busy, *impl_->timeline);
  DraftCounts found = impl_->draft_counts;
  if (impl_->speculation) found.tried = impl_->speculation->acceptance().tried(), found.right = impl_->speculation->acceptance().right();
  return found;
}

}  // namespace kiln
