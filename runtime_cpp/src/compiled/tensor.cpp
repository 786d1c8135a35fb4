#include "compiled/tensor.h"

#include <algorithm>

#include "kiln/error.h"

namespace kiln {

namespace {

struct ScalarRow {
  Scalar scalar;
  const char* name;
  uint64_t bytes;
};
constexpr ScalarRow kScalars[] = {{Scalar::U8, "uint8", 1},     {Scalar::I8, "int8", 1},       {Scalar::I16, "int16", 2}, {Scalar::I32, "int32", 4},
                                  {Scalar::I64, "int64", 8},    {Scalar::F16, "float16", 2},   {Scalar::F32, "float32", 4}, {Scalar::F64, "float64", 8},
                                  {Scalar::Bool, "bool", 1},    {Scalar::BF16, "bfloat16", 2}};

const ScalarRow& row(Scalar scalar) {
  for (const ScalarRow& r : kScalars)
    if (r.scalar == scalar) return r;
  fail("the compiled model uses the dtype with code ", static_cast<int>(scalar), ", which this runner does not know");
}

}  // namespace

const char* scalar_name(Scalar scalar) { return row(scalar).name; }
uint64_t scalar_bytes(Scalar scalar) { return row(scalar).bytes; }

Scalar scalar_of(DType dtype) {
  switch (dtype) {
    case DType::U8: return Scalar::U8;
    case DType::I16: return Scalar::I16;
    case DType::I32: return Scalar::I32;
    case DType::I64: return Scalar::I64;
    case DType::F16: return Scalar::F16;
    case DType::BF16: return Scalar::BF16;
    case DType::F32: return Scalar::F32;
  }
  fail("internal error: dtype");
}

Scalar scalar_named(std::string_view name) {
  for (const ScalarRow& r : kScalars)
    if (r.name == name) return r.scalar;
  fail("the compiled model uses the dtype '", name, "', which this runner does not know");
}

void Tensor::set_shape(const std::vector<int64_t>& shape) {
  if (shape.size() > kMaxDims) fail("a tensor has ", shape.size(), " dimensions, this runner knows ", kMaxDims);
  dims = static_cast<int>(shape.size());
  int64_t stride = 1;
  for (int i = dims - 1; i >= 0; --i) {
    sizes[i] = shape[i];
    strides[i] = stride;
    stride *= std::max<int64_t>(shape[i], 1);
  }
}

int64_t Tensor::numel() const {
  int64_t n = 1;
  for (int i = 0; i < dims; ++i) n *= sizes[i];
  return n;
}

bool Tensor::dense() const {
  int64_t stride = 1;
  for (int i = dims - 1; i >= 0; --i) {
    if (sizes[i] != 1 && strides[i] != stride) return false;
    stride *= std::max<int64_t>(sizes[i], 1);
  }
  return true;
}

Tensor Tensor::make(std::shared_ptr<Memory> memory, Device device, Scalar scalar, const std::vector<int64_t>& shape) {
  Tensor t;
  t.scalar = scalar;
  t.device = device;
  t.set_shape(shape);
  uint64_t bytes = t.bytes();
  void* data = memory->allocate(bytes);
  t.storage = std::make_shared<Storage>(data, bytes, std::move(memory));
  return t;
}

Tensor Tensor::over(void* data, Device device, Scalar scalar, const std::vector<int64_t>& shape) {
  Tensor t;
  t.scalar = scalar;
  t.device = device;
  t.set_shape(shape);
  t.storage = std::make_shared<Storage>(data, t.bytes(), nullptr);
  return t;
}

}  // namespace kiln
