#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>

namespace kiln {

// What this machine must be before compiled code is loaded: each throws Error in one line that says what is missing.

// Registers of the cpuid instruction.
struct CpuId {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};
using AskCpu = std::function<CpuId(uint32_t leaf, uint32_t subleaf)>;
// Features of x86-64-v3 that a CPU and its operating system (`xcr0`) lack: "AVX2, FMA", or "".
std::string missing_features(const AskCpu& ask, uint64_t xcr0);
void check_cpu();

// The newest glibc whose symbols a library asks for ("GLIBC_2.34"), against the process's own, `has` ("2.36").
void check_glibc(std::string_view library, const std::string& where, const std::string& has);
void check_glibc(std::string_view library, const std::string& where);

// A host compiler may link libstdc++ statically into compiled models; its locales fail unless the process's own library comes first.
void share_libstdcxx();

}  // namespace kiln
