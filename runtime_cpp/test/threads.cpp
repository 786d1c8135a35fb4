// kiln-threads ARTIFACT [DEVICE] [THREADS SESSIONS ROUNDS] [alive]: sessions made, used by turns and destroyed from many threads; every answer
// must be the one a session alone gives, also after calls that callbacks ended, and from snapshots. With `alive` a thread's sessions of a round live at once and are stepped by turns.
// See `make sanitize-cpu` and tests/tools/gpu_smoke.py.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <vector>

#include "kiln/snapshot.h"

namespace {

using Tokens = std::vector<int64_t>;

constexpr uint64_t kStoreBytes = 1 << 20;

Tokens prompt(const kiln::Model& model, int which) {
  Tokens tokens;
  int64_t length = 2 + which % (model.artifact().prefill_chunk + 2);
  for (int64_t i = 0; i < std::min(length, model.artifact().max_seq_len / 2); ++i) tokens.push_back((which * 31 + i * i * 7 + 3) % model.vocab_size());
  return tokens;
}

int64_t steps(const kiln::Model& model) { return std::min<int64_t>(12, model.artifact().max_seq_len / 2 - 1); }

Tokens answer(const std::shared_ptr<const kiln::Model>& model, int which, const kiln::SessionOptions& options = {}) {
  kiln::Session session(model, options);
  session.prefill(prompt(*model, which));
  Tokens tokens;
  session.generate(steps(*model), [&](int64_t token) { return tokens.push_back(token), true; }, /*stop_at_eog=*/false);
  return tokens;
}

struct Refused : std::runtime_error {
  using std::runtime_error::runtime_error;
};

void demand(bool holds, const char* what) {
  if (!holds) throw std::runtime_error(what);
}

// Chunks of two tokens: in 16 bits another chunking may give another answer.
kiln::SessionOptions short_chunks(const kiln::Model& model) {
  kiln::SessionOptions options;
  options.prefill_chunk = std::min<int64_t>(2, model.artifact().prefill_chunk);
  return options;
}

// The answer with short chunks, from a session whose calls were ended before by exceptions of every callback there is.
Tokens disturbed_answer(const std::shared_ptr<const kiln::Model>& model, int which) {
  const kiln::SessionOptions options = short_chunks(*model);
  kiln::Session session(model, options);
  Tokens fed = prompt(*model, which), tokens;
  auto ends = [](auto&& call) {
    try {
      call();
    } catch (const Refused&) {
      return;
    }
    demand(false, "a callback's exception was lost");
  };
  session.set_logits_sink([](const std::vector<float>&) { throw Refused("sink"); });
  ends([&] { session.prefill(fed); });
  demand(session.position() == 0, "a sink that throws moves the session");
  session.set_logits_sink(nullptr);

  int looks = 0;  // the first is before the first chunk
  session.set_look([&] {
    if (looks++ == 1) throw Refused("look");
  });
  if (static_cast<int64_t>(fed.size()) > options.prefill_chunk) {
    ends([&] { session.prefill(fed); });
    demand(session.position() == options.prefill_chunk, "a look that throws ends the prompt behind a chunk");
    fed.erase(fed.begin(), fed.begin() + options.prefill_chunk);
  }
  session.set_look(nullptr);
  session.prefill(fed);

  auto take = [&](int64_t token) { return tokens.push_back(token), true; };
  ends([&] {
    session.generate(steps(*model), [&](int64_t token) { return take(token), tokens.size() < 3 ? true : throw Refused("on_token"); }, false);
  });
  session.set_logits_sink([](const std::vector<float>&) { throw Refused("sink"); });
  ends([&] { session.decode(); });
  ends([&] { session.decode(1); });
  session.set_logits_sink(nullptr);
  session.generate(steps(*model) - 3, take, false);
  return tokens;
}

// The answer of a session that went astray and came back, or of another one, which goes on from its caches or from the store's.
Tokens answer_from_snapshots(const std::shared_ptr<const kiln::Model>& model, int which, kiln::SnapshotStore& store) {
  const kiln::SessionOptions options = short_chunks(*model);
  const Tokens fed = prompt(*model, which);
  const std::string name = std::to_string(which % 5);
  kiln::Session first(model, options), second(model, options);
  first.prefill(fed);
  const auto snapshot = first.snapshot();
  store.take(first, name, true);
  first.generate(2, [](int64_t) { return true; }, false);
  kiln::Session& taker = which % 2 ? first : second;
  Tokens further = fed;
  further.push_back(1);
  const auto kept = store.longest(taker, further, name);
  taker.restore(which % 3 && kept && kept->position() == static_cast<int64_t>(fed.size()) ? *kept : *snapshot);
  demand(taker.tokens() == fed, "a restored session has other tokens");
  const auto counts = store.counts();
  demand(counts.device_bytes + counts.host_bytes <= kStoreBytes, "the store is above its budget");
  Tokens tokens;
  taker.generate(steps(*model), [&](int64_t token) { return tokens.push_back(token), true; }, false);
  return tokens;
}

std::atomic<int> wrong{0};
std::mutex mutex;

void expect(const Tokens& found, const Tokens& right, int which) {
  if (found == right) return;
  ++wrong;
  std::lock_guard<std::mutex> lock(mutex);
  std::fprintf(stderr, "prompt %d: another answer than alone\n", which);
}

template <typename Body>
void on_threads(int threads, Body&& body) {
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; ++t)
    pool.emplace_back([&, t] {
      try {
        body(t);
      } catch (const std::exception& e) {
        ++wrong;
        std::fprintf(stderr, "thread %d: %s\n", t, e.what());
      }
    });
  for (std::thread& thread : pool) thread.join();
}

