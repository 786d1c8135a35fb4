#include "bench_drafts.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <numeric>
#include <random>

#include "kiln/draft.h"
#include "kiln/error.h"
#include "kiln/json.h"
#include "kiln/snapshot.h"

namespace kiln {

namespace {

constexpr int kRepeats = 3;

using Clock = std::chrono::steady_clock;

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t half = values.size() / 2;
  return values.size() % 2 ? values[half] : (values[half - 1] + values[half]) / 2;
}

// Seconds from the first token to the last; `text` gets them all.
double write(Session& session, const DraftBenchOptions& options, const Drafting& drafting, std::vector<int64_t>& text) {
  session.set_drafts(drafting);
  text.clear();
  Clock::time_point first, last;
  session.generate(
      options.tokens,
      [&](int64_t token) {
        if (options.look) options.look();
        last = Clock::now();
        if (text.empty()) first = last;
        text.push_back(token);
        return true;
      },
      false);
  return std::chrono::duration<double>(last - first).count();
}

DraftBenchRow measure(Session& session, const DraftBenchOptions& options) {
  DraftBenchRow row;
  row.depth = session.position();
  const auto start = session.snapshot();
  std::vector<int64_t> plain, drafted;
  write(session, options, {}, plain);  // warm, as the first drafted text below: steps load their code, a GPU records them
  row.tokens = static_cast<int64_t>(plain.size());
  if (row.tokens < 2) fail("bench: the artifact holds ", session.model().artifact().max_seq_len, " tokens, too few to write after ", row.depth);
  for (int i = -1; i < kRepeats; ++i) {
    session.restore(*start);
    const double without = write(session, options, {}, plain);
    session.restore(*start);
    Drafting drafting = options.drafting;
    if (!options.rates.empty())
      drafting.own = std::make_shared<ScriptedDrafter>(plain, options.rates, session.model().vocab_size(), options.seed);
    const double with = write(session, options, drafting, drafted);
    if (drafted != plain) {
      const auto differs = std::mismatch(plain.begin(), plain.end(), drafted.begin(), drafted.end()).first - plain.begin();
      fail("the text with drafts differs from the text without at token ", differs, " after position ", row.depth, ": a step of several tokens has other bits than one of one");
    }
    row.counts = session.draft_counts();
    if (i >= 0) row.plain_s.push_back(without), row.drafted_s.push_back(with);
  }
  session.set_drafts({});
  session.restore(*start);
  return row;
}

double rate(const DraftBenchRow& row, const std::vector<double>& seconds) { return static_cast<double>(row.tokens - 1) / median(seconds); }

double tokens_a_step(const DraftCounts& c) { return c.steps ? static_cast<double>(c.tokens) / static_cast<double>(c.steps) : 0; }

int64_t sum(const std::vector<int64_t>& values) { return std::accumulate(values.begin(), values.end(), int64_t{0}); }

std::string list(const std::vector<int64_t>& values) {
  std::string out = "[";
  for (int64_t v : values) out += (out.size() > 1 ? ", " : "") + std::to_string(v);
  return out + "]";
}

std::string list(const std::vector<double>& values) {
  std::string out = "[";
  for (double v : values) out += (out.size() > 1 ? ", " : "") + json_number(v);
  return out + "]";
}

// Of each place how often it was right, to the last that was tried.
std::vector<double> shares(const DraftCounts& c) {
  std::vector<double> found;
  for (size_t i = 0; i < c.tried.size() && c.tried[i]; ++i) found.push_back(static_cast<double>(c.right[i]) / static_cast<double>(c.tried[i]));
  return found;
}

}  // namespace

double DraftBenchRow::speed_up() const { return median(plain_s) / median(drafted_s); }

std::vector<DraftBenchRow> bench_drafts(Session& session, const DraftBenchOptions& options) {
  std::vector<DraftBenchRow> rows;
  const int64_t limit = session.model().artifact().max_seq_len;
  session.reset();
  if (!options.prompt.empty()) {
    session.prefill(options.prompt);
    rows.push_back(measure(session, options));
    return rows;
  }
  std::vector<int64_t> depths = options.depths.empty() ? std::vector<int64_t>{128} : options.depths;
  std::sort(depths.begin(), depths.end());
  std::mt19937_64 random{0};
  std::uniform_int_distribution<int64_t> any(0, session.model().vocab_size() - 1);
  for (int64_t depth : depths) {
    if (depth < 1 || depth > limit - options.tokens) fail("bench: depth ", depth, ": 1 to ", limit - options.tokens, " leave room for ", options.tokens, " tokens");
    if (session.position() < depth) {
      std::vector<int64_t> tokens(static_cast<size_t>(depth - session.position()));
      for (int64_t& t : tokens) t = any(random);
      session.prefill(tokens);
    }
    rows.push_back(measure(session, options));
  }
  return rows;
}

std::string drafts_json(const DraftCounts& c) {
  return "{\"steps\": " + std::to_string(c.steps) + ", \"tokens\": " + std::to_string(c.tokens) + ", \"tokens_a_step\": " + json_number(tokens_a_step(c)) +
         ", \"tried\": " + list(c.tried) + ", \"right\": " + list(c.right) + "}";
}

std::string drafts_text(const DraftCounts& c) {
  char text[100];
  std::snprintf(text, sizeof text, "%.2f tokens a step, %lld of %lld drafts right", tokens_a_step(c), static_cast<long long>(sum(c.right)),
                static_cast<long long>(sum(c.tried)));
  std::string out = text;
  for (double share : shares(c)) std::snprintf(text, sizeof text, "%.2f", share), out += (out.back() == 't' ? " (" : ", ") + std::string(text);
  return out + (out.back() == 't' ? "" : ")");
}

std::string draft_bench_json(const std::vector<DraftBenchRow>& rows) {
  std::string out = "\"drafts\": [";
  for (const DraftBenchRow& r : rows) {
    if (&r != rows.data()) out += ", ";
    out += "{\"depth\": " + std::to_string(r.depth) + ", \"tokens\": " + std::to_string(r.tokens) + ", \"plain_tok_s\": " + json_number(rate(r, r.plain_s)) +
           ", \"tok_s\": " + json_number(rate(r, r.drafted_s)) + ", \"speed_up\": " + json_number(r.speed_up()) + ", \"plain_s\": " + list(r.plain_s) +
           ", \"seconds\": " + list(r.drafted_s) + ", \"counts\": " + drafts_json(r.counts) + "}";
  }
  return out + "]";
}

std::string draft_bench_table(const std::vector<DraftBenchRow>& rows) {
  std::string out = "    depth   tokens  plain tok/s  drafts tok/s  speed-up\n";
  for (const DraftBenchRow& r : rows) {
    char line[120];
    std::snprintf(line, sizeof line, "%9lld %8lld %12.2f %13.2f %9.2f  ", static_cast<long long>(r.depth), static_cast<long long>(r.tokens), rate(r, r.plain_s),
                  rate(r, r.drafted_s), r.speed_up());
    out += line + drafts_text(r.counts) + "\n";
  }
  return out;
}

}  // namespace kiln
