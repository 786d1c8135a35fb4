#include "compiled/shims.h"

#include <algorithm>
#include <cstring>

#include "cpu/ops.h"
#include "cpu/packed.h"
#include "kiln/error.h"

namespace kiln {

namespace {

thread_local std::string model_error;
thread_local Surroundings* surroundings = nullptr;

Tensor strided(int64_t dims, const int64_t* sizes, const int64_t* strides, Scalar scalar, Device device, int64_t offset) {
  if (dims < 0 || dims > Tensor::kMaxDims) fail("a tensor has ", dims, " dimensions, this runner knows ", Tensor::kMaxDims);
  Tensor t;
  t.scalar = scalar;
  t.device = device;
  t.dims = static_cast<int>(dims);
  t.offset = offset;
  std::copy_n(sizes, dims, t.sizes.begin());
  std::copy_n(strides, dims, t.strides.begin());
  return t;
}

// From the first element to the one behind the last.
uint64_t span_bytes(const Tensor& t) {
  int64_t elements = 1;
  for (int i = 0; i < t.dims; ++i) {
    if (t.sizes[i] == 0) return 0;
    elements += (t.sizes[i] - 1) * t.strides[i];
  }
  return static_cast<uint64_t>(elements) * scalar_bytes(t.scalar);
}

Device device_of(int32_t type, int32_t index) { return {type != 0, type != 0 ? std::max(index, 0) : 0}; }

// ---- tensors; the signatures are torch's (torch/csrc/inductor/aoti_torch/c/shim.h) ----

int32_t aoti_torch__reinterpret_tensor(Tensor* self, int64_t dims, const int64_t* sizes, const int64_t* strides, int64_t offset, Tensor** out) {
  return shim([&] {
    Tensor view = strided(dims, sizes, strides, self->scalar, self->device, offset);
    view.storage = self->storage;
    if (view.storage->memory && static_cast<uint64_t>(offset) * scalar_bytes(view.scalar) + span_bytes(view) > view.storage->bytes)
      fail("a view ends behind the ", view.storage->bytes, " bytes of its tensor");
    *out = new Tensor(std::move(view));
  });
}

int32_t aoti_torch_create_tensor_from_blob(void* data, int64_t dims, const int64_t* sizes, const int64_t* strides, int64_t offset, int32_t dtype,
                                           int32_t device_type, int32_t device_index, Tensor** out) {
  return shim([&] {
    Tensor t = strided(dims, sizes, strides, static_cast<Scalar>(dtype), device_of(device_type, device_index), offset);
    t.storage = std::make_shared<Storage>(data, static_cast<uint64_t>(offset) * scalar_bytes(t.scalar) + span_bytes(t), nullptr);
    *out = new Tensor(std::move(t));
  });
}

int32_t aoti_torch_create_tensor_from_blob_v2(void* data, int64_t dims, const int64_t* sizes, const int64_t* strides, int64_t offset, int32_t dtype,
                                              int32_t device_type, int32_t device_index, Tensor** out, int32_t, const uint8_t*, int64_t) {
  return aoti_torch_create_tensor_from_blob(data, dims, sizes, strides, offset, dtype, device_type, device_index, out);
}

int32_t aoti_torch_empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype, int32_t device_type, int32_t, Tensor** out) {
  return shim([&] {
    Surroundings& s = Running::now();
    if (device_of(device_type, 0).cuda != s.device.cuda) fail("the compiled model wants memory on another device than ", s.device.str());
    Tensor t = strided(dims, sizes, strides, static_cast<Scalar>(dtype), s.device, 0);
    uint64_t bytes = span_bytes(t);
    t.storage = std::make_shared<Storage>(s.memory->allocate(bytes), bytes, s.memory);
    *out = new Tensor(std::move(t));
  });
}

// Never asked for by our models: no constant of theirs is copied.
int32_t aoti_torch_clone(Tensor*, Tensor**) {
  return shim([] { fail("the compiled model copies a tensor, which this runner does not do"); });
}

int32_t aoti_torch_delete_tensor_object(Tensor* tensor) {
  delete tensor;
  return 0;
}

int32_t aoti_torch_new_tensor_handle(Tensor* from, Tensor** out) {
  return shim([&] {
    *out = new Tensor(*from);
    if (surroundings && surroundings->kept) surroundings->kept->push_back(*out);
  });
}

int32_t aoti_torch_get_data_ptr(Tensor* t, void** out) {
  return shim([&] { *out = t->data(); });
}
int32_t aoti_torch_get_device_index(Tensor* t, int32_t* out) { return *out = t->device.index, 0; }
int32_t aoti_torch_get_device_type(Tensor* t, int32_t* out) { return *out = t->device.cuda, 0; }
int32_t aoti_torch_get_dtype(Tensor* t, int32_t* out) { return *out = static_cast<int32_t>(t->scalar), 0; }
int32_t aoti_torch_get_numel(Tensor* t, int64_t* out) { return *out = t->numel(), 0; }
int32_t aoti_torch_get_size(Tensor* t, int64_t d, int64_t* out) { return *out = t->sizes.at(static_cast<size_t>(d < 0 ? d + t->dims : d)), 0; }
int32_t aoti_torch_get_sizes(Tensor* t, int64_t** out) { return *out = t->sizes.data(), 0; }
int32_t aoti_torch_get_storage_offset(Tensor* t, int64_t* out) { return *out = t->offset, 0; }
int32_t aoti_torch_get_storage_size(Tensor* t, int64_t* out) { return *out = static_cast<int64_t>(t->storage->bytes), 0; }
int32_t aoti_torch_get_stride(Tensor* t, int64_t d, int64_t* out) { return *out = t->strides.at(static_cast<size_t>(d < 0 ? d + t->dims : d)), 0; }
int32_t aoti_torch_get_strides(Tensor* t, int64_t** out) { return *out = t->strides.data(), 0; }

// ---- operators of the CPU ----

void expect(bool condition, const char* op, const char* what) {
  if (!condition) fail(op, ": ", what, ", which this runner does not compute");
}

MatrixView matrix(const Tensor& t, int row) { return {static_cast<const float*>(t.data()), t.strides[row], t.strides[row + 1]}; }

// The product of the last two dimensions of a and b; `batch` dimensions before them.
void product(const char* op, const Tensor& out, const Tensor& a, const Tensor& b, int batch) {
  for (const Tensor* t : {&out, &a, &b}) {
    expect(t->scalar == Scalar::F32, op, "a matrix that is not float32");
    expect(t->dims == batch + 2 && (!batch || t->sizes[0] == out.sizes[0]), op, "matrices of other shapes");
  }
  const int64_t m = a.sizes[batch], k = a.sizes[batch + 1], n = b.sizes[batch + 1];
  expect(b.sizes[batch] == k && out.sizes[batch] == m && out.sizes[batch + 1] == n, op, "matrices whose shapes do not fit");
  MatrixView left = matrix(a, batch), right = matrix(b, batch);
  auto* to = static_cast<float*>(out.data());
  int64_t rows = m, columns = n, c_row = out.strides[batch], left_batch = a.strides[0], right_batch = b.strides[0];
  if (out.strides[batch + 1] != 1 && n != 1) {  // a transposed result is the product of the transposed matrices, in other order
    expect(out.strides[batch] == 1 || m == 1, op, "a result with gaps in its rows");
    std::swap(left, right), std::swap(left_batch, right_batch);
    for (MatrixView* view : {&left, &right}) std::swap(view->row, view->column);
    rows = n, columns = m, c_row = out.strides[batch + 1];
  }
  if (batch)
    batch_matmul(to, c_row, out.strides[0], left, left_batch, right, right_batch, out.sizes[0], rows, k, columns);
  else
    matmul(to, c_row, left, right, rows, k, columns);
}

int32_t aoti_torch_cpu_mm_out(Tensor* out, Tensor* a, Tensor* b) {
  return shim([&] { product("mm", *out, *a, *b, 0); });
}
int32_t aoti_torch_cpu_bmm_out(Tensor* out, Tensor* a, Tensor* b) {
  return shim([&] { product("bmm", *out, *a, *b, 1); });
}

int32_t aoti_torch_cpu_packed_linear(Tensor* x, Tensor* words, Tensor* halves, const char* block_type, Tensor** out) {
  return shim([&] {
    const BlockType* type = kiln::block_type(block_type);
    if (!type) fail("packed_linear: weights of block type ", block_type, ", which this runner does not multiply; use a newer runner");
    const int64_t blocks = words->sizes[0], n = words->sizes[2], m = x->sizes[0], k = blocks * elements(*type);
    const bool planes = words->dims == 3 && halves->dims == 3 && words->scalar == Scalar::I32 && scalar_bytes(halves->scalar) == 2;
    expect(planes && words->sizes[1] == kiln::words(*type) && halves->sizes[1] == kiln::halves(*type), "packed_linear", "weights of another form");
    expect(halves->sizes[0] == blocks && halves->sizes[2] == n, "packed_linear", "words and halves of different matrices");
    expect(n == 1 || (words->strides[2] == 1 && halves->strides[2] == 1), "packed_linear", "weights whose columns lie apart");
    expect(x->dims == 2 && x->scalar == Scalar::F32 && x->sizes[1] == k, "packed_linear", "activations of another form");
    Tensor product = Tensor::make(Running::now().memory, x->device, Scalar::F32, {m, n});
    const PackedMatrix weight{type, static_cast<const int32_t*>(words->data()), static_cast<const uint16_t*>(halves->data()), words->strides[0],
                              words->strides[1], halves->strides[0], halves->strides[1]};
    packed_matmul(static_cast<float*>(product.data()), n, matrix(*x, 0), weight, m, k, n);
    *out = new Tensor(std::move(product));
  });
}

// A tensor like `x`, dense, and the rows of both along the last dimension.
Tensor dense_like(const Tensor& x, Scalar scalar) {
  return Tensor::make(Running::now().memory, x.device, scalar, std::vector<int64_t>(x.sizes.begin(), x.sizes.begin() + x.dims));
}

int64_t last_dimension(const char* op, const Tensor& x, int64_t dim) {
  expect(x.dims > 0 && (dim == -1 || dim == x.dims - 1) && x.dense(), op, "a dimension that is not the last of a dense tensor");
  return x.sizes[static_cast<size_t>(x.dims) - 1];
}

template <typename T>
void cumsum_of(const Tensor& x, Tensor& out, int64_t n) {
  cumsum(Rows<T>{static_cast<T*>(out.data()), n, 1}, Rows<const T>{static_cast<const T*>(x.data()), n, 1}, n ? x.numel() / n : 0, n);
}

int32_t aoti_torch_cpu_cumsum(Tensor* x, int64_t dim, int32_t* dtype, Tensor** out) {
  return shim([&] {
    int64_t n = last_dimension("cumsum", *x, dim);
    expect(!dtype || static_cast<Scalar>(*dtype) == x->scalar, "cumsum", "a sum of another dtype");
    expect(x->scalar == Scalar::F32 || x->scalar == Scalar::I64, "cumsum", "a dtype other than float32 and int64");
    Tensor sums = dense_like(*x, x->scalar);
    x->scalar == Scalar::F32 ? cumsum_of<float>(*x, sums, n) : cumsum_of<int64_t>(*x, sums, n);
    *out = new Tensor(std::move(sums));
  });
}

int32_t aoti_torch_cpu_sort_stable(Tensor* x, int32_t*, int64_t dim, int32_t descending, Tensor** out_values, Tensor** out_indices) {
  return shim([&] {
    int64_t n = last_dimension("sort", *x, dim);
    expect(x->scalar == Scalar::F32, "sort", "a dtype other than float32");
    Tensor values = dense_like(*x, Scalar::F32), indices = dense_like(*x, Scalar::I64);
    stable_sort({static_cast<float*>(values.data()), n, 1}, {static_cast<int64_t*>(indices.data()), n, 1}, {static_cast<const float*>(x->data()), n, 1},
                n ? x->numel() / n : 0, n, descending != 0);
    *out_values = new Tensor(std::move(values));
    *out_indices = new Tensor(std::move(indices));
  });
}

void kiln_model_error(const char* what) { set_model_error(what); }

struct Named {
  const char* name;
  void* function;
};

}  // namespace

Running::Running(Surroundings& now) : before_(surroundings) {
  surroundings = &now;
  model_error.clear();  // of a call whose error nobody asked for
}
Running::~Running() { surroundings = before_; }
Surroundings& Running::now() {
  if (!surroundings) fail("internal error: a compiled model runs outside of a session");
  return *surroundings;
}

std::string take_model_error() {
  std::string error = std::move(model_error);
  model_error.clear();
  return error.empty() ? "no reason given" : error;
}

void set_model_error(const char* what) {
  if (model_error.empty()) model_error = what;
}

void* find_shim(const char* name) {
#define KILN_SHIM(function) {#function, reinterpret_cast<void*>(function)},
#define KILN_CUDA_SHIM(function)
  static const Named table[] = {
#include "shims.def"
  };
  for (const Named& row : table)
    if (!std::strcmp(row.name, name)) return row.function;
  return find_cuda_shim(name);
}

}  // namespace kiln
