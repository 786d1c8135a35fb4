#include "cuda/cublaslt.h"

#include <dlfcn.h>
#include <glob.h>

#include <algorithm>
#include <cstdlib>
#include <vector>

namespace kiln {

namespace {

// Of cublasLt.h, cublas_api.h and library_types.h, whose interface is the same in versions 12 and 13.
using Status = int;
constexpr int kFloat32 = 0, kFloat16 = 2, kBfloat16 = 14;  // CUDA_R_*
constexpr int kCompute32F = 68;                            // CUBLAS_COMPUTE_32F: float32 products of float32 operands, no TF32
constexpr int kTransposeA = 3, kTransposeB = 4;            // CUBLASLT_MATMUL_DESC_TRANS*
constexpr int kMaxWorkspace = 1, kAlignmentA = 5, kAlignmentB = 6, kAlignmentC = 7, kAlignmentD = 8;  // CUBLASLT_MATMUL_PREF_*
struct Algorithm {
  uint64_t data[8];
};
struct Heuristic {
  Algorithm algorithm;
  size_t workspace;
  Status state;
  float waves;
  int reserved[4];
};

constexpr int64_t kWorkspaceBytes = 32 << 20;
constexpr size_t kMostPlans = 4096;  // kept; prompts of every length ask for their own

#define KILN_CUBLASLT_FUNCTIONS(F)                                                                                                       \
  F(create, "cublasLtCreate", (void**))                                                                                                  \
  F(destroy, "cublasLtDestroy", (void*))                                                                                                 \
  F(matmul, "cublasLtMatmul",                                                                                                            \
    (void*, void*, const void*, const void*, void*, const void*, void*, const void*, const void*, void*, void*, void*, const Algorithm*, void*, size_t, cuda::Stream)) \
  F(desc_create, "cublasLtMatmulDescCreate", (void**, int, int))                                                                         \
  F(desc_destroy, "cublasLtMatmulDescDestroy", (void*))                                                                                  \
  F(desc_set, "cublasLtMatmulDescSetAttribute", (void*, int, const void*, size_t))                                                       \
  F(layout_create, "cublasLtMatrixLayoutCreate", (void**, int, uint64_t, uint64_t, int64_t))                                             \
  F(layout_destroy, "cublasLtMatrixLayoutDestroy", (void*))                                                                              \
  F(preference_create, "cublasLtMatmulPreferenceCreate", (void**))                                                                       \
  F(preference_destroy, "cublasLtMatmulPreferenceDestroy", (void*))                                                                      \
  F(preference_set, "cublasLtMatmulPreferenceSetAttribute", (void*, int, const void*, size_t))                                           \
  F(heuristic, "cublasLtMatmulAlgoGetHeuristic", (void*, void*, void*, void*, void*, void*, void*, int, Heuristic*, int*))

struct Lt {
#define F(member, name, arguments) Status(*member) arguments = nullptr;
  KILN_CUBLASLT_FUNCTIONS(F)
#undef F
  const char* (*status_string)(Status) = nullptr;
  std::string missing;

