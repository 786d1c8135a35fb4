#include <algorithm>
#include <numeric>

#include "kiln/draft.h"
#include "kiln/error.h"

namespace kiln {

namespace {

constexpr int64_t kLooked = 64;       // earlier places that a draft compares, newest first
constexpr double kStart = 0.6;        // share of right drafts that is believed before any was seen
constexpr double kMemory = 0.9;       // of what is known of a place, how much stays when one more is seen
constexpr double kWorth = 0.3;        // a place whose drafts are right less often is not drafted
constexpr int64_t kPatience = 16;     // steps without a draft before one is tried again

}  // namespace

NgramDrafter::NgramDrafter(int64_t shortest, int64_t longest) : shortest_(shortest), longest_(longest), before_{-1} {
  if (shortest < 1 || longest < shortest) fail("ngram drafts: suffixes of ", shortest, " to ", longest, " tokens");
}

uint64_t NgramDrafter::key(int64_t end) const {
  uint64_t h = 0;
  for (int64_t i = end - shortest_; i < end; ++i) h = (h ^ static_cast<uint64_t>(text_[static_cast<size_t>(i)])) * 0x9E3779B97F4A7C15ull, h ^= h >> 29;
  return h;
}

void NgramDrafter::note(int64_t end) {
  before_.push_back(-1);
  if (end < shortest_) return;
  auto [at, fresh] = newest_.try_emplace(key(end), end);
  if (!fresh) before_.back() = at->second, at->second = end;
}

void NgramDrafter::append(const std::vector<int64_t>& tokens) {
  for (int64_t token : tokens) text_.push_back(token), note(length());
}

void NgramDrafter::cut(int64_t to) {
  if (to < 0 || to > length()) fail("ngram drafts: cut at ", to, " of ", length());
  for (int64_t end = length(); end > to; --end) {
    const int64_t earlier = before_.back();
    if (end >= shortest_) earlier < 0 ? static_cast<void>(newest_.erase(key(end))) : static_cast<void>(newest_[key(end)] = earlier);
    before_.pop_back();
    text_.pop_back();
  }
}

std::vector<int64_t> NgramDrafter::draft(int64_t most) const {
  const int64_t now = length();
  int64_t best = -1, longest = shortest_ - 1, looked = 0;
  if (most > 0 && now >= shortest_)
    for (int64_t end = before_.back(); end >= 0 && looked < kLooked && longest < longest_; end = before_[static_cast<size_t>(end)], ++looked) {
      int64_t same = 0;
      while (same < std::min(longest_, end) && text_[static_cast<size_t>(end - 1 - same)] == text_[static_cast<size_t>(now - 1 - same)]) ++same;
      if (same > longest) longest = same, best = end;
    }
  std::vector<int64_t> found;
  // What follows may run into the suffix itself: a text that repeats goes on repeating.
  for (int64_t i = best; best >= 0 && static_cast<int64_t>(found.size()) < most; ++i)
    found.push_back(i < now ? text_[static_cast<size_t>(i)] : found[static_cast<size_t>(i - now)]);
  return found;
}

Acceptance::Acceptance(int64_t most)
    : tried_(static_cast<size_t>(std::max<int64_t>(most, 0))), right_(tried_.size()), recent_(tried_.size(), kStart) {}

int64_t Acceptance::agreed(const std::vector<int64_t>& drafts, const std::vector<int64_t>& written) {
  int64_t n = 0;
  while (n < static_cast<int64_t>(drafts.size()) && n < static_cast<int64_t>(written.size()) && drafts[static_cast<size_t>(n)] == written[static_cast<size_t>(n)]) ++n;
  return n;
}

void Acceptance::took(int64_t drafted, int64_t accepted) {
  if (drafted < 0 || drafted > static_cast<int64_t>(tried_.size()) || accepted < 0 || accepted > drafted) fail("drafts: ", accepted, " of ", drafted, " accepted");
  ++steps_;
  idle_ = drafted ? 0 : idle_ + 1;
  for (size_t i = 0; i < static_cast<size_t>(drafted) && i <= static_cast<size_t>(accepted); ++i) {  // behind a wrong one nothing is known
    const bool right = i < static_cast<size_t>(accepted);
    ++tried_[i], right_[i] += right;
    recent_[i] = kMemory * recent_[i] + (1 - kMemory) * right;
  }
}

int64_t Acceptance::worth() const {
  int64_t n = 0;
  double all = 1;  // that a draft of this length is right as a whole
  for (double share : recent_) {
    if ((all *= share) < kWorth) break;
    ++n;
  }
  if (n == 0 && idle_ >= kPatience && !recent_.empty()) return 1;
  return n;
}

int64_t Acceptance::drafted() const { return std::accumulate(tried_.begin(), tried_.end(), int64_t{0}); }
int64_t Acceptance::accepted() const { return std::accumulate(right_.begin(), right_.end(), int64_t{0}); }

}  // namespace kiln
