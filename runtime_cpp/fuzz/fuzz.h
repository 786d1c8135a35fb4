#pragma once
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>
#include <string_view>

#include "kiln/error.h"

// What a fuzz target is made of. A target gives LLVMFuzzerTestOneInput; libFuzzer runs it, or driver.cpp where there is no clang.

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace kiln::fuzz {

inline std::string_view text(const uint8_t* data, size_t size) { return {reinterpret_cast<const char*>(data), size}; }

// A broken promise, as bad as a crash.
inline void demand(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "broken promise: %s\n", what);
  std::abort();
}

// Runs `f`. It may refuse its input in one readable line; anything else that it throws ends the process. True: it was accepted.
template <typename F>
bool accepts(F&& f) {
  try {
    f();
    return true;
  } catch (const Error& e) {
    std::string line = e.what();
    demand(!line.empty() && line == one_line(line), "an error is one line of UTF-8");
    return false;
  }
}

// A folder in memory that goes with the process.
class Folder {
 public:
  Folder() {
    if (!mkdtemp(path_.data())) std::abort();
  }
  ~Folder() {
    static_cast<void>(std::system(("rm -rf " + path_).c_str()));
  }
  const std::string& path() const { return path_; }
  void write(const char* name, std::string_view bytes) const {
    std::ofstream(path_ + "/" + name, std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  }

 private:
  std::string path_ = "/dev/shm/kiln-fuzz-XXXXXX";
};

}  // namespace kiln::fuzz