  void check(Status code, const char* doing) const {
    if (code) fail(doing, ": ", status_string ? status_string(code) : "unknown error", " (cublasLt error ", code, ")");
  }
};

std::string folder_of(const std::string& path) { return path.substr(0, path.rfind('/')); }

// Where cublasLt may lie, in order: as told, where the system looks, beside the Python packages, in the CUDA toolkit.
std::vector<std::string> candidates() {
  std::vector<std::string> paths;
  const std::string names[] = {"libcublasLt.so.13", "libcublasLt.so.12"};
  if (const char* told = std::getenv("KILN_CUBLASLT"); told && *told) return {told};
  paths.insert(paths.end(), std::begin(names), std::end(names));
  std::vector<std::string> patterns;
  Dl_info self;
  if (dladdr(reinterpret_cast<void*>(&candidates), &self) && self.dli_fname) {
    char* real = realpath(self.dli_fname, nullptr);
    std::string here = folder_of(real ? real : self.dli_fname);
    std::free(real);
    for (const std::string& packages : {here + "/..", here + "/../.."})  // of kiln/_runtime, of kiln/bin and kiln/lib
      for (const char* inside : {"/nvidia/cu1[23]/lib/", "/nvidia/cublas/lib/"}) patterns.push_back(packages + inside);
  }
  if (const char* prefix = std::getenv("VIRTUAL_ENV"))
    for (const char* inside : {"/nvidia/cu1[23]/lib/", "/nvidia/cublas/lib/"}) patterns.push_back(std::string(prefix) + "/lib/python3*/site-packages" + inside);
  for (const char* name : {"CUDA_HOME", "CUDA_PATH"})
    if (const char* home = std::getenv(name); home && *home) patterns.push_back(std::string(home) + "/lib64/");
  for (const char* folder : {"/usr/local/cuda/lib64/", "/usr/local/cuda-1[23]*/lib64/", "/usr/local/cuda-1[23]*/targets/x86_64-linux/lib/"}) patterns.push_back(folder);
  for (const std::string& pattern : patterns)
    for (const std::string& name : names) {
      glob_t found;
      if (glob((pattern + name).c_str(), 0, nullptr, &found) == 0) paths.insert(paths.end(), found.gl_pathv, found.gl_pathv + found.gl_pathc);
      globfree(&found);
    }
  return paths;
}

Lt open_lt() {
  Lt lt;
  std::string first_error;
  for (const std::string& path : candidates()) {
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!library) {
      if (const char* why = dlerror(); first_error.empty() && why) first_error = why;
      continue;
    }
    bool all = true;
#define F(member, name, arguments) \
  lt.member = reinterpret_cast<decltype(lt.member)>(dlsym(library, name)); \
  all = all && lt.member;
    KILN_CUBLASLT_FUNCTIONS(F)
#undef F
    lt.status_string = reinterpret_cast<decltype(lt.status_string)>(dlsym(library, "cublasLtGetStatusString"));
    if (all) return lt;
    dlclose(library);
  }
  lt.missing = "cublasLt, which multiplies the matrices of a prompt, was not found (" + first_error +
               "); pip install nvidia-cublas, or name the file libcublasLt.so.13 in KILN_CUBLASLT";
  return lt;
}

const Lt& lt() {
  static const Lt functions = open_lt();
  if (!functions.missing.empty()) fail(functions.missing);
  return functions;
}

// An object of cublasLt's that goes with its owner.
struct Owned {
  explicit Owned(Status (*destroy)(void*)) : destroy(destroy) {}
  ~Owned() {
    if (object) destroy(object);
  }
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  Status (*destroy)(void*);
  void* object = nullptr;
};

int type_of(Scalar scalar) {
  switch (scalar) {
    case Scalar::F32: return kFloat32;
    case Scalar::F16: return kFloat16;
    case Scalar::BF16: return kBfloat16;
    default: fail("mm: a matrix of ", scalar_name(scalar), ", which this runner does not multiply on a GPU");
  }
}

}  // namespace

struct CublasLt::Plan {
  Owned desc{lt().desc_destroy}, left{lt().layout_destroy}, right{lt().layout_destroy}, out{lt().layout_destroy};
  Heuristic best{};
};

CublasLt::CublasLt(const cuda::Gpu& gpu, std::shared_ptr<Memory> memory) {
  lt().check(lt().create(&handle_), "cannot start cublasLt");
  try {
    workspace_ = Tensor::make(std::move(memory), {true, gpu.index()}, Scalar::U8, {kWorkspaceBytes});
  } catch (...) {
    lt().destroy(handle_);
    throw;
  }
}

CublasLt::~CublasLt() {
  cuda::Among others;
  plans_.clear();
  lt().destroy(handle_);
}

