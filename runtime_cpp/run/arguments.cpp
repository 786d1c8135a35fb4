#include "arguments.h"

#include <charconv>

#include "options.h"

namespace kiln {

namespace {

std::vector<Option> option_table(Arguments& a) {
  return {
      {"--weights", "FILE", "the GGUF file of weights that the artifact does not hold (the one it was made of, if it lies beside it)", text(a.weights)},
      {"--ple", "device|host", "where a GPU finds a per-layer embedding's table; host: in pinned memory, read over the bus (as the artifact says)", text(a.ple)},
      {"--prompt", "TEXT", "the user's turn", text(a.prompt)},
      {"--prompt-file", "FILE", "the same, from a file; - is standard input", text(a.prompt_file)},
      {"--tokens", "1,2,3", "token ids instead of text", text(a.tokens)},
      {"--raw", nullptr, "no chat template: BOS and the text", flag(a.raw)},
      {"--max-new-tokens", "N", "tokens to generate (128)", integer("--max-new-tokens", a.max_new_tokens, 1, INT32_MAX)},
      {"--temperature", "F", "0 is greedy (0)", real("--temperature", a.temperature, 0)},
      {"--top-k", "N", "0 is off (0)", integer("--top-k", a.top_k, 0, INT32_MAX)},
      {"--top-p", "F", "1 is off (1)", real("--top-p", a.top_p, 0, 1)},
      {"--seed", "N", "of the sampling (0)", integer("--seed", a.seed, 0, INT64_MAX)},
      {"--draft", "ngram|mtp", "check drafts in steps of several tokens: the text stays the same; ngram: what followed where its end occurred before, mtp: by the artifact's drafter", text(a.draft)},
      {"--draft-length", "N", "most drafts of a step (as many as the artifact's steps take)", integer("--draft-length", a.draft_length, 1, INT32_MAX)},
      {"--draft-rates", "0.9,0.8", "with --bench: draft what will come, each place right as often as this, by a seeded coin", text(a.rates)},
      {"--prefill-chunk", "N", "tokens of one prefill call, up to the artifact's (the artifact's)", integer("--prefill-chunk", a.prefill_chunk, 1, INT32_MAX)},
      {"--device", "DEVICE", "cpu, cuda or cuda:N (a GPU when the artifact has a GPU target)", text(a.device)},
      {"--threads", "N", "CPU threads (all cores)", integer("--threads", a.threads, 1, 1024)},
      {"--no-graph", nullptr, "on a GPU: run decode steps directly, not as a CUDA graph", flag(a.no_graph)},
      {"--no-early-launch", nullptr, "on a GPU: in that graph, start every kernel after the one before it", flag(a.no_early_launch)},
      {"--no-eog", nullptr, "do not stop at end-of-generation tokens", flag(a.no_eog)},
      {"--verify", nullptr, "check every SHA-256 of the artifact first", flag(a.verify)},
      {"--memory", nullptr, "report the memory in use", flag(a.memory)},
      {"--json", nullptr, "one JSON object on standard output", flag(a.json)},
      {"--logits", "FILE", "write every logits row as float32: one per prefill chunk and decode step", text(a.logits_file)},
      {"--bench", nullptr, "measure prefill and decode at several depths, with random tokens", flag(a.bench)},
      {"--depths", "128,512", "with --bench: tokens in the caches (128 and up in steps of 4)", text(a.depths)},
      {"--steps", "N", "with --bench: decode steps at each depth (64)", integer("--steps", a.steps, 1, INT32_MAX)},
      {"--tokenize-stdin", nullptr, "only print token ids, a line for each NUL-separated text; a tokenizer.json will do as ARTIFACT", flag(a.tokenize)},
      {"--parse-special", nullptr, "with --tokenize-stdin: recognize special tokens", flag(a.parse_special)},
      {"--version", nullptr, "print the version", flag(a.version)},
      {"--help", nullptr, "print this, as -h does", flag(a.help)},
  };
}

}  // namespace

std::vector<int64_t> parse_ids(const char* option, std::string_view list) {
  std::vector<int64_t> ids;
  const char* p = list.data();
  const char* end = p + list.size();
  while (true) {
    int64_t id = 0;
    auto r = std::from_chars(p, end, id);
    if (r.ec != std::errc() || (r.ptr != end && *r.ptr != ','))
      usage(option, " ", excerpt(list), ": must be integers separated by commas, number ", ids.size() + 1, " is not");
    ids.push_back(id);
    if (r.ptr == end) return ids;
    p = r.ptr + 1;
  }
}

static bool is_device(const std::string& name) {
  if (name == "auto" || name == "cpu" || name == "cuda") return true;
  return name.rfind("cuda:", 0) == 0 && name.size() > 5 && name.find_first_not_of("0123456789", 5) == std::string::npos;
}

// Of --draft-rates.
static std::vector<double> parse_rates(std::string_view list) {
  std::vector<double> rates;
  for (const char *p = list.data(), *end = p + list.size();;) {
    double rate = -1;
    const auto r = std::from_chars(p, end, rate);
    if (r.ec != std::errc() || (r.ptr != end && *r.ptr != ',') || !(rate >= 0 && rate <= 1))
      usage("--draft-rates ", excerpt(list), ": must be numbers from 0 to 1 separated by commas, number ", rates.size() + 1, " is not");
    rates.push_back(rate);
    if (r.ptr == end) return rates;
    p = r.ptr + 1;
  }
}

Arguments parse_arguments(int argc, char** argv, std::string* help) {
  Arguments a;
  auto options = option_table(a);
  *help = "usage: kiln-run ARTIFACT (--prompt TEXT | --prompt-file FILE | --tokens 1,2,3 | --bench) [options]\n\n" + options_help(options) + "\nenvironment:\n" +
          options_help({{"KILN_FULL_STACK=1", nullptr, "on a GPU: every thread keeps the driver's stack, which compute-sanitizer's racecheck needs", {}}});
  auto positional = parse_options(argc, argv, options);
  if (a.help || a.version) return a;
  if (positional.empty()) usage("no artifact given; see --help");
  if (positional.size() > 1) usage("more than one artifact: ", excerpt(positional[1]));
  a.artifact = positional[0];
  int sources = a.prompt.has_value() + a.prompt_file.has_value() + a.tokens.has_value();
  if (a.bench && a.tokenize) usage("--bench and --tokenize-stdin exclude each other");
  if (a.draft != "off" && a.draft != "ngram" && a.draft != "mtp") usage("--draft ", excerpt(a.draft), ": must be ngram, mtp or off");
  if (!a.ple.empty() && a.ple != "device" && a.ple != "host") usage("--ple ", excerpt(a.ple), ": must be device or host");
  if (!a.device.empty() && !is_device(a.device)) usage("--device ", excerpt(a.device), ": must be auto, cpu, cuda or cuda:N");
  if (a.rates && (!a.bench || a.draft != "off")) usage("--draft-rates needs --bench, without --draft");
  if (a.rates) a.draft_rates = parse_rates(*a.rates);
  if (a.draft_length && a.draft == "off" && !a.rates) usage("--draft-length needs --draft");
  const bool needs_text = !a.tokenize && (!a.bench || a.draft != "off");
  if (needs_text && a.bench && sources != 1) usage("--bench with --draft measures a text: give one of --prompt, --prompt-file, --tokens");
  if (needs_text ? sources != 1 : sources != 0) usage("give one of --prompt, --prompt-file, --tokens, --bench, --tokenize-stdin");
  if (a.bench && a.draft != "off" && a.depths) usage("--depths and --draft exclude each other: a text has its own length");
  if (a.tokens) a.ids = parse_ids("--tokens", *a.tokens);
  if (a.depths && !a.bench) usage("--depths needs --bench");
  if (a.depths) a.ids = parse_ids("--depths", *a.depths);
  if (a.parse_special && !a.tokenize) usage("--parse-special needs --tokenize-stdin: a prompt is never parsed for special tokens");
  if (a.top_p == 0) usage("--top-p 0: must be greater than 0");
  return a;
}

}  // namespace kiln
