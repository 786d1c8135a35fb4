#include "cuda/driver.h"

#include <dlfcn.h>

#include <mutex>
#include <shared_mutex>

namespace kiln::cuda {

namespace {

constexpr const char* kLibrary = "libcuda.so.1";
constexpr int kLeast = 13000;  // CUDA version of the driver, as of the compiler that made the kernels

std::string version_text(int version) { return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10); }

Driver open_driver() {
  Driver d;
  void* library = dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    d.missing = std::string("no NVIDIA driver: ") + kLibrary + " was not found";
    return d;
  }
  // Asks for a function in the form that a version of CUDA gave it.
  auto lookup = reinterpret_cast<Result (*)(const char*, void**, int, unsigned long long, int*)>(dlsym(library, "cuGetProcAddress_v2"));
  if (!lookup) {
    d.missing = "the NVIDIA driver is older than CUDA " + version_text(kLeast) + "; update it";
    return d;
  }
  auto find = [&](auto& function, const char* name, int version) {
    void* at = nullptr;
    int found = -1;
    if (lookup(name, &at, version, 0, &found) != kSuccess || found != 0 || !at) return false;
    function = reinterpret_cast<std::decay_t<decltype(function)>>(at);
    return true;
  };
#define F(member, name, version, arguments) \
  if (!find(d.member, name, version) && d.missing.empty()) d.missing = "the NVIDIA driver has no " + std::string(name) + " of CUDA " + version_text(version) + "; update it";
  KILN_DRIVER_FUNCTIONS(F)
#undef F
#define F(member, name, version, arguments) \
  if (!find(d.member, name, version) && d.missing_graph.empty()) d.missing_graph = "the driver has no " + std::string(name) + " of CUDA " + version_text(version);
  KILN_DRIVER_GRAPH_FUNCTIONS(F)
#undef F
  if (int version = 0; d.driver_version && d.driver_version(&version) == kSuccess && version < kLeast)
    d.missing = "the NVIDIA driver is for CUDA " + version_text(version) + ", compiled models need " + version_text(kLeast) + "; update it to 580 or newer";
  if (!d.missing.empty()) return d;
  if (Result code = d.init(0); code != kSuccess) {
    const char* why = nullptr;
    d.error_string(code, &why);
    d.missing = std::string("the NVIDIA driver does not start: ") + (why ? why : "unknown error");
  }
  return d;
}

}  // namespace

void Driver::complain(Result code, const char* doing) const {
  const char* why = nullptr;
  if (error_string) error_string(code, &why);
  fail(doing, ": ", why ? why : "unknown error", " (CUDA error ", code, ")");
}

const Driver& try_driver() {
  static const Driver functions = open_driver();
  return functions;
}

const Driver& driver() {
  const Driver& d = try_driver();
  if (!d.missing.empty()) fail(d.missing);
  return d;
}

Gpu::Gpu(int index) : index_(index) {
  const Driver& d = driver();
  d.check(d.device_get(&device_, index), "cannot find the GPU");
  d.check(d.device_total(&total_, device_), "cannot ask the GPU for its memory");
  d.check(d.context_retain(&context_, device_), "cannot start work on the GPU");
}

Gpu::~Gpu() { driver().context_release(device_); }

namespace {

// Who waits to be alone holds the turnstile, so that others cannot keep it waiting by overlapping.
std::mutex turnstile;
std::shared_mutex changes;
thread_local int holds = 0;  // of this thread, one in the other

}  // namespace

Among::Among() {
  if (holds++) return;
  turnstile.lock();
  turnstile.unlock();
  changes.lock_shared();
}

Among::~Among() {
  if (!--holds) changes.unlock_shared();
}

Alone::Alone() {
  if (holds) fail("internal error: a capture begins inside of a change of the context");
  turnstile.lock();
  changes.lock();
  ++holds;
}

Alone::~Alone() {
  --holds;
  changes.unlock();
  turnstile.unlock();
}

}  // namespace kiln::cuda
