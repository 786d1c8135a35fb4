// kiln-run: plays an artifact on the command line.
#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <functional>
#include <iostream>
#include <iterator>
#include <optional>
#include <thread>

#include "bench.h"
#include "file.h"
#include "kiln/json.h"
#include "kiln/session.h"
#include "load_progress.h"
#include "options.h"

namespace kiln {
namespace {

constexpr int kFailure = 1, kUsage = 2;

struct Arguments {
  std::string artifact, prompt, prompt_file, tokens, depths, device = "auto", logits_file;
  std::vector<int64_t> ids;  // of --tokens, or of --depths
  bool has_prompt = false, raw = false, json = false, no_eog = false, verify = false, memory = false, no_graph = false, bench = false;
  bool no_early_launch = false;
  bool tokenize = false, parse_special = false, help = false, version = false;
  int64_t max_new_tokens = 128, top_k = 0, seed = 0, prefill_chunk = 0, threads = 0, steps = 64;
  float temperature = 0, top_p = 1;
};

std::vector<Option> option_table(Arguments& a) {
  auto prompt = [&a](const std::string& value) { a.prompt = value, a.has_prompt = true; };
  return {
      {"--prompt", "TEXT", "the user's turn", prompt},
      {"--prompt-file", "FILE", "the same, from a file", text(a.prompt_file)},
      {"--tokens", "1,2,3", "token ids instead of text", text(a.tokens)},
      {"--raw", nullptr, "no chat template: BOS and the text", flag(a.raw)},
      {"--max-new-tokens", "N", "tokens to generate (128)", integer("--max-new-tokens", a.max_new_tokens, 1, INT32_MAX)},
      {"--temperature", "F", "0 is greedy (0)", real("--temperature", a.temperature)},
      {"--top-k", "N", "0 is off (0)", integer("--top-k", a.top_k, 0, INT32_MAX)},
      {"--top-p", "F", "1 is off (1)", real("--top-p", a.top_p)},
      {"--seed", "N", "of the sampling (0)", integer("--seed", a.seed, 0, INT64_MAX)},
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
      {"--help", nullptr, "print this", flag(a.help)},
  };
}

std::vector<int64_t> parse_ids(const char* option, const std::string& list) {
  std::vector<int64_t> ids;
  const char* p = list.data();
  const char* end = p + list.size();
  while (true) {
    int64_t id = 0;
    auto r = std::from_chars(p, end, id);
    if (r.ec != std::errc() || (r.ptr != end && *r.ptr != ',')) throw UsageError(std::string(option) + " " + list + ": must be integers separated by commas");
    ids.push_back(id);
    if (r.ptr == end) return ids;
    p = r.ptr + 1;
  }
}

Arguments parse(int argc, char** argv, std::string* help) {
  Arguments a;
  auto options = option_table(a);
  *help = "usage: kiln-run ARTIFACT (--prompt TEXT | --prompt-file FILE | --tokens 1,2,3 | --bench) [options]\n\n" + options_help(options) + "\nenvironment:\n" +
          options_help({{"KILN_FULL_STACK=1", nullptr, "on a GPU: every thread keeps the driver's stack, which compute-sanitizer's racecheck needs", {}}});
  auto positional = parse_options(argc, argv, options);
  if (a.help || a.version) return a;
  if (positional.size() != 1) throw UsageError(positional.empty() ? "no artifact given; see --help" : "more than one artifact: " + positional[1]);
  a.artifact = positional[0];
  int sources = a.has_prompt + !a.prompt_file.empty() + !a.tokens.empty();
  if (a.bench && a.tokenize) throw UsageError("--bench and --tokenize-stdin exclude each other");
  if (a.bench || a.tokenize ? sources != 0 : sources != 1) throw UsageError("give one of --prompt, --prompt-file, --tokens, --bench, --tokenize-stdin");
  if (!a.tokens.empty()) a.ids = parse_ids("--tokens", a.tokens);
  if (!a.depths.empty() && !a.bench) throw UsageError("--depths needs --bench");
  if (!a.depths.empty()) a.ids = parse_ids("--depths", a.depths);
  if (a.parse_special && !a.tokenize) throw UsageError("--parse-special needs --tokenize-stdin: a prompt is never parsed for special tokens");
  return a;
}

int tokenize_stdin(const Arguments& a) {
  std::string path = a.artifact;
  if (file_exists(path + "/manifest.json")) {
    Artifact artifact(path);
    if (!artifact.tokenizer) fail(path, ": has no tokenizer");
    path = artifact.path(artifact.tokenizer->file);
  }
  Tokenizer tokenizer = Tokenizer::load(path);
  std::string input((std::istreambuf_iterator<char>(std::cin)), std::istreambuf_iterator<char>());
  for (size_t from = 0; from <= input.size();) {
    size_t to = std::min(input.find('\0', from), input.size());
    auto ids = tokenizer.encode(std::string_view(input).substr(from, to - from), a.parse_special ? ParseSpecial::All : ParseSpecial::None, false);
    std::string line;
    for (int64_t id : ids) line += (line.empty() ? "" : " ") + std::to_string(id);
    std::cout << line << "\n";
    from = to + 1;
  }
  return 0;
}

using Clock = std::chrono::steady_clock;
double seconds(Clock::time_point from, Clock::time_point to) { return std::chrono::duration<double>(to - from).count(); }

std::string json_ids(const std::vector<int64_t>& ids) {
  std::string out = "[";
  for (int64_t id : ids) out += (out.size() > 1 ? ", " : "") + std::to_string(id);
  return out + "]";
}

std::string json_rows(const std::vector<std::vector<float>>& rows) {
  std::string out = "[";
  for (const auto& row : rows) {
    out += out.size() > 1 ? ", [" : "[";
    for (size_t i = 0; i < row.size(); ++i) out += (i ? ", " : "") + json_number(row[i], "%.9g");
    out += "]";
  }
  return out + "]";
}

struct Run {  // what one prompt gave
  std::vector<int64_t> prompt, tokens;
  std::string text;
  std::vector<std::vector<float>> logits;
  Stop stop = Stop::Length;
  double load_s = 0, ttft_s = 0, decode_s = 0;

