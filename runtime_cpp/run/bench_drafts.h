#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "kiln/session.h"

namespace kiln {

struct DraftBenchOptions {
  std::vector<int64_t> prompt;   // of the text that is written; empty: random tokens to each of `depths`
  std::vector<int64_t> depths;
  int64_t tokens = 64;           // written, with and without drafts
  Drafting drafting;             // where there are no rates
  std::vector<double> rates;     // drafts of what will come, each place right as often: what a drafter of that acceptance would give
  uint64_t seed = 0;             // of the coin
  std::function<void()> look;    // called before every token; what it throws ends the measurement
};

struct DraftBenchRow {
  int64_t depth = 0, tokens = 0;           // in the caches when writing starts; written
  std::vector<double> plain_s, drafted_s;  // of each repeat, without its first token
  DraftCounts counts;                      // of one repeat

  double speed_up() const;
};

// Writes the same text with and without drafts, by turns. Error where one differs from the other.
std::vector<DraftBenchRow> bench_drafts(Session& session, const DraftBenchOptions& options);

std::string drafts_json(const DraftCounts& counts);   // a JSON object
std::string drafts_text(const DraftCounts& counts);   // "2.31 tokens a step, 60 of 94 drafts right (0.71, 0.60)"
std::string draft_bench_json(const std::vector<DraftBenchRow>& rows);  // a member of a JSON object
std::string draft_bench_table(const std::vector<DraftBenchRow>& rows);

}  // namespace kiln
