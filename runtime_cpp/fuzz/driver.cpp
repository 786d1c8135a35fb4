// What libFuzzer does, in small, for a compiler without it: g++ -fsanitize-coverage=trace-pc tells which edges of the code an input takes, and
// an input that takes a new one is kept and changed further.
//
//   TARGET FILE|FOLDER...              each file once
//   TARGET -max_total_time=N FOLDER    the folder's files first, then N seconds of changed ones; one that crashes is written to
//                                      -artifact_prefix=, and the process ends with an error
#include <dirent.h>
#include <sanitizer/common_interface_defs.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstring>
#include <iterator>
#include <random>
#include <vector>

#include "fuzz.h"

namespace {

constexpr size_t kEdges = 1 << 16, kLongest = 4096;
constexpr unsigned kSlowest = 20;  // seconds of one input

using Bytes = std::vector<uint8_t>;
using Clock = std::chrono::steady_clock;

std::array<uint8_t, kEdges> taken;  // by the input that runs
uint32_t previous = 0;
const Bytes* running = nullptr;
std::string prefix = "./";

// In the process's last moments: no memory is taken.
void keep_running() {
  if (!running) return;
  uint64_t hash = 1469598103934665603u;
  for (uint8_t b : *running) hash = (hash ^ b) * 1099511628211u;
  char path[512];
  std::snprintf(path, sizeof path, "%scrash-%016llx", prefix.c_str(), static_cast<unsigned long long>(hash));
  if (FILE* f = std::fopen(path, "wb")) {
    std::fwrite(running->data(), 1, running->size(), f);
    std::fclose(f);
    std::fprintf(stderr, "the input is in %s\n", path);
  }
  running = nullptr;
}

void too_slow(int) {
  std::fprintf(stderr, "an input took more than %u seconds\n", kSlowest);
  std::abort();
}

// True: the input took an edge, or took one so often, that none before did.
bool run(const Bytes& input) {
  static std::array<uint8_t, kEdges> seen{};
  taken.fill(0);
  previous = 0;
  running = &input;
  alarm(kSlowest);
  LLVMFuzzerTestOneInput(input.data(), input.size());
  running = nullptr;
  bool fresh = false;
  for (size_t i = 0; i < kEdges; ++i) {
    if (!taken[i]) continue;
    auto often = static_cast<uint8_t>(1 << std::min(7, 31 - __builtin_clz(taken[i])));
    fresh |= !(seen[i] & often);
    seen[i] |= often;
  }
  return fresh;
}

class Changer {
 public:
  explicit Changer(uint64_t seed) : random_(seed) {}

  size_t below(size_t n) { return n ? random_() % n : 0; }

  Bytes change(Bytes input, const std::vector<Bytes>& corpus) {
    for (size_t n = 1 + below(5); n > 0; --n) once(input, corpus[below(corpus.size())]);
    if (input.size() > kLongest) input.resize(kLongest);
    return input;
  }