// One session, all threads at once: each call either works or is refused, and nothing else.
void fight(const std::shared_ptr<const kiln::Model>& model, int threads, const Tokens& right) {
  kiln::Session session(model);
  std::atomic<int> refused{0};
  on_threads(threads, [&](int) {
    for (int i = 0; i < 50; ++i) try {
        session.prefill({1, 2});
        session.reset();
      } catch (const kiln::Error& e) {
        if (!std::strstr(e.what(), "the session is in use") && !std::strstr(e.what(), "the artifact holds")) throw;
        ++refused;
      }
  });
  session.reset();
  session.prefill(prompt(*model, 0));
  Tokens tokens;
  session.generate(steps(*model), [&](int64_t token) {
    tokens.push_back(token);
    try {
      session.reset();  // from inside its own callback
      ++wrong;
      std::fprintf(stderr, "a call from inside a callback was not refused\n");
    } catch (const kiln::Error&) {
    }
    return true;
  }, false);
  expect(tokens, right, 0);
}

int run(int argc, char** argv) {
  kiln::LoadOptions options;
  options.device = argc > 2 ? argv[2] : "cpu";
  const int threads = argc > 3 ? std::atoi(argv[3]) : 8, sessions = argc > 4 ? std::atoi(argv[4]) : 64, rounds = argc > 5 ? std::atoi(argv[5]) : 20;
  const bool alive = argc > 6 && !std::strcmp(argv[6], "alive");
  kiln::set_threads(1);
  auto model = kiln::Model::load(argv[1], options);
  std::vector<Tokens> right, right_disturbed;
  for (int i = 0; i < sessions; ++i) {
    right.push_back(answer(model, i));
    if (!alive) right_disturbed.push_back(answer(model, i, short_chunks(*model)));
  }
  kiln::SnapshotStore store(model->target().cuda ? kStoreBytes / 2 : 0, model->target().cuda ? kStoreBytes / 2 : kStoreBytes);
  for (int round = 0; round < rounds; ++round) {
    if (!alive) {
      std::atomic<int> next{0};
      on_threads(threads, [&](int) {
        for (int i; (i = next++) < sessions;) {
          const int how = (round + i) % 4;
          expect(how > 1 ? answer(model, i) : how ? answer_from_snapshots(model, i, store) : disturbed_answer(model, i),
                 (how > 1 ? right : right_disturbed)[static_cast<size_t>(i)], i);
        }
      });
      continue;
    }
    on_threads(threads, [&](int t) {
      std::vector<std::unique_ptr<kiln::Session>> mine;
      std::vector<Tokens> found;
      for (int i = t; i < sessions; i += threads) {
        mine.push_back(std::make_unique<kiln::Session>(model));
        found.push_back({mine.back()->prefill(prompt(*model, i))});
      }
      for (int64_t step = 1; step < steps(*model); ++step)
        for (size_t i = 0; i < mine.size(); ++i) found[i].push_back(mine[i]->decode());
      for (size_t i = 0; i < mine.size(); ++i) expect(found[i], right[static_cast<size_t>(t) + i * static_cast<size_t>(threads)], t);
    });
  }
  fight(model, threads, right[0]);
  std::printf("%d sessions by %d threads, %d rounds: %d wrong\n", sessions, threads, rounds, wrong.load());
  return wrong != 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    if (argc < 2) return std::fprintf(stderr, "usage: kiln-threads ARTIFACT [DEVICE] [THREADS SESSIONS ROUNDS] [alive]\n"), 2;
    return run(argc, argv);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "kiln-threads: error: %s\n", e.what());
    return 1;
  }
}