  double prefill_rate() const { return static_cast<double>(prompt.size()) / ttft_s; }
  double decode_rate() const { return tokens.size() > 1 && decode_s > 0 ? static_cast<double>(tokens.size() - 1) / decode_s : 0; }
};

// Members of a JSON object, without braces.
std::string memory_json(const Session& session, const MemoryReport& m) {
  auto member = [](const char* name, uint64_t bytes) { return "\"" + std::string(name) + "\": " + std::to_string(bytes) + ", "; };
  return "\"memory\": {" + member("weights", m.weights) + member("kv_ring", m.kv_ring) + member("kv_global", m.kv_global) +
         member("activations", m.activations) + member("graph", m.graph) + member("other", m.other) + "\"total\": " + std::to_string(m.total()) + "}, " +
         member("memory_outside", m.outside) + "\"early_launches\": " + std::to_string(session.early_launches());
}

std::string memory_text(const Session& session, const MemoryReport& m) {
  auto gb = [](const char* name, uint64_t bytes) { return name + json_number(static_cast<double>(bytes) / 1e9, "%.3f") + " GB"; };
  std::string text = gb("memory: weights ", m.weights) + gb(", KV ring ", m.kv_ring) + gb(", KV global ", m.kv_global) +
                     gb(", activations ", m.activations) + gb(", graph ", m.graph) + gb(", other ", m.other) + gb(", total ", m.total());
  if (session.model().target().cuda)
    text += gb("; beside it ", m.outside) + " of CUDA context, code and other processes\ndecode graph: " + std::to_string(session.early_launches()) +
            " kernels start early";
  return text + "\n";
}

void report(const Arguments& a, const Run& run, const Session& session) {
  if (a.json) {
    std::cout << "{\"prompt_tokens\": " << json_ids(run.prompt) << ", \"tokens\": " << json_ids(run.tokens) << ", \"text\": " << json_quote(run.text)
              << ", \"stop\": \"" << stop_name(run.stop) << "\", \"device\": \"" << session.model().device() << "\", \"load_s\": " << json_number(run.load_s)
              << ", \"ttft_s\": " << json_number(run.ttft_s) << ", \"prefill_tok_s\": " << json_number(run.prefill_rate())
              << ", \"decode_tok_s\": " << json_number(run.decode_rate());
    if (a.memory) std::cout << ", " << memory_json(session, session.memory());
    if (!a.logits_file.empty()) std::cout << ", \"logits\": " << json_rows(run.logits);
    std::cout << "}\n";
    return;
  }
  std::cout << std::endl;
  std::fprintf(stderr, "prefill %zu tokens, %.1f tok/s; decode %zu tokens, %.1f tok/s; first token after %.3f s; load %.2f s; stop: %s\n", run.prompt.size(),
               run.prefill_rate(), run.tokens.size(), run.decode_rate(), run.ttft_s, run.load_s, stop_name(run.stop));
  if (run.stop == Stop::MaxSeqLen)
    std::fprintf(stderr, "note: stopped at the artifact's limit of %lld tokens\n", static_cast<long long>(session.model().artifact().max_seq_len));
  if (a.memory) std::fputs(memory_text(session, session.memory()).c_str(), stderr);
}

std::shared_ptr<const Model> load_model(const Arguments& a, LoadProgress& progress) {
  if (a.threads) set_threads(static_cast<int>(a.threads));
  LoadOptions load;
  load.device = a.device;
  load.verify = a.verify;
  load.threads = a.threads ? static_cast<int>(a.threads) : std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  load.small_context = !std::getenv("KILN_FULL_STACK");
  if (!a.json) load.progress = std::ref(progress);
  auto model = Model::load(a.artifact, load);
  progress.loaded();
  return model;
}

Sampling sampling(const Arguments& a) { return {a.temperature, static_cast<int32_t>(a.top_k), a.top_p, a.seed}; }

SessionOptions session_options(const Arguments& a) {
  SessionOptions options;
  options.prefill_chunk = a.prefill_chunk;
  options.graph = !a.no_graph;
  options.early_launch = !a.no_early_launch;
  return options;
}

int measure(const Arguments& a) {
  auto start = Clock::now();
  LoadProgress progress;
  auto model = load_model(a, progress);
  Session session(model, session_options(a));
  session.set_sampling(sampling(a));
  double load_s = seconds(start, Clock::now());
  int64_t chunk = a.prefill_chunk ? a.prefill_chunk : model->artifact().prefill_chunk;
  BenchReport report = bench(session, {a.ids, chunk, a.steps});
  if (a.json)
    std::cout << "{\"device\": \"" << model->device() << "\", \"target\": \"" << model->target().target << "\", \"graph\": " << (a.no_graph ? "false" : "true")
              << ", \"prefill_chunk\": " << chunk << ", \"load_s\": " << json_number(load_s) << ", " << memory_json(session, report.memory) << ", "
              << bench_json(report) << "}\n";
  else
    std::cout << model->device() << ", load " << json_number(load_s, "%.2f") << " s, prefill in chunks of " << chunk << "\n"
              << bench_table(report) << memory_text(session, report.memory);
  progress.succeeded();
  return 0;
}

int play(const Arguments& a) {
  auto start = Clock::now();
  LoadProgress progress;
  auto model = load_model(a, progress);
  Run run;
  if (!a.tokens.empty())
    run.prompt = a.ids;
  else
    run.prompt = model->encode_prompt(a.prompt_file.empty() ? a.prompt : read_file(a.prompt_file), a.raw);
  Session session(model, session_options(a));
  session.set_sampling(sampling(a));
  std::ofstream logits_file;
  if (!a.logits_file.empty()) {
    logits_file.open(a.logits_file, std::ios::binary);
    if (!logits_file) fail(a.logits_file, ": cannot write");
    session.set_logits_sink([&](const std::vector<float>& row) {
      logits_file.write(reinterpret_cast<const char*>(row.data()), static_cast<std::streamsize>(row.size() * sizeof(float)));
      if (a.json) run.logits.push_back(row);
    });
  }
  std::optional<StreamDecoder> decoder;
  if (model->has_tokenizer()) decoder.emplace(model->tokenizer());
  auto say = [&](const std::string& piece) {
    run.text += piece;
    if (!a.json && !piece.empty()) std::cout << piece << std::flush;
  };

  auto ready = Clock::now();
  run.load_s = seconds(start, ready);
  session.prefill(run.prompt);
  auto first = Clock::now();
  run.ttft_s = seconds(ready, first);
  auto last = first;
  run.stop = session.generate(
      a.max_new_tokens,
      [&](int64_t token) {
        last = Clock::now();
        run.tokens.push_back(token);
        if (decoder)
          say(decoder->push(token));
        else
          say((run.tokens.size() > 1 ? " " : "") + std::to_string(token));
        return true;
      },
      !a.no_eog);
  run.decode_s = seconds(first, last);
  if (decoder) say(decoder->finish());
  if (logits_file.is_open()) {
    logits_file.close();
    if (!logits_file) fail(a.logits_file, ": cannot write");
  }
  report(a, run, session);
  progress.succeeded();
  return 0;
}

int run_main(int argc, char** argv) {
  std::string help;
  Arguments a = parse(argc, argv, &help);
  if (a.help) return std::cout << help, 0;
  if (a.version) return std::cout << "kiln-run " << version() << "\n", 0;
  return a.tokenize ? tokenize_stdin(a) : a.bench ? measure(a) : play(a);
}

// A message as one line: errors of the libraries below may have several.
int complain(std::string message, int code) {
  for (char& c : message)
    if (c == '\n' || c == '\r') c = ' ';
  std::cout << std::flush;
  std::cerr << "kiln-run: error: " << message << std::endl;
  return code;
}

}  // namespace
}  // namespace kiln

int main(int argc, char** argv) {
  try {
    return kiln::run_main(argc, argv);
  } catch (const kiln::UsageError& e) {
    return kiln::complain(e.what(), kiln::kUsage);
  } catch (const std::exception& e) {
    return kiln::complain(e.what(), kiln::kFailure);
  }
}
