#pragma once
#include <cstdint>
#include <string>

namespace kiln {

// SHA-256 of `size` bytes, as 64 lower-case hex digits.
std::string sha256(const void* data, uint64_t size);

}  // namespace kiln
