#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace kiln {

// The command line of kiln-run.
struct Arguments {
  std::string artifact, weights, ple, device = "auto", logits_file, draft = "off";
  std::optional<std::string> prompt, prompt_file, tokens, depths, rates;
  std::vector<int64_t> ids;  // of --tokens, or of --depths
  std::vector<double> draft_rates;  // of --draft-rates
  bool raw = false, json = false, no_eog = false, verify = false, memory = false, no_graph = false, no_early_launch = false, bench = false;
  bool tokenize = false, parse_special = false, help = false, version = false;
  int64_t max_new_tokens = 128, top_k = 0, seed = 0, prefill_chunk = 0, threads = 0, steps = 64, draft_length = 0;
  float temperature = 0, top_p = 1;
};

// Throws UsageError. `help` gets the text of --help first.
Arguments parse_arguments(int argc, char** argv, std::string* help);

// "1,2,3". UsageError, which names `option`, for anything else.
std::vector<int64_t> parse_ids(const char* option, std::string_view list);

}  // namespace kiln
