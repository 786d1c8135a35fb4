// Many sessions of one artifact from many threads, made, used and destroyed at the same time: every answer is that of a session alone. For
// ThreadSanitizer and the others; see `make sanitize-cpu`.
//
//   kiln-sessions ARTIFACT [DEVICE [ROUNDS [THREADS [SESSIONS OF ALL THREADS]]]]
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "kiln/session.h"

namespace {

using Tokens = std::vector<int64_t>;
using kiln::Model;
using kiln::Session;

constexpr int64_t kSteps = 6;
constexpr int kOwnModel = 5;  // in every so many rounds each thread loads the artifact itself

struct Refused : std::runtime_error {
  using std::runtime_error::runtime_error;
};

Tokens prompt_of(size_t i, const Model& model) {
  int64_t most = std::min<int64_t>(model.artifact().max_seq_len - kSteps - 1, 40);
  Tokens tokens(static_cast<size_t>(1 + static_cast<int64_t>(i * 7) % most));
  for (size_t j = 0; j < tokens.size(); ++j) tokens[j] = static_cast<int64_t>((i * 31 + j * j * 17 + 3) % static_cast<size_t>(model.vocab_size()));
  return tokens;
}

Tokens answer(Session& session, size_t i) {
  Tokens tokens;
  session.prefill(prompt_of(i, session.model()));
  session.generate(kSteps, [&](int64_t token) { return tokens.push_back(token), true; }, false);
  return tokens;
}

void demand(bool holds, const std::string& what) {
  if (!holds) throw Refused(what);
}

// Ends calls in every way there is, and then answers.
Tokens disturbed(Session& session, size_t i) {
  Tokens prompt = prompt_of(i, session.model());
  auto ends = [&](auto&& call) {
    try {
      call();
    } catch (const Refused&) {
      return;
    }
    throw Refused("a callback's exception was lost");
  };
  session.set_logits_sink([](const std::vector<float>&) { throw Refused("sink"); });
  ends([&] { session.prefill(prompt); });
  demand(session.position() == 0, "a sink that throws moves the session");
  session.set_logits_sink(nullptr);

  int looks = 0;  // the first is before the first chunk
  session.set_look([&] { looks++ == 1 ? throw Refused("look") : void(); });
  bool chunks = prompt.size() > 2;  // of two tokens, see below
  if (chunks) {
    ends([&] { session.prefill(prompt); });
    demand(session.position() == 2, "a look that throws ends the prompt behind a chunk");
    session.set_look(nullptr);
    session.prefill({prompt.begin() + 2, prompt.end()});
  } else {
    session.set_look(nullptr);
    session.prefill(prompt);
  }

  Tokens tokens;
  auto take = [&](int64_t token) {
    tokens.push_back(token);
    try {
      session.decode();
    } catch (const kiln::Error&) {  // it is in use: by this very call
      return tokens.size() < 2 ? true : throw Refused("on_token");
    }
    throw Refused("a session was used from inside its own callback");
  };
  ends([&] { session.generate(kSteps, take, false); });
  session.generate(kSteps - 2, [&](int64_t token) { return tokens.push_back(token), true; }, false);
  return tokens;
}

}  // namespace

int main(int argc, char** argv) try {
  auto argument = [&](int i, int otherwise) { return argc > i ? std::atoi(argv[i]) : otherwise; };
  if (argc < 2) throw Refused("which artifact?");
  kiln::LoadOptions options;
  if (argc > 2) options.device = argv[2];
  const int rounds = argument(3, 20), threads = argument(4, 8);
  const auto sessions = static_cast<size_t>(argument(5, 64)), each = sessions / static_cast<size_t>(threads);
  kiln::set_threads(1);
  auto shared = Model::load(argv[1], options);
  std::vector<Tokens> alone(sessions);
  for (size_t i = 0; i < sessions; ++i) {
    Session session(shared);
    alone[i] = answer(session, i);
  }
  std::atomic<int> wrong{0};
  std::string why;
  std::atomic<bool> told{false};
  for (int round = 0; round < rounds; ++round) {
    std::vector<std::thread> workers;
    for (int t = 0; t < threads; ++t)
      workers.emplace_back([&, t] {
        try {
          auto model = round % kOwnModel == kOwnModel - 1 ? Model::load(argv[1], options) : shared;
          std::vector<std::unique_ptr<Session>> mine;
          kiln::SessionOptions small;
          small.prefill_chunk = 2;
          for (size_t k = 0; k < each; ++k) mine.push_back(std::make_unique<Session>(model, (round + k) % 2 ? small : kiln::SessionOptions()));
          for (size_t k = 0; k < each; ++k) {
            size_t i = static_cast<size_t>(t) * each + k;
            Tokens tokens = (round + k) % 2 ? disturbed(*mine[k], i) : answer(*mine[k], i);
            if (tokens != alone[i]) ++wrong;
            if (k % 3 == 0) mine[k].reset();  // some go early, in no order with those of other threads
          }
        } catch (const std::exception& e) {
          ++wrong;
          if (!told.exchange(true)) why = e.what();
        }
      });
    for (std::thread& worker : workers) worker.join();
  }
  std::printf("%d rounds of %zu sessions by %d threads: %d wrong%s%s\n", rounds, each * static_cast<size_t>(threads), threads, wrong.load(), why.empty() ? "" : "; ",
              why.c_str());
  return wrong != 0;
} catch (const std::exception& e) {
  std::fprintf(stderr, "kiln-sessions: error: %s\n", e.what());
  return 1;
}
