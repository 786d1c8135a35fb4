#include <algorithm>
#include <cmath>

#include "kiln/draft.h"
#include "kiln/error.h"

namespace kiln {

namespace {

constexpr double kStart = 0.6;              // share of right drafts that is believed before any was seen
constexpr double kMemory = 0.9;             // of what is known of a place, how much stays when one more is seen
constexpr double kHope = 0.05;              // of the way to the share of the place before it, for a place that was not tried where that was right
constexpr double kKnown = 0.7;              // as kStart, of a place that need not be tried to be believed
constexpr int64_t kPatience = 16, kMostPatience = 256;  // steps without a draft before one is tried again
constexpr double kTimeMemory = 0.8;         // as kMemory, of seconds
constexpr double kOutlier = 2;              // a step that took longer than this many times the usual was disturbed
constexpr double kForget = 0.998;           // a step: what was measured once, and disturbed, is tried again some day,
constexpr int64_t kStale = 64;              // and behind so many steps only the new measurement counts
constexpr double kUnmeasured = 1.05;        // a step's time over that of a step with one token less, before it is known

}  // namespace

ScriptedDrafter::ScriptedDrafter(std::vector<int64_t> script, std::vector<double> rates, int64_t vocab_size, uint64_t seed)
    : script_(std::move(script)), rates_(std::move(rates)), vocab_size_(vocab_size), coin_(seed) {
  for (double rate : rates_)
    if (!(rate >= 0 && rate <= 1)) fail("drafts: a rate of ", rate, ", must be from 0 to 1");
}

std::vector<int64_t> ScriptedDrafter::draft(int64_t most) const {
  std::vector<int64_t> found;
  std::uniform_real_distribution<double> coin;
  const auto n = std::min({most, static_cast<int64_t>(rates_.size()), static_cast<int64_t>(script_.size()) - length_});
  for (int64_t i = 0; i < n; ++i) {
    const int64_t token = script_[static_cast<size_t>(length_ + i)];
    found.push_back(coin(coin_) < rates_[static_cast<size_t>(i)] ? token : (token + 1) % vocab_size_);
  }
  return found;
}

Acceptance::Acceptance(int64_t most)
    : tried_(static_cast<size_t>(std::max<int64_t>(most, 0))), right_(tried_.size()), recent_(tried_.size(), kStart), patience_(kPatience) {}

int64_t Acceptance::agreed(const std::vector<int64_t>& drafts, const std::vector<int64_t>& written) {
  int64_t n = 0;
  while (n < static_cast<int64_t>(drafts.size()) && n < static_cast<int64_t>(written.size()) && drafts[static_cast<size_t>(n)] == written[static_cast<size_t>(n)]) ++n;
  return n;
}

void Acceptance::took(int64_t drafted, int64_t accepted) {
  if (drafted < 0 || drafted > static_cast<int64_t>(tried_.size()) || accepted < 0 || accepted > drafted) fail("drafts: ", accepted, " of ", drafted, " accepted");
  if (!drafted) {
    ++idle_;
    return;
  }
  // Where it was right the next are tried at once, until enough is known: then it is what they cost that keeps them from being drafted.
  if (due()) patience_ = accepted && recent_[0] < kKnown ? 1 : std::min(std::max(2 * patience_, kPatience), kMostPatience);
  idle_ = 0;
  for (size_t i = 0; i < static_cast<size_t>(drafted) && i <= static_cast<size_t>(accepted); ++i) {  // behind a wrong one nothing is known
    const bool right = i < static_cast<size_t>(accepted);
    ++tried_[i], right_[i] += right;
    recent_[i] = kMemory * recent_[i] + (1 - kMemory) * right;
  }
  // A place that is not reached any more would never be known to have become better.
  if (const auto n = static_cast<size_t>(drafted); accepted == drafted && n < recent_.size()) recent_[n] += kHope * std::max(0., recent_[n - 1] - recent_[n]);
}

std::vector<double> Acceptance::chances() const {
  std::vector<double> found = recent_;
  for (size_t i = 1; i < found.size(); ++i) found[i] *= found[i - 1];
  return found;
}

void Acceptance::count_from_here() {
  std::fill(tried_.begin(), tried_.end(), 0);
  std::fill(right_.begin(), right_.end(), 0);
}

StepCosts::StepCosts(std::vector<int64_t> sizes) : sizes_(std::move(sizes)), costs_(sizes_.size()) {
  if (sizes_.empty() || sizes_[0] < 1 || !std::is_sorted(sizes_.begin(), sizes_.end())) fail("internal error: steps of no size");
}

size_t StepCosts::fits(int64_t tokens) const {
  const auto found = std::lower_bound(sizes_.begin(), sizes_.end(), tokens);
  if (found == sizes_.end()) fail("internal error: no step takes ", tokens, " tokens");
  return static_cast<size_t>(found - sizes_.begin());
}

void StepCosts::took(int64_t tokens, double seconds) {
  for (Cost& cost : costs_) ++cost.age;
  Cost& cost = costs_[fits(tokens)];
  const bool fresh = cost.seconds > 0 && cost.age <= kStale;
  cost = {fresh ? kTimeMemory * cost.seconds + (1 - kTimeMemory) * std::min(seconds, kOutlier * cost.seconds) : seconds, 0};
}

double StepCosts::of(int64_t tokens) const {
  const size_t at = fits(tokens);
  // Along the sizes: what was measured, but no less than what is believed of one that was not. That goes on as the sizes before it did.
  double found = 0, slope = 0;
  int64_t size = 0;
  for (size_t i = 0; i < sizes_.size() && (i <= at || !size); ++i) {
    const bool measured = costs_[i].seconds > 0;
    if (!measured && !size) continue;
    const double more = static_cast<double>(sizes_[i] - size), known = costs_[i].seconds * std::pow(kForget, static_cast<double>(costs_[i].age));
    const double next = !size ? known : std::max(known, measured ? found * std::pow(kUnmeasured, more) : found + std::max(slope, found * (kUnmeasured - 1)) * more);
    if (size) slope = (next - found) / more;
    found = next, size = sizes_[i];
  }
  return size ? found * (size > sizes_[at] ? std::pow(kUnmeasured, static_cast<double>(sizes_[at] - size)) : 1) : std::pow(kUnmeasured, static_cast<double>(sizes_[at] - 1));
}

std::vector<int64_t> share_drafts(const std::vector<std::vector<double>>& chances, const StepCosts& costs, const std::vector<double>& draft_seconds) {
  // The likeliest drafts first: a row's chances never rise, so what is taken of it is always its draft's beginning.
  std::vector<std::pair<double, size_t>> places;
  for (size_t row = 0; row < chances.size(); ++row)
    for (double chance : chances[row]) places.emplace_back(chance, row);
  std::stable_sort(places.begin(), places.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
  const auto rows = static_cast<int64_t>(chances.size());
  std::vector<int64_t> shares(chances.size());
  if (!costs.knows(rows)) return shares;  // first what a step without drafts takes
  double best = static_cast<double>(rows) / costs.of(rows), tokens = static_cast<double>(rows), drafting = 0;
  size_t taken = 0;
  for (size_t i = 0; i < places.size() && rows + static_cast<int64_t>(i) < costs.sizes().back(); ++i) {
    const auto [chance, row] = places[i];
    const double seconds = row < draft_seconds.size() ? draft_seconds[row] : 0;
    tokens += chance, drafting += seconds;
    const double rate = tokens / (costs.of(rows + static_cast<int64_t>(i) + 1) + drafting);
    if (rate > best || (rate == best && taken == i && !(seconds > 0))) best = rate, taken = i + 1;  // what costs nothing fills the step
  }
  for (size_t i = 0; i < taken; ++i) ++shares[places[i].second];
  return shares;
}

}  // namespace kiln
