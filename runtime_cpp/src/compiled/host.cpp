#include "compiled/host.h"

#include <cpuid.h>
#include <dlfcn.h>
#include <gnu/libc-version.h>

#include <charconv>
#include <utility>

#include "kiln/error.h"

namespace kiln {

namespace {

using Version = std::pair<int, int>;

// "2.34" and what follows it.
Version version_at(std::string_view text) {
  Version v{0, 0};
  const char* end = text.data() + text.size();
  auto major = std::from_chars(text.data(), end, v.first);
  if (major.ec == std::errc() && major.ptr < end && *major.ptr == '.') std::from_chars(major.ptr + 1, end, v.second);
  return v;
}

std::string text_of(Version v) { return std::to_string(v.first) + "." + std::to_string(v.second); }

// What the operating system keeps of a thread's registers.
uint64_t read_xcr0() {
  uint32_t low = 0, high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}

}  // namespace

std::string missing_features(const AskCpu& ask, uint64_t xcr0) {
  const CpuId one = ask(1, 0), seven = ask(7, 0), extended = ask(0x80000001, 0);
  constexpr uint64_t kAvxState = 6;  // the XMM and YMM registers
  const std::pair<const char*, bool> features[] = {
      {"SSE4.2", one.ecx >> 20 & 1},
      {"POPCNT", one.ecx >> 23 & 1},
      {"MOVBE", one.ecx >> 22 & 1},
      {"FMA", one.ecx >> 12 & 1},
      {"F16C", one.ecx >> 29 & 1},
      {"AVX", (one.ecx >> 28 & 1) && (one.ecx >> 27 & 1) && (xcr0 & kAvxState) == kAvxState},
      {"AVX2", seven.ebx >> 5 & 1},
      {"BMI1", seven.ebx >> 3 & 1},
      {"BMI2", seven.ebx >> 8 & 1},
      {"LZCNT", extended.ecx >> 5 & 1},
  };
  std::string missing;
  for (const auto& [name, there] : features)
    if (!there) missing += (missing.empty() ? "" : ", ") + std::string(name);
  return missing;
}

void check_cpu() {
  auto ask = [](uint32_t leaf, uint32_t subleaf) {
    CpuId r;
    __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
    return r;
  };
  const bool keeps_state = ask(1, 0).ecx >> 27 & 1;
  std::string missing = missing_features(ask, keeps_state ? read_xcr0() : 0);
  if (!missing.empty()) fail("this CPU cannot run compiled models: they are made for x86-64-v3 (Haswell, Zen and newer), and it has no ", missing);
}

void check_glibc(std::string_view library, const std::string& where, const std::string& has) {
  constexpr std::string_view kPrefix = "GLIBC_";
  Version newest{0, 0};
  for (size_t at = library.find(kPrefix); at != std::string_view::npos; at = library.find(kPrefix, at + 1)) {
    Version wanted = version_at(library.substr(at + kPrefix.size(), 16));
    if (wanted > newest && wanted.first < 10) newest = wanted;
  }
  if (newest > version_at(has))
    fail(where, ": was compiled where glibc was newer: it needs glibc ", text_of(newest), ", this machine has ", has, "; export on a machine like this one");
}

void check_glibc(std::string_view library, const std::string& where) { check_glibc(library, where, gnu_get_libc_version()); }

void share_libstdcxx() { dlopen("libstdc++.so.6", RTLD_NOW | RTLD_NOLOAD | RTLD_GLOBAL); }

}  // namespace kiln
