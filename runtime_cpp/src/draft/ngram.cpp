#include <algorithm>

#include "kiln/draft.h"
#include "kiln/error.h"

namespace kiln {

namespace {

constexpr int64_t kLooked = 64;       // earlier places that a draft compares, newest first

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

}  // namespace kiln
