#pragma once
#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "caches/caches.h"
#include "kiln/session.h"
#include "model/turn.h"
#include "session/speculation.h"

namespace kiln {

struct Session::Impl : Caches {
  Impl(std::shared_ptr<const Model> m, const SessionOptions& options);
  ~Impl();

  int64_t append(const std::vector<int64_t>& tokens);
  int64_t step();
  int64_t step(int64_t token);
  Stop generate(int64_t max_new_tokens, const std::function<bool(int64_t)>& on_token, bool stop_at_eog);
  void reset();
  void rewind(int64_t to);
  std::shared_ptr<const Snapshot> snapshot(const SnapshotOptions& options, std::weak_ptr<Impl> self);
  void restore(const Snapshot& snapshot);
  void save(const std::string& path);
  void load(const std::string& path);
  void set_sampling(const Sampling& sampling);
  void set_drafts(const Drafting& drafting);

  void make_caches();
  void bind_constants();
  void warm_up();
  void check_tokens(const std::vector<int64_t>& tokens) const;
  CompiledModel::Output run_prefill(const int64_t* tokens, int64_t n);
  void prefill_chunk(const int64_t* tokens, int64_t n);
  void run_step();
  void launch();
  void next_step() { launch(), timeline->send(values.at("tokens")), take_next(1); }
  void take_next(int64_t unread);
  void check_next();
  void begin_drafts();
  bool take_drafts(int64_t room, bool stop_at_eog);
  void read_step(const int64_t* tokens, int64_t n);
  DecodeStep& wide_step(int64_t tokens);
  DecodeStep& run_wide(const std::vector<int64_t>& tokens);
  TensorMap all_rows() const;
  ModelDrafter& model_drafter();
  ModelDrafter::From drafts_from(int64_t token) const { return {token, position, 0, hidden, sampling}; }
  DraftProbe probe_drafts(int64_t count, int64_t token);
  std::vector<int64_t> draft(int64_t most);
  int64_t run_drafts(const std::vector<int64_t>& drafts);
  void next_of_step();
  void took_one(std::chrono::steady_clock::time_point began, bool queued);
  template <typename F>
  auto all_or_nothing(F&& f) -> decltype(f());
  void zero_caches() {
    for (auto& [name, cache] : kv) timeline->zero(cache);
  }
  const std::vector<float>& host_logits();
  void forget_step() { in_step = copied = false, logits.reset(), hidden.reset(); }  // what the device has of it is not what next and position say
  void stand_at(int64_t to, int64_t next_token, bool was_handed_out, std::vector<float> row);
  void took_logits() {
    if (sink) sink(host_logits());
  }

  int64_t chunk = 0;
  std::unique_ptr<Timeline> timeline;
  Surroundings prefill_surroundings, decode_surroundings;
  TensorMap values;  // inputs of the decode step at fixed addresses: tokens [1], pos [1], the sampling inputs [1]
  std::unique_ptr<CompiledModel> prefill, decode;

  Tensor logits;        // [1, V] of the last run
  Tensor graph_logits;  // the graph's own output; undefined: there is no graph
  Tensor hidden, graph_hidden;  // [1, D] likewise; undefined: not known, or there is no drafter
  std::vector<float> logits_copy;
  bool copied = false;

  int64_t next = -1;        // sampled, not fed yet; -1: none, or not a number
  bool handed_out = false;  // generate() has given `next` to its caller
  bool in_step = false;     // the device's tokens hold `next`
  std::function<void(const std::vector<float>&)> sink;
  std::function<void()> look;  // Session::set_look
  SessionOptions options;
  Sampling sampling;
  std::map<int64_t, DecodeStep> wide;    // steps of several tokens, by M; opened when they are needed
  std::unique_ptr<Speculation> drafts;   // what was learned stays where drafts are switched off
  Speculation* speculation = nullptr;    // of generate() as it is set now; null: no drafts
  DraftCounts draft_counts;
  mutable std::atomic<bool> busy{false};
};

}  // namespace kiln
