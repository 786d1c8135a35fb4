// Batch of the Python module: events are plain tuples.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "kiln/batch.h"

namespace py = pybind11;
using kiln::Batch;
using kiln::BatchRow;

// pybind.cpp
py::dict memory_of(const kiln::MemoryReport& m);
py::dict counts_of(const kiln::DraftCounts& c);
py::array_t<float> to_numpy(const std::vector<float>& row);

void bind_batch(py::module_& m) {
  using ReleaseGil = py::call_guard<py::gil_scoped_release>;
  py::class_<BatchRow, kiln::Resumable>(m, "BatchRow", "A row of a batch, between two timelines in it.")
      .def_property_readonly("number", &BatchRow::number)
      .def("restore", &BatchRow::restore, py::arg("snapshot"), ReleaseGil(), "Holds what the snapshot's row or session held. Error while a timeline is in it.");
  py::class_<Batch>(m, "Batch", "Several timelines over one model, which take their tokens in the same steps.")
      .def(py::init([](std::shared_ptr<kiln::Model> model, int64_t rows, int64_t prefill_chunk, double max_gap_ms, bool keep_logits, bool graph,
                       bool early_launch, int64_t read_by_step, bool run_ahead) {
             return std::make_unique<Batch>(std::move(model),
                                            kiln::BatchOptions{rows, prefill_chunk, max_gap_ms, keep_logits, graph, early_launch, read_by_step, run_ahead});
           }),
           py::arg("model"), py::arg("rows") = 0, py::arg("prefill_chunk") = 0, py::arg("max_gap_ms") = 0., py::arg("keep_logits") = false,
           py::arg("graph") = true, py::arg("early_launch") = true, py::arg("read_by_step") = 0, py::arg("run_ahead") = false,
           ReleaseGil(), "run_ahead: queue a step before step() returns the tokens of the one before.")
      .def("join", [](Batch& b, const std::vector<int64_t>& prompt, float temperature, int32_t top_k, float top_p, int64_t seed, int64_t max_new_tokens,
                      bool stop_at_eog, const std::optional<std::string>& draft, int64_t draft_length, bool draft_fixed, int64_t row, bool keep_logits) {
             return b.join({prompt, {temperature, top_k, top_p, seed}, max_new_tokens, stop_at_eog,
                            {kiln::draft_source(draft.value_or("off")), draft_length, {}, draft_fixed}, row, keep_logits});
           },
           py::arg("prompt"), py::arg("temperature") = 0.f, py::arg("top_k") = 0, py::arg("top_p") = 1.f, py::arg("seed") = 0,
           py::arg("max_new_tokens") = 0, py::arg("stop_at_eog") = true, py::arg("draft") = py::none(), py::arg("draft_length") = 0,
           py::arg("draft_fixed") = false, py::arg("row") = -1, py::arg("keep_logits") = false, ReleaseGil(),
           "A handle for a new timeline. draft: as Session.generate(); drafts of all timelines share what room a step has. row: a free one with whose "
           "tokens the prompt begins, which are not read again.")
      .def_property_readonly("draft_counts", [](const Batch& b) { return counts_of(b.draft_counts()); }, "Of all steps of timelines that draft, as Session's.")
      .def("step", [](Batch& b) {
             std::vector<kiln::RowEvent> events;
             {
               py::gil_scoped_release release;
               events = b.step();
             }
             py::list out;
             for (const kiln::RowEvent& e : events) {
               py::object token = e.token < 0 ? py::object(py::none()) : py::object(py::int_(e.token));
               py::object stop = e.stop ? py::object(py::str(kiln::stop_name(*e.stop))) : py::object(py::none());
               py::object error = e.error.empty() ? py::object(py::none()) : py::object(py::str(e.error));
               out.append(py::make_tuple(e.handle, token, stop, error));
             }
             return out;
           }, "[(handle, token or None, stop reason or None, error or None)]: a chunk of a waiting prompt, then a token of every other timeline, or "
           "several in order where drafts were right.")
      .def("leave", &Batch::leave, py::arg("handle"), ReleaseGil())
      .def("extend", &Batch::extend, py::arg("handle"), py::arg("tokens"), py::arg("by_steps") = false, ReleaseGil(),
           "Tokens that come next, in the place of the one sampled last; read as a prompt is, or one a step.")
      .def("row", &Batch::row, py::arg("number"))
      .def("position", &Batch::position, py::arg("handle"), ReleaseGil())
      .def("logits", [](const Batch& b, int64_t handle) { return to_numpy(b.logits(handle)); }, py::arg("handle"),
           "float32 [vocab_size] that the timeline's last token was sampled from; with keep_logits. Of an ended one, too.")
      .def("memory", [](const Batch& b) { return memory_of(b.memory()); }, "As Session.memory(), the caches of all rows.")
      .def("probe", [](Batch& b, const std::vector<int64_t>& tokens, const std::vector<int64_t>& positions, const std::vector<int64_t>& rows,
                       const std::vector<std::tuple<float, int32_t, float, int64_t>>& sampling, int64_t times) {
             std::vector<kiln::Sampling> each;
             for (const auto& [temperature, top_k, top_p, seed] : sampling) each.push_back({temperature, top_k, top_p, seed});
             if (sampling.empty()) each.resize(tokens.size());
             kiln::BatchProbe found;
             {
               py::gil_scoped_release release;
               found = b.probe(tokens, positions, rows, each, times);
             }
             const auto m = static_cast<py::ssize_t>(found.tokens.size());
             return py::make_tuple(found.tokens, to_numpy(found.logits).attr("reshape")(m, -1), found.seconds);
           },
           py::arg("tokens"), py::arg("positions"), py::arg("rows"), py::arg("sampling") = py::list(), py::arg("times") = 1,
           "For measurements and tests: a step as it is given, sampling (temperature, top_k, top_p, seed) for each token, greedy without: "
           "(sampled, float32 [tokens, vocab_size], seconds of all).")
      .def_property_readonly("early_launches", &Batch::early_launches)
      .def("cache_memory", [](const Batch& b) {
             py::dict out;
             for (const auto& cache : b.cache_memory()) out[cache.name.c_str()] = py::make_tuple(reinterpret_cast<uintptr_t>(cache.data), cache.bytes);
             return out;
           }, "For measurements: name -> (address on the device, bytes) of each cache, one row's behind the other's.")
      .def_property_readonly("rows", &Batch::rows)
      .def_property_readonly("active", &Batch::active);
}
