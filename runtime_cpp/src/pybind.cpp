// The Python module `kiln._runtime`, whose names the package `kiln` hands out: the same classes, exceptions as kiln.Error, no GIL while the model runs.
#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <chrono>
#include <filesystem>

#include "compiled/host.h"
#include "kiln/draft.h"
#include "kiln/snapshot.h"

namespace py = pybind11;
using kiln::Model;
using kiln::Session;
using kiln::Snapshot;
using kiln::SnapshotStore;
using kiln::Tokenizer;

namespace {

using ReleaseGil = py::call_guard<py::gil_scoped_release>;

// pybind11's holder takes no const; nothing that is bound writes to it.
std::shared_ptr<Snapshot> shared(std::shared_ptr<const Snapshot> s) { return std::const_pointer_cast<Snapshot>(std::move(s)); }

kiln::ParseSpecial parse_mode(bool parse_special) { return parse_special ? kiln::ParseSpecial::All : kiln::ParseSpecial::None; }

}  // namespace

py::array_t<float> to_numpy(const std::vector<float>& row) {
  try {
    return py::array_t<float>(static_cast<py::ssize_t>(row.size()), row.data());
  } catch (const py::error_already_set& e) {
    if (!e.matches(PyExc_ImportError)) throw;
    throw py::import_error("logits are numpy arrays, and numpy is not installed: pip install kiln-runtime[numpy]");
  }
}

namespace {

std::shared_ptr<const Model> load(const std::string& path, const std::string& device, bool verify, int threads, py::object progress,
                                  const std::optional<std::string>& weights, const std::optional<std::string>& ple) {
  kiln::LoadOptions options;
  options.weights = weights.value_or("");
  options.ple = ple.value_or("");
  options.note = [](const std::string& line) {
    py::gil_scoped_acquire gil;
    if (PyErr_WarnEx(PyExc_UserWarning, line.c_str(), 1) != 0) throw py::error_already_set();
  };
  options.device = device;
  options.verify = verify;
  options.threads = threads;
  if (!progress.is_none())
    options.progress = [progress](uint64_t done, uint64_t total) {
      py::gil_scoped_acquire gil;
      progress(done, total);
    };
  py::gil_scoped_release release;
  return Model::load(path, options);
}

// Ctrl-C while the model runs: Python notes the signal, and somebody has to ask. Only its main thread gets an answer.
std::function<void()> signals_at_intervals() {
  using Clock = std::chrono::steady_clock;
  return [last = Clock::time_point()]() mutable {
    if (Clock::now() - last < std::chrono::milliseconds(50)) return;
    last = Clock::now();
    py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  };
}

kiln::Drafting drafting_of(const py::object& draft, int64_t length, bool fixed) {
  if (py::isinstance<kiln::ScriptedDrafter>(draft)) return {kiln::DraftSource::Off, length, draft.cast<std::shared_ptr<kiln::ScriptedDrafter>>()};
  return {kiln::draft_source(draft.is_none() ? "off" : draft.cast<std::string>()), length, {}, fixed};
}

py::tuple generate(Session& session, int64_t max_new_tokens, py::object on_token, bool stop_at_eog, const py::object& draft,
                   int64_t draft_length, bool draft_fixed) {
  const kiln::Drafting drafting = drafting_of(draft, draft_length, draft_fixed);
  std::vector<int64_t> tokens;
  kiln::Stop stop;
  {
    py::gil_scoped_release release;
    session.set_drafts(drafting);
    stop = session.generate(
        max_new_tokens,
        [&](int64_t token) {
          tokens.push_back(token);
          if (on_token.is_none()) return true;
          py::gil_scoped_acquire gil;
          py::object more = on_token(token);
          return more.is_none() || more.cast<bool>();
        },
        stop_at_eog);
  }
  return py::make_tuple(tokens, kiln::stop_name(stop));
}

void set_logits_sink(Session& session, py::object sink) {
  if (sink.is_none()) return session.set_logits_sink(nullptr);
  session.set_logits_sink([sink](const std::vector<float>& row) {
    py::gil_scoped_acquire gil;
    sink(to_numpy(row));
  });
}

}  // namespace

