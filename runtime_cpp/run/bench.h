#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "model/backend.h"
#include "kiln/session.h"

namespace kiln {

struct BenchOptions {
  std::vector<int64_t> depths;  // tokens in the caches when decoding starts; empty: 128, 512, 2048, .. up to max_seq_len
  int64_t prefill_chunk = 0;    // of the session: tokens of the prefill call that is timed; 0: the artifact's
  int64_t steps = 64;           // decode steps timed at each depth
  std::function<void()> look;   // called before every chunk and step; what it throws ends the measurement
};

// What one depth gave. Seconds are of the host's clock, from the call until the sampled token is on the host.
struct DepthRow {
  int64_t depth = 0;     // asked for
  int64_t position = 0;  // measured at: the depth, or as far before max_seq_len as the decode steps need
  int64_t chunk_start = 0, chunk_tokens = 0;  // the timed prefill call ends at `position`
  double chunk_s = 0;
  int64_t prompt_tokens = 0;  // prefilled since the caches were empty, and the time of all those calls
  double prompt_s = 0;
  int64_t window = 0;            // decode steps of one window
  std::vector<double> decode_s;  // of each window
};

struct BenchReport {
  int64_t first_tokens = 0;  // the first chunk of a prompt; cold: the first call after loading
  double first_cold_s = 0, first_warm_s = 0;
  std::vector<DepthRow> rows;
  MemoryReport memory;  // after the deepest row
};

// Fills the caches with random tokens to each depth and decodes there. Throws Error when a depth is beyond max_seq_len or the steps
// do not fit.
BenchReport bench(Session& session, const BenchOptions& options);

// Members of a JSON object, without braces.
std::string bench_json(const BenchReport& report);
std::string bench_table(const BenchReport& report);

}  // namespace kiln
