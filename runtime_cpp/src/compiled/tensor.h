#pragma once
#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "kiln/artifact.h"

namespace kiln {

// Codes of dtypes and devices as compiled models write them, which are torch's.
enum class Scalar : int32_t { U8 = 0, I8 = 1, I16 = 2, I32 = 3, I64 = 4, F16 = 5, F32 = 6, F64 = 7, Bool = 11, BF16 = 15 };
const char* scalar_name(Scalar scalar);      // "bfloat16"
uint64_t scalar_bytes(Scalar scalar);        // Error for a code that is not in the list
Scalar scalar_of(DType dtype);
Scalar scalar_named(std::string_view name);  // Error for another name

struct Device {
  bool cuda = false;
  int index = 0;
  std::string str() const { return cuda ? "cuda:" + std::to_string(index) : "cpu"; }
};

// Where tensors' bytes come from. Not thread-safe: one session's, or one load's.
class Memory {
 public:
  virtual ~Memory() = default;
  virtual void* allocate(uint64_t bytes) = 0;  // aligned to 64 bytes or more; Error when there is no more
  virtual void release(void* data, uint64_t bytes) noexcept = 0;
};

// Bytes that go back when the last tensor over them does. `memory` null: they belong to somebody else.
struct Storage {
  Storage(void* d, uint64_t n, std::shared_ptr<Memory> m) : data(d), bytes(n), memory(std::move(m)) {}
  ~Storage() {
    if (memory) memory->release(data, bytes);
  }
  Storage(const Storage&) = delete;
  Storage& operator=(const Storage&) = delete;
  void* data;
  uint64_t bytes;
  std::shared_ptr<Memory> memory;
};

// A strided view of a storage. Copies share it. Handles of compiled models are pointers to one of these.
struct Tensor {
  static constexpr int kMaxDims = 8;

  // Dense, over `memory`'s bytes.
  static Tensor make(std::shared_ptr<Memory> memory, Device device, Scalar scalar, const std::vector<int64_t>& shape);
  // Dense, over `data`, which stays its owner's.
  static Tensor over(void* data, Device device, Scalar scalar, const std::vector<int64_t>& shape);

  bool defined() const { return storage != nullptr; }
  void reset() { *this = Tensor(); }
  void* data() const { return static_cast<char*>(storage->data) + static_cast<uint64_t>(offset) * scalar_bytes(scalar); }
  int64_t numel() const;
  uint64_t bytes() const { return static_cast<uint64_t>(numel()) * scalar_bytes(scalar); }  // of a dense tensor
  bool dense() const;
  void set_shape(const std::vector<int64_t>& shape);  // and the strides of a dense tensor

  std::shared_ptr<Storage> storage;
  Scalar scalar = Scalar::U8;
  Device device;
  int dims = 0;
  int64_t offset = 0;  // in elements
  std::array<int64_t, kMaxDims> sizes{}, strides{};
};

}  // namespace kiln
