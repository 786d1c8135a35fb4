// kiln-run: plays an artifact on the command line.
#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <optional>
#include <thread>

#include "arguments.h"
#include "bench.h"
#include "bench_drafts.h"
#include "artifact/file.h"
#include "kiln/json.h"
#include "kiln/session.h"
#include "load_progress.h"
#include "options.h"
#include "process.h"

namespace kiln {
namespace {

constexpr int kFailure = 1, kUsage = 2;

int tokenize_stdin(const Arguments& a) {
  std::string path = a.artifact;
  if (file_exists(path + "/manifest.json")) {
    Artifact artifact(path);
    if (!artifact.tokenizer) fail(path, ": has no tokenizer");
    path = artifact.path(artifact.tokenizer->file);
  }
  Tokenizer tokenizer = Tokenizer::load(path);
  std::string input = read_text("-");
  for (size_t from = 0; from <= input.size();) {
    size_t to = std::min(input.find('\0', from), input.size());
    auto ids = tokenizer.encode(std::string_view(input).substr(from, to - from), a.parse_special ? ParseSpecial::All : ParseSpecial::None, false);
    std::string line;
    for (int64_t id : ids) line += (line.empty() ? "" : " ") + std::to_string(id);
    print(line + "\n");
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
  return "\"memory\": {" + member("weights", m.weights) + member("host_weights", m.host_weights) + member("kv_ring", m.kv_ring) + member("kv_global", m.kv_global) +
         member("kv_state", m.kv_state) +
         member("activations", m.activations) + member("graph", m.graph) + member("other", m.other) + "\"total\": " + std::to_string(m.total()) + "}, " +
         member("memory_outside", m.outside) + "\"early_launches\": " + std::to_string(session.early_launches());
}

std::string memory_text(const Session& session, const MemoryReport& m) {
  auto gb = [](const char* name, uint64_t bytes) { return name + json_number(static_cast<double>(bytes) / 1e9, "%.3f") + " GB"; };
  std::string text = gb("memory: weights ", m.weights) + (m.host_weights ? gb(" (and on the host ", m.host_weights) + ")" : "") + gb(", KV ring ", m.kv_ring) + gb(", KV global ", m.kv_global) +
                     (m.kv_state ? gb(", state ", m.kv_state) : "") +
                     gb(", activations ", m.activations) + gb(", graph ", m.graph) + gb(", other ", m.other) + gb(", total ", m.total());
  if (session.model().target().cuda)
    text += gb("; beside it ", m.outside) + " of CUDA context, code and other processes\ndecode graph: " + std::to_string(session.early_launches()) +
            " kernels start early";
  return text + "\n";
}

void report(const Arguments& a, const Run& run, const Session& session) {
  const char* stop = noted_signal() ? "interrupted" : stop_name(run.stop);
  if (a.json) {
    std::string line = "{\"prompt_tokens\": " + json_ids(run.prompt) + ", \"tokens\": " + json_ids(run.tokens) + ", \"text\": " + json_quote(run.text) +
                       ", \"stop\": \"" + stop + "\", \"device\": \"" + session.model().device() + "\", \"load_s\": " + json_number(run.load_s) +
                       ", \"ttft_s\": " + json_number(run.ttft_s) + ", \"prefill_tok_s\": " + json_number(run.prefill_rate()) +
                       ", \"decode_tok_s\": " + json_number(run.decode_rate());
    if (a.draft != "off") line += ", \"drafts\": " + drafts_json(session.draft_counts());
    if (a.memory) line += ", " + memory_json(session, session.memory());
    if (!a.logits_file.empty()) line += ", \"logits\": " + json_rows(run.logits);
    return print(line + "}\n");
  }
  print("\n");
  std::fprintf(stderr, "prefill %zu tokens, %.1f tok/s; decode %zu tokens, %.1f tok/s; first token after %.3f s; load %.2f s; stop: %s\n", run.prompt.size(),
               run.prefill_rate(), run.tokens.size(), run.decode_rate(), run.ttft_s, run.load_s, stop);
  if (a.draft != "off") std::fprintf(stderr, "drafts: %s\n", drafts_text(session.draft_counts()).c_str());
  if (run.stop == Stop::MaxSeqLen && !noted_signal())
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
  load.weights = a.weights;
  load.ple = a.ple;
  load.note = [](const std::string& line) { std::fprintf(stderr, "kiln-run: note: %s\n", one_line(line).c_str()); };
  load.progress = [&](uint64_t done, uint64_t total) {
    end_if_noted();
    if (!a.json) progress(done, total);
  };
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

Drafting drafting(const Arguments& a) { return {draft_source(a.draft), a.draft_length}; }

// Before the model is loaded: what cannot be read is told at once.
std::string prompt_text(const Arguments& a) { return a.prompt_file ? read_text(*a.prompt_file) : a.prompt.value_or(""); }
std::vector<int64_t> prompt_ids(const Arguments& a, const Model& model, const std::string& text) { return a.tokens ? a.ids : model.encode_prompt(text, a.raw); }

int measure(const Arguments& a) {
  auto start = Clock::now();
  const std::string text = prompt_text(a);
  LoadProgress progress;
  auto model = load_model(a, progress);
  Session session(model, session_options(a));
  session.set_sampling(sampling(a));
  double load_s = seconds(start, Clock::now());
  if (drafting(a).source != DraftSource::Off || !a.draft_rates.empty()) {
    DraftBenchOptions options;
    if (a.draft_rates.empty()) options.prompt = prompt_ids(a, *model, text);
    options.depths = a.depths ? a.ids : std::vector<int64_t>();
    options.tokens = a.draft_rates.empty() ? a.max_new_tokens : a.steps + 1;
    options.drafting = drafting(a), options.rates = a.draft_rates, options.seed = static_cast<uint64_t>(a.seed), options.look = end_if_noted;
    const std::vector<DraftBenchRow> rows = bench_drafts(session, options);
    if (a.json)
      print("{\"device\": \"" + model->device() + "\", \"target\": " + json_quote(model->target().target) + ", \"load_s\": " + json_number(load_s) + ", " +
            draft_bench_json(rows) + "}\n");
    else
      print(model->device() + ", load " + json_number(load_s, "%.2f") + " s\n" + draft_bench_table(rows));
    progress.succeeded();
    return 0;
  }
  int64_t chunk = a.prefill_chunk ? a.prefill_chunk : model->artifact().prefill_chunk;
  BenchReport report = bench(session, {a.ids, chunk, a.steps, end_if_noted});
  if (a.json)
    print("{\"device\": \"" + model->device() + "\", \"target\": " + json_quote(model->target().target) + ", \"graph\": " + (a.no_graph ? "false" : "true") +
          ", \"prefill_chunk\": " + std::to_string(chunk) + ", \"load_s\": " + json_number(load_s) + ", " + memory_json(session, report.memory) + ", " +
          bench_json(report) + "}\n");
  else
    print(model->device() + ", load " + json_number(load_s, "%.2f") + " s, prefill in chunks of " + std::to_string(chunk) + "\n" + bench_table(report) +
          memory_text(session, report.memory));
  progress.succeeded();
  return 0;
}

int play(const Arguments& a) {
  auto start = Clock::now();
  const std::string text = prompt_text(a);
  LoadProgress progress;
  auto model = load_model(a, progress);
  Run run;
  run.prompt = prompt_ids(a, *model, text);
  Session session(model, session_options(a));
  session.set_sampling(sampling(a));
  session.set_drafts(drafting(a));
  std::ofstream logits_file;
  if (!a.logits_file.empty()) {
    logits_file.open(a.logits_file, std::ios::binary);
    if (!logits_file) fail(a.logits_file, ": cannot write");
    session.set_logits_sink([&](const std::vector<float>& row) {
      logits_file.write(reinterpret_cast<const char*>(row.data()), static_cast<std::streamsize>(row.size() * sizeof(float))).flush();
      if (a.json) run.logits.push_back(row);
    });
  }
  std::optional<StreamDecoder> decoder;
  if (model->has_tokenizer()) decoder.emplace(model->tokenizer());
  auto say = [&](const std::string& piece) {
    run.text += piece;
    if (!a.json && !piece.empty()) print(piece);
  };

  end_if_noted();
  auto ready = Clock::now();
  run.load_s = seconds(start, ready);
  session.set_look(end_if_noted);
  session.prefill(run.prompt);
  session.set_look(nullptr);  // what was generated until then is told
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
        return !noted_signal();
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
  end_if_noted();
  return 0;
}

int run_main(int argc, char** argv) {
  std::string help;
  Arguments a = parse_arguments(argc, argv, &help);
  if (a.help) return print(help), 0;
  if (a.version) return print("kiln-run " + version() + "\n"), 0;
  return a.tokenize ? tokenize_stdin(a) : a.bench ? measure(a) : play(a);
}

int complain(const char* message, int code) {
  std::fprintf(stderr, "kiln-run: error: %s\n", one_line(message).c_str());
  return code;
}

}  // namespace
}  // namespace kiln

int main(int argc, char** argv) {
  try {
    kiln::note_signals();
    return kiln::run_main(argc, argv);
  } catch (const kiln::Ended& e) {
    return 128 + e.signal;
  } catch (const kiln::UsageError& e) {
    return kiln::complain(e.what(), kiln::kUsage);
  } catch (const std::exception& e) {
    return kiln::complain(e.what(), kiln::kFailure);
  }
}