 private:
  void once(Bytes& x, const Bytes& other) {
    static const char* const words[] = {"null", "true", "-1", "0", "1e999", "9223372036854775807", "18446744073709551615", "4294967296", "\"\"", "[]", "{}", "\\u0000", "\\ud800",
                                        "\xEF\xBB\xBF", "\xE2\x96\x81", "\xF0\x9F\xA6\x8A", "\xED\xA0\x80", "..", "/", "<bos>", "[[", "\n", "\"a\":", "-0", "PK\1\2", "--", ","};
    static const int64_t numbers[] = {0, 1, -1, 127, 128, 255, 256, 32767, 65535, 65536, INT32_MAX, INT32_MIN, UINT32_MAX, INT64_MAX, INT64_MIN};
    size_t at = below(x.size() + 1), length = std::min(x.size() - at, 1 + below(1 + below(64)));
    auto place = x.begin() + static_cast<ptrdiff_t>(at);
    switch (below(9)) {
      case 0:
        if (at < x.size()) x[at] ^= static_cast<uint8_t>(1 << below(8));
        break;
      case 1:
        if (at < x.size()) x[at] = static_cast<uint8_t>(random_());
        break;
      case 2: x.insert(place, static_cast<uint8_t>(random_())); break;
      case 3: x.erase(place, place + static_cast<ptrdiff_t>(length)); break;
      case 4: {  // a piece of itself, once or often
        Bytes piece(place, place + static_cast<ptrdiff_t>(length));
        for (size_t n = 1 + below(1 + below(20)); n > 0; --n) x.insert(x.begin() + static_cast<ptrdiff_t>(below(x.size() + 1)), piece.begin(), piece.end());
        break;
      }
      case 5: {  // a piece of another
        size_t from = below(other.size() + 1), n = std::min(other.size() - from, 1 + below(256));
        x.insert(place, other.begin() + static_cast<ptrdiff_t>(from), other.begin() + static_cast<ptrdiff_t>(from + n));
        break;
      }
      case 6: {
        const char* word = words[below(std::size(words))];
        if (below(2)) x.erase(place, place + static_cast<ptrdiff_t>(length));
        x.insert(x.begin() + static_cast<ptrdiff_t>(at), word, word + std::strlen(word));
        break;
      }
      case 7: {  // a number of 1 .. 8 bytes
        uint64_t value = static_cast<uint64_t>(numbers[below(std::size(numbers))]) + below(3) - 1;
        size_t n = std::min(x.size() - at, size_t{1} << below(4));
        if (n) std::memcpy(x.data() + at, &value, n);
        break;
      }
      default: {  // digits
        while (at < x.size() && (x[at] < '0' || x[at] > '9')) ++at;
        if (at == x.size()) break;
        size_t end = at;
        while (end < x.size() && x[end] >= '0' && x[end] <= '9') ++end;
        std::string digits = std::to_string(static_cast<uint64_t>(numbers[below(std::size(numbers))]) + below(3) - 1);
        x.erase(x.begin() + static_cast<ptrdiff_t>(at), x.begin() + static_cast<ptrdiff_t>(end));
        x.insert(x.begin() + static_cast<ptrdiff_t>(at), digits.begin(), digits.end());
      }
    }
  }

  std::mt19937_64 random_;
};

Bytes read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) std::fprintf(stderr, "%s: cannot read\n", path.c_str()), std::exit(2);
  return {std::istreambuf_iterator<char>(file), {}};
}

std::vector<std::string> files_of(const std::string& path) {
  DIR* folder = opendir(path.c_str());
  if (!folder) return {path};
  std::vector<std::string> files;
  while (dirent* entry = readdir(folder))
    if (entry->d_name[0] != '.') files.push_back(path + "/" + entry->d_name);
  closedir(folder);
  std::sort(files.begin(), files.end());
  return files;
}

}  // namespace

extern "C" __attribute__((no_sanitize("address", "undefined"))) void __sanitizer_cov_trace_pc() {
  auto here = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(__builtin_return_address(0)));
  here = here * 0x9E3779B1u >> 8;
  uint8_t& count = taken[(here ^ previous) % kEdges];
  count = static_cast<uint8_t>(count + (count < 255));
  previous = here >> 1;
}

// UndefinedBehaviorSanitizer's library ends a process without the callback of AddressSanitizer's: its way out is SIGABRT, which is handled below.
extern "C" const char* __ubsan_default_options() { return "abort_on_error=1:print_stacktrace=1"; }

int main(int argc, char** argv) {
  long seconds = 0;
  uint64_t seed = std::random_device{}();
  std::vector<Bytes> corpus;
  __sanitizer_set_death_callback(keep_running);
  signal(SIGABRT, [](int) { keep_running(); });
  signal(SIGALRM, too_slow);
  size_t runs = 0;
  for (int i = 1; i < argc; ++i) {
    std::string arg = argv[i];
    if (arg.rfind("-max_total_time=", 0) == 0) seconds = std::atol(arg.c_str() + 16);
    else if (arg.rfind("-artifact_prefix=", 0) == 0) prefix = arg.substr(17);
    else if (arg.rfind("-seed=", 0) == 0) seed = std::strtoull(arg.c_str() + 6, nullptr, 10);
    else if (arg[0] != '-')  // libFuzzer has more options
      for (const std::string& file : files_of(arg)) {
        corpus.push_back(read(file));
        run(corpus.back());
        ++runs;
      }
  }
  if (corpus.empty()) corpus.emplace_back(), run(corpus.back());
  size_t given = corpus.size();
  Changer changer(seed);
  auto start = Clock::now();
  while (Clock::now() - start < std::chrono::seconds(seconds)) {
    Bytes input = changer.change(corpus[changer.below(corpus.size())], corpus);
    if (run(input)) corpus.push_back(std::move(input));
    ++runs;
  }
  std::fprintf(stderr, "Done %zu runs in %ld second(s); %zu inputs given, %zu found, seed %llu\n", runs, seconds, given, corpus.size() - given,
               static_cast<unsigned long long>(seed));
  return 0;
}
