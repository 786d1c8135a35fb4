#include "bench.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <random>

#include "kiln/json.h"

namespace kiln {

namespace {

constexpr int64_t kWarmUpSteps = 4;  // not timed: the first token of a generate() waits for an empty queue
constexpr int64_t kWindows = 16;
constexpr int kShortRepeats = 3;  // of a prompt that is one chunk

using Clock = std::chrono::steady_clock;
double seconds_since(Clock::time_point from) { return std::chrono::duration<double>(Clock::now() - from).count(); }

// Linear between neighbours, as numpy's percentile.
double quantile(std::vector<double> values, double q) {
  std::sort(values.begin(), values.end());
  double place = q * static_cast<double>(values.size() - 1);
  auto low = static_cast<size_t>(place);
  size_t high = std::min(low + 1, values.size() - 1);
  return values[low] + (values[high] - values[low]) * (place - static_cast<double>(low));
}
double median(const std::vector<double>& values) { return quantile(values, 0.5); }

std::vector<double> decode_rates(const DepthRow& row) {
  std::vector<double> rates;
  for (double s : row.decode_s) rates.push_back(static_cast<double>(row.window) / s);
  return rates;
}

class Bench {
 public:
  Bench(Session& session, const BenchOptions& options)
      : session_(session),
        limit_(session.model().artifact().max_seq_len),
        chunk_(options.prefill_chunk ? options.prefill_chunk : session.model().artifact().prefill_chunk),
        steps_(options.steps),
        depths_(options.depths),
        look_(options.look ? options.look : [] {}) {
    if (steps_ < 1) fail("bench: ", steps_, " steps, must be 1 or more");
    int64_t last = limit_ - kWarmUpSteps - steps_;
    if (last < 1) fail("bench: ", steps_, " steps after ", kWarmUpSteps, " to warm up do not fit: the artifact holds ", limit_, " tokens");
    if (depths_.empty()) {
      for (int64_t depth = 128; depth <= limit_; depth *= 4) depths_.push_back(depth);
      if (depths_.empty() || depths_.back() < limit_) depths_.push_back(limit_);
    }
    std::sort(depths_.begin(), depths_.end());
    depths_.erase(std::unique(depths_.begin(), depths_.end()), depths_.end());
    for (int64_t depth : depths_)
      if (depth < 1 || depth > limit_) fail("bench: depth ", depth, ": the artifact holds 1 to ", limit_, " tokens");
  }

  BenchReport run() {
    BenchReport report;
    report.first_tokens = std::min(chunk_, last_position(depths_.back()));
    session_.reset();
    report.first_cold_s = prefill(report.first_tokens);
    report.first_warm_s = short_prompt(report.first_tokens);
    for (int64_t depth : depths_) report.rows.push_back(measure(depth));
    report.memory = session_.memory();
    return report;
  }

 private:
  int64_t last_position(int64_t depth) const { return std::min(depth, limit_ - kWarmUpSteps - steps_); }

  double prefill(int64_t n) {
    std::uniform_int_distribution<int64_t> any(0, session_.model().vocab_size() - 1);
    std::vector<int64_t> tokens(static_cast<size_t>(n));
    for (int64_t& t : tokens) t = any(random_);
    look_();
    auto start = Clock::now();
    session_.prefill(tokens);
    double s = seconds_since(start);
    prompt_tokens_ += n;
    prompt_s_ += s;
    return s;
  }

  void reset() {
    session_.reset();
    prompt_tokens_ = 0;
    prompt_s_ = 0;
  }

  double short_prompt(int64_t n) {
    std::vector<double> times;
    for (int i = 0; i < kShortRepeats; ++i) {
      reset();
      times.push_back(prefill(n));
    }
    prompt_s_ = median(times);
    return prompt_s_;
  }