py::dict memory_of(const kiln::MemoryReport& m) {
  py::dict out;
  out["weights"] = m.weights;
  out["host_weights"] = m.host_weights;
  out["kv_ring"] = m.kv_ring;
  out["kv_global"] = m.kv_global;
  out["kv_state"] = m.kv_state;
  out["activations"] = m.activations;
  out["graph"] = m.graph;
  out["other"] = m.other;
  out["total"] = m.total();
  return out;
}

py::dict counts_of(const kiln::DraftCounts& c) {
  py::dict out;
  out["steps"] = c.steps, out["tokens"] = c.tokens, out["tried"] = c.tried, out["right"] = c.right;
  return out;
}

void bind_batch(py::module_& m);  // pybind_batch.cpp

PYBIND11_MODULE(_runtime, m) {
  kiln::share_libstdcxx();
  m.doc() = "Plays kiln artifacts: Model (an artifact on a device), Session (one timeline over it), Tokenizer.";
  m.attr("__version__") = kiln::version();
  py::register_exception<kiln::Error>(m, "Error");
  m.def("set_threads", &kiln::set_threads, py::arg("threads"), "Threads of the CPU kernels, for the whole process.");

  py::class_<Tokenizer>(m, "Tokenizer")
      .def(py::init(&Tokenizer::load), py::arg("path"), ReleaseGil(), "Reads a tokenizer.json.")
      .def(
          "encode",
          [](const Tokenizer& t, const std::string& text, bool parse_special, bool add_bos, bool add_eos) {
            return t.encode(text, parse_mode(parse_special), add_bos, add_eos);
          },
          py::arg("text"), py::arg("parse_special") = false, py::arg("add_bos") = true, py::arg("add_eos") = false, ReleaseGil(), "Token ids of a str or of bytes.")
      .def(
          "encode_segments",
          [](const Tokenizer& t, const std::vector<std::pair<std::string, bool>>& segments, bool add_bos) {
            std::vector<Tokenizer::Segment> parts;
            for (const auto& [text, parse_special] : segments) parts.emplace_back(text, parse_mode(parse_special));
            return t.encode_segments(parts, add_bos);
          },
          py::arg("segments"), py::arg("add_bos") = true, ReleaseGil(), "Token ids of texts one after the other, each with whether special tokens are parsed in it.")
      .def("encode_chat", [](const Tokenizer& t, const std::string& prefix, const std::string& user, const std::string& suffix, bool trimmed) {
            return t.encode_chat(prefix, user, suffix, trimmed);
          }, py::arg("prefix"), py::arg("user"), py::arg("suffix"), py::arg("trimmed") = true, ReleaseGil(), "One user turn: only prefix and suffix are parsed for special tokens.")
      .def("decode", &Tokenizer::decode, py::arg("ids"), py::arg("skip_special") = true)
      .def("piece", [](const Tokenizer& t, int64_t id, bool skip_special) { return py::bytes(std::string(t.piece(id, skip_special))); }, py::arg("id"),
           py::arg("skip_special") = true, "The raw bytes of one token.")
      .def("__len__", &Tokenizer::size)
      .def_property_readonly("bos", [](const Tokenizer& t) -> py::object { return t.bos() < 0 ? py::object(py::none()) : py::object(py::int_(t.bos())); });

  py::class_<kiln::StreamDecoder>(m, "StreamDecoder")
      .def(py::init<const Tokenizer&, bool>(), py::arg("tokenizer"), py::arg("skip_special") = true, py::keep_alive<1, 2>())
      .def("push", &kiln::StreamDecoder::push, py::arg("id"), "The text that is complete now.")
      .def("finish", &kiln::StreamDecoder::finish, "What was held back.");

  py::class_<Model, std::shared_ptr<Model>>(m, "Model")
      .def(py::init([](const std::string& path, const std::string& device, bool verify, int threads, py::object progress,
                       const std::optional<std::string>& weights, const std::optional<std::string>& ple) {
             return std::const_pointer_cast<Model>(load(path, device, verify, threads, std::move(progress), weights, ple));
           }),
           py::arg("path"), py::arg("device") = "auto", py::arg("verify") = false, py::arg("threads") = 1, py::arg("progress") = py::none(),
           py::arg("weights") = py::none(), py::arg("ple") = py::none(),
           "Loads an artifact; progress(done_bytes, total_bytes) is called while the weights are loaded. weights: the GGUF file, of an artifact that "
           "holds code only; None: the one it was made of, if it lies beside it. ple: 'device' or 'host', where a GPU finds a per-layer embedding's "
           "table; as the artifact says otherwise.")
      .def_property_readonly("tokenizer", &Model::tokenizer, py::return_value_policy::reference_internal)
      .def_property_readonly("manifest", [](const Model& model) { return py::module_::import("json").attr("loads")(model.artifact().manifest); })
      .def_property_readonly("device", &Model::device)
      .def_property_readonly("target", [](const Model& model) { return model.target().target; })
      .def_property_readonly("vocab_size", &Model::vocab_size)
      .def_property_readonly("max_seq_len", [](const Model& model) { return model.artifact().max_seq_len; })
      .def_property_readonly("prefill_chunk", [](const Model& model) { return model.artifact().prefill_chunk; })
      .def_property_readonly("free_bytes", &Model::free_bytes, "Memory of its device that nothing has taken yet.")
      .def("weight_memory", [](const Model& model) {
            py::dict out;
            for (const auto& w : model.weight_memory()) out[w.name.c_str()] = py::make_tuple(reinterpret_cast<uintptr_t>(w.data), w.bytes);
            return out;
          }, "For measurements: name -> (address on the device, bytes) of each constant.")
      .def("is_eog", &Model::is_eog, py::arg("token"))
      .def("encode_prompt", [](const Model& model, const std::string& text, bool raw) { return model.encode_prompt(text, raw); }, py::arg("text"),
           py::arg("raw") = false, "Token ids of one user turn in the chat template, or of BOS and the text.");

  py::class_<Snapshot, std::shared_ptr<Snapshot>>(m, "Snapshot", "A session as it stood at a position, to go on from. Immutable.")
      .def_property_readonly("position", &Snapshot::position)
      .def_property_readonly("tokens", &Snapshot::tokens, "The tokens that the caches held.")
      .def_property_readonly("whole", &Snapshot::whole, "Any session of the model can go on from it.")
      .def_property_readonly("on_device", &Snapshot::on_device)
      .def_property_readonly("device_bytes", &Snapshot::device_bytes)
      .def_property_readonly("host_bytes", &Snapshot::host_bytes)
      .def("to_host", [](const Snapshot& s) { return shared(s.to_host()); }, ReleaseGil(), "The same with its copies in pinned memory of the host.");

  using kiln::Resumable;
  py::class_<Resumable>(m, "Resumable", "A session, or a row of a batch.")
      .def_property_readonly("position", &Resumable::position, "Tokens in the caches.")
      .def_property_readonly("tokens", &Resumable::tokens, "The tokens in the caches.")
      .def("snapshot", [](const Resumable& s, bool whole, bool host) { return shared(s.snapshot({whole, host})); }, py::arg("whole") = false,
           py::arg("host") = false, ReleaseGil(), "As it stands. whole: to outlive what it does next to its past.")
      .def("can_restore", &Resumable::can_restore, py::arg("snapshot"), py::arg("from_others") = false, ReleaseGil(),
           "from_others: with the help of the caches that it was taken of, while they hold what they held.")
      .def("rewind", &Resumable::rewind, py::arg("position"), ReleaseGil(), "Forgets the tokens from `position` on: 0, or earliest .. position.")
      .def_property_readonly("earliest", &Resumable::earliest, "The first position, but for 0, that rewind() can go back to.");
  py::class_<Session, Resumable>(m, "Session")
      .def(py::init([](std::shared_ptr<Model> model, int64_t prefill_chunk, bool graph, bool early_launch, int64_t read_by_step) {
             auto session = std::make_unique<Session>(std::move(model), kiln::SessionOptions{prefill_chunk, graph, early_launch, read_by_step});
             session->set_look(signals_at_intervals());
             return session;
           }),
           py::arg("model"), py::arg("prefill_chunk") = 0, py::arg("graph") = true, py::arg("early_launch") = true, py::arg("read_by_step") = 0,
           ReleaseGil(), "read_by_step: of what prefill() reads, the last tokens that one step takes, at most; 0: on a GPU as many as it can.")
      .def("prefill", &Session::prefill, py::arg("tokens"), ReleaseGil(), "Appends tokens; returns the token sampled after them.")
      .def("decode", [](Session& s) { return s.decode(); }, ReleaseGil(), "Feeds the token sampled last; returns the next one.")
      .def("decode", [](Session& s, int64_t token) { return s.decode(token); }, py::arg("token"), ReleaseGil(), "Feeds `token`; returns the next one.")
      .def("generate", &generate, py::arg("max_new_tokens"), py::arg("on_token") = py::none(), py::arg("stop_at_eog") = true,
           py::arg("draft") = py::none(), py::arg("draft_length") = 0, py::arg("draft_fixed") = false,
           "(tokens, stop reason); on_token(id) may return False to stop. draft: 'ngram', 'mtp' (a ScriptedDrafter, to measure), and at most how many "
           "a step (0: as many as fit); draft_fixed: no fewer than there are, whatever they cost, to measure.")
      .def("probe_drafts", [](Session& s, int64_t count, std::optional<int64_t> token) {
            kiln::DraftProbe found;
            {
              py::gil_scoped_release release;
              found = s.probe_drafts(count, token);
            }
            return py::make_tuple(found.tokens, to_numpy(found.logits).attr("reshape")(count, -1), to_numpy(found.hidden).attr("reshape")(count, -1), found.seconds);
          }, py::arg("count"), py::arg("token") = py::none(),
          "For measurements and tests: what the artifact's drafter drafts behind `token`, or the one sampled last: (tokens, float32 [count, vocab_size], float32 [count, D], "
          "seconds of the same once more, rows unread).")
      .def_property_readonly("draft_counts", [](const Session& s) { return counts_of(s.draft_counts()); }, "Of the last generate() with drafts: steps, the tokens they gave, and of each place of a draft how often it was tried and right.")
      .def("logits", [](Session& s) {
            const std::vector<float>* row;
            {
              py::gil_scoped_release release;
              row = &s.logits();
            }
            return to_numpy(*row);
          }, "float32 [vocab_size] of the last position.")
      .def("set_logits_sink", &set_logits_sink, py::arg("sink"), "sink(row) gets every logits row as it is computed; None: off.")
      .def("set_sampling", [](Session& s, float temperature, int32_t top_k, float top_p, int64_t seed) { s.set_sampling({temperature, top_k, top_p, seed}); },
           py::arg("temperature") = 0.f, py::arg("top_k") = 0, py::arg("top_p") = 1.f, py::arg("seed") = 0, ReleaseGil())
      .def("cache_memory", [](const Session& s) {
            py::dict out;
            for (const auto& cache : s.cache_memory()) out[cache.name.c_str()] = py::make_tuple(reinterpret_cast<uintptr_t>(cache.data), cache.bytes);
            return out;
          }, "For measurements: name -> (address on the device, bytes) of each cache.")
      .def("pretend", &Session::pretend, py::arg("position"), ReleaseGil(), "For measurements: goes on at `position`, over the caches as they are.")
      .def("reset", &Session::reset, ReleaseGil())
      .def("snapshot_bytes", &Session::snapshot_bytes, py::arg("whole") = false, ReleaseGil(), "Of the copies of a snapshot that is taken now.")
      .def("restore", &Session::restore, py::arg("snapshot"), ReleaseGil(), "Goes on from a snapshot of this session or another one of the model.")
      .def("restore", [](Session& s, const std::filesystem::path& path) { s.load(path.string()); }, py::arg("path"), ReleaseGil(),
           "Goes on from a saved session.")
      .def("save", [](const Session& s, const std::filesystem::path& path) { s.save(path.string()); }, py::arg("path"), ReleaseGil(),
           "Writes all that is needed to go on to a file, whole or not at all.")
      .def("memory", [](const Session& s) { return memory_of(s.memory()); }, "Bytes: weights, host_weights (not in total), kv_ring, kv_global, kv_state, activations, graph, other, total.")
      .def_property_readonly("early_launches", &Session::early_launches, "Kernels of the decode graph that start early.");

  py::class_<SnapshotStore>(m, "SnapshotStore", "Snapshots of many conversations within budgets of bytes; the one used least recently goes first.")
      .def(py::init<uint64_t, uint64_t>(), py::arg("device_bytes"), py::arg("host_bytes"))
      .def("take", &SnapshotStore::take, py::arg("session"), py::arg("conversation"), py::arg("whole") = false, ReleaseGil(),
           "Keeps a snapshot of the session as it stands. False: it is larger than the budgets.")
      .def("longest", [](SnapshotStore& store, const Resumable& session, const std::vector<int64_t>& ids, const std::string& conversation, bool from_others) {
            return shared(store.longest(session, ids, conversation, from_others));
          }, py::arg("session"), py::arg("ids"), py::arg("conversation"), py::arg("from_others") = false, ReleaseGil(),
           "The longest whose tokens `ids` begins with and goes on from, and that the session can restore; None: there is none. from_others: as "
           "can_restore(), where no other thread uses the sessions.")
      .def("forget", &SnapshotStore::forget, py::arg("conversation"), ReleaseGil())
      .def("counts", [](const SnapshotStore& store) {
            const SnapshotStore::Counts c = store.counts();
            py::dict out;
            for (auto [name, value] : {std::pair("device_bytes", static_cast<int64_t>(c.device_bytes)), {"host_bytes", static_cast<int64_t>(c.host_bytes)},
                                       {"kept", c.kept}, {"hits", c.hits}, {"misses", c.misses}, {"evicted", c.evicted}, {"moved", c.moved}, {"refused", c.refused}})
              out[name] = value;
            return out;
          }, "device_bytes, host_bytes, kept; hits, misses, evicted, moved (to the host), refused.");

  py::class_<kiln::NgramDrafter>(m, "NgramDrafter", "Drafts what followed where the longest suffix of the text occurred before.")
      .def(py::init<int64_t, int64_t>(), py::arg("shortest") = 2, py::arg("longest") = 8)
      .def("append", &kiln::NgramDrafter::append, py::arg("tokens"))
      .def("cut", &kiln::NgramDrafter::cut, py::arg("length"))
      .def("draft", &kiln::NgramDrafter::draft, py::arg("most"))
      .def("__len__", &kiln::NgramDrafter::length);
  py::class_<kiln::ScriptedDrafter, std::shared_ptr<kiln::ScriptedDrafter>>(m, "ScriptedDrafter", "Drafts what is known to come, each place right as often as it is told: for measurements.")
      .def(py::init<std::vector<int64_t>, std::vector<double>, int64_t, uint64_t>(), py::arg("script"), py::arg("rates"), py::arg("vocab_size"),
           py::arg("seed") = 0);
  py::class_<kiln::Acceptance>(m, "Acceptance", "How many of a step's drafts were right, and how many are worth drafting next.")
      .def(py::init<int64_t>(), py::arg("most"))
      .def_static("agreed", &kiln::Acceptance::agreed, py::arg("drafts"), py::arg("written"))
      .def("took", &kiln::Acceptance::took, py::arg("drafted"), py::arg("accepted"))
      .def("chances", &kiln::Acceptance::chances, "Of each place: how likely the draft is right up to it.")
      .def_property_readonly("due", &kiln::Acceptance::due, "Nothing was drafted for so long that one draft is tried whatever the chances.")
      .def_property_readonly("tried", &kiln::Acceptance::tried)
      .def_property_readonly("right", &kiln::Acceptance::right);
  py::class_<kiln::StepCosts>(m, "StepCosts", "What steps of several tokens take, as they were measured.")
      .def(py::init<std::vector<int64_t>>(), py::arg("sizes"))
      .def("took", &kiln::StepCosts::took, py::arg("tokens"), py::arg("seconds"))
      .def("of", &kiln::StepCosts::of, py::arg("tokens"));
  m.def("share_drafts", &kiln::share_drafts, py::arg("chances"), py::arg("costs"), py::arg("draft_seconds") = std::vector<double>(), "How many drafts of each row are worth taking into one step.");
  bind_batch(m);
}