CublasLt::Matrix CublasLt::as_columns(const Tensor& t) {
  if (t.dims != 2) fail("mm: a tensor of ", t.dims, " dimensions");
  Matrix m{type_of(t.scalar), 0, 0, 0, false, 0};
  // A row-major matrix is its transpose, column-major. A dimension of one element may have any stride.
  if (t.strides[1] == 1 || t.sizes[1] == 1) {
    m.rows = static_cast<uint64_t>(t.sizes[1]), m.columns = static_cast<uint64_t>(t.sizes[0]);
    m.leading = t.sizes[0] == 1 ? t.sizes[1] : t.strides[0];
  }
  if (!(t.strides[1] == 1 || t.sizes[1] == 1) || m.leading < t.sizes[1]) {
    if (t.strides[0] != 1 && t.sizes[0] != 1) fail("mm: a matrix with gaps in its rows and in its columns, which this runner does not multiply on a GPU");
    m.rows = static_cast<uint64_t>(t.sizes[0]), m.columns = static_cast<uint64_t>(t.sizes[1]);
    m.leading = t.sizes[1] == 1 ? t.sizes[0] : t.strides[1];
    m.transposed = true;
  }
  if (m.leading < static_cast<int64_t>(m.rows)) fail("mm: a matrix whose rows overlap");
  uint64_t at = cuda::address(t.data());
  m.alignment = static_cast<uint32_t>(std::min<uint64_t>(at & -at, 256));
  return m;
}

const CublasLt::Plan& CublasLt::plan(const Matrix& left, const Matrix& right, const Matrix& out) {
  auto key = std::make_tuple(left, right, out);
  if (auto it = plans_.find(key); it != plans_.end()) return *it->second;
  if (plans_.size() >= kMostPlans) plans_.clear();
  const Lt& f = lt();
  auto p = std::make_unique<Plan>();
  f.check(f.desc_create(&p->desc.object, kCompute32F, kFloat32), "mm");
  const int transposes[2] = {left.transposed, right.transposed};
  f.check(f.desc_set(p->desc.object, kTransposeA, &transposes[0], sizeof(int)), "mm");
  f.check(f.desc_set(p->desc.object, kTransposeB, &transposes[1], sizeof(int)), "mm");
  f.check(f.layout_create(&p->left.object, left.type, left.rows, left.columns, left.leading), "mm");
  f.check(f.layout_create(&p->right.object, right.type, right.rows, right.columns, right.leading), "mm");
  f.check(f.layout_create(&p->out.object, out.type, out.rows, out.columns, out.leading), "mm");
  Owned preference{f.preference_destroy};
  f.check(f.preference_create(&preference.object), "mm");
  const uint64_t workspace = kWorkspaceBytes;
  f.check(f.preference_set(preference.object, kMaxWorkspace, &workspace, sizeof workspace), "mm");
  for (auto [attribute, value] : {std::pair(kAlignmentA, left.alignment), std::pair(kAlignmentB, right.alignment), std::pair(kAlignmentC, out.alignment),
                                  std::pair(kAlignmentD, out.alignment)})
    f.check(f.preference_set(preference.object, attribute, &value, sizeof value), "mm");
  int count = 0;
  Status code = f.heuristic(handle_, p->desc.object, p->left.object, p->right.object, p->out.object, p->out.object, preference.object, 1, &p->best, &count);
  f.check(code, "mm: cublasLt has no way to multiply these shapes");
  if (!count) fail("mm: cublasLt has no way to multiply these shapes");
  return *plans_.emplace(key, std::move(p)).first->second;
}

void CublasLt::matmul(const Tensor& out, const Tensor& a, const Tensor& b, cuda::Stream stream) {
  if (out.dims != 2 || a.dims != 2 || b.dims != 2 || a.scalar != b.scalar || out.scalar != a.scalar || a.sizes[1] != b.sizes[0] ||
      out.sizes[0] != a.sizes[0] || out.sizes[1] != b.sizes[1])
    fail("mm: matrices whose shapes or dtypes do not fit");
  if (!out.numel()) return;
  Matrix left = as_columns(b), right = as_columns(a), to = as_columns(out);  // out^T = b^T x a^T
  const void *first = b.data(), *second = a.data();
  if (to.transposed) {  // out is column-major itself: out = a x b, each transposed once more
    std::swap(left, right), std::swap(first, second);
    left.transposed = !left.transposed, right.transposed = !right.transposed;
    to.transposed = false;
  }
  const Plan& p = plan(left, right, to);
  const float one = 1, zero = 0;
  lt().check(lt().matmul(handle_, p.desc.object, &one, first, p.left.object, second, p.right.object, &zero, out.data(), p.out.object, out.data(), p.out.object,
                         &p.best.algorithm, workspace_.data(), kWorkspaceBytes, stream),
             "mm");
}

}  // namespace kiln