  DepthRow measure(int64_t depth) {
    DepthRow row;
    row.depth = depth;
    row.position = last_position(depth);
    row.chunk_tokens = std::min(chunk_, row.position);
    row.chunk_start = row.position - row.chunk_tokens;
    if (row.chunk_start == 0) {
      row.chunk_s = short_prompt(row.chunk_tokens);
    } else {
      if (session_.position() > row.chunk_start) reset();  // the timed call is a whole chunk, so the timeline starts again
      while (session_.position() < row.chunk_start) prefill(std::min(chunk_, row.chunk_start - session_.position()));
      row.chunk_s = prefill(row.chunk_tokens);
    }
    row.prompt_tokens = prompt_tokens_;
    row.prompt_s = prompt_s_;
    row.window = std::max<int64_t>(1, steps_ / kWindows);
    std::vector<Clock::time_point> at;  // when each token was on the host; the first is prefill's
    session_.generate(1 + kWarmUpSteps + steps_, [&](int64_t) { return look_(), at.push_back(Clock::now()), true; }, false);
    for (size_t i = kWarmUpSteps, w = static_cast<size_t>(row.window); i + w < at.size(); i += w)
      row.decode_s.push_back(std::chrono::duration<double>(at[i + w] - at[i]).count());
    return row;
  }

  Session& session_;
  int64_t limit_, chunk_, steps_;
  std::vector<int64_t> depths_;
  std::function<void()> look_;
  std::mt19937_64 random_{0};
  int64_t prompt_tokens_ = 0;
  double prompt_s_ = 0;
};

std::string number(double x) { return json_number(x); }
std::string number(int64_t x) { return std::to_string(x); }
std::string list(const std::vector<double>& values) {
  std::string out = "[";
  for (double x : values) out += (out.size() > 1 ? ", " : "") + number(x);
  return out + "]";
}

}  // namespace

BenchReport bench(Session& session, const BenchOptions& options) { return Bench(session, options).run(); }

std::string bench_json(const BenchReport& report) {
  std::string out = "\"first_chunk\": {\"tokens\": " + number(report.first_tokens) + ", \"cold_s\": " + number(report.first_cold_s) +
                    ", \"warm_s\": " + number(report.first_warm_s) + "}, \"depths\": [";
  for (const DepthRow& r : report.rows) {
    std::vector<double> rates = decode_rates(r);
    if (&r != &report.rows.front()) out += ", ";
    out += "{\"depth\": " + number(r.depth) + ", \"position\": " + number(r.position) + ", \"prefill\": {\"start\": " + number(r.chunk_start) +
           ", \"tokens\": " + number(r.chunk_tokens) + ", \"seconds\": " + number(r.chunk_s) + ", \"tok_s\": " + number(static_cast<double>(r.chunk_tokens) / r.chunk_s) +
           "}, \"prompt\": {\"tokens\": " + number(r.prompt_tokens) + ", \"seconds\": " + number(r.prompt_s) +
           ", \"tok_s\": " + number(static_cast<double>(r.prompt_tokens) / r.prompt_s) + "}, \"decode\": {\"start\": " + number(r.position + kWarmUpSteps) +
           ", \"steps\": " + number(r.window * static_cast<int64_t>(rates.size())) + ", \"tok_s\": " + number(median(rates)) +
           ", \"p10\": " + number(quantile(rates, 0.1)) + ", \"p90\": " + number(quantile(rates, 0.9)) + ", \"windows\": " + list(rates) + "}}";
  }
  return out + "]";
}

std::string bench_table(const BenchReport& report) {
  char line[200];
  std::snprintf(line, sizeof line, "first chunk of %lld tokens: %.4f s cold, %.4f s warm\n", static_cast<long long>(report.first_tokens), report.first_cold_s,
                report.first_warm_s);
  std::string out = line;
  std::snprintf(line, sizeof line, "%9s %9s  %14s %9s  %12s  %12s %9s %9s\n", "depth", "at", "prefill tokens", "tok/s", "prompt tok/s", "decode tok/s", "p10", "p90");
  out += line;
  for (const DepthRow& r : report.rows) {
    std::vector<double> rates = decode_rates(r);
    std::snprintf(line, sizeof line, "%9lld %9lld  %14lld %9.1f  %12.1f  %12.2f %9.2f %9.2f\n", static_cast<long long>(r.depth),
                  static_cast<long long>(r.position), static_cast<long long>(r.chunk_tokens), static_cast<double>(r.chunk_tokens) / r.chunk_s,
                  static_cast<double>(r.prompt_tokens) / r.prompt_s, median(rates), quantile(rates, 0.1), quantile(rates, 0.9));
    out += line;
  }
  return out;
}

}  // namespace kiln
