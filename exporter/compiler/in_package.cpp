// Linked into every package beside the compiled model: what the model's code asks for by name and is the same for every runner. Functions
// with state or memory behind them are jumps into the runner instead, see package.py. Nothing here is visible outside of the package.
#include <immintrin.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

// ---- torch's codes of dtypes, devices and layouts ----

#define CODE(name, value) \
  int32_t aoti_torch_##name() { return value; }
extern "C" {
CODE(dtype_uint8, 0)
CODE(dtype_int8, 1)
CODE(dtype_int16, 2)
CODE(dtype_int32, 3)
CODE(dtype_int64, 4)
CODE(dtype_float16, 5)
CODE(dtype_float32, 6)
CODE(dtype_float64, 7)
CODE(dtype_bool, 11)
CODE(dtype_bfloat16, 15)
CODE(device_type_cpu, 0)
CODE(device_type_cuda, 1)
CODE(layout_strided, 0)

// ---- no gradients ----

bool aoti_torch_grad_mode_is_enabled() { return false; }
void aoti_torch_grad_mode_set_enabled(bool) {}

void aoti_torch_check(bool condition, const char*, const char*, uint32_t, const char* message) {
  if (!condition) throw std::runtime_error(message);
}

// ---- what is done about inputs that are not aligned to 16 bytes, which a runner's always are: refused ----

int32_t aoti_torch_clone_preserve_strides(void*, void**) { throw std::runtime_error("an input is not aligned to 16 bytes"); }
void aoti_torch_warn(const char*, const char*, uint32_t, const char*) {}

// ---- the runner selects device and stream before it calls ----

int32_t aoti_torch_create_cuda_guard(int32_t, void** guard) { return *guard = nullptr, 0; }
int32_t aoti_torch_delete_cuda_guard(void*) { return 0; }
int32_t aoti_torch_cuda_guard_set_index(void*, int32_t) { return 0; }
int32_t aoti_torch_create_cuda_stream_guard(void*, int32_t, void** guard) { return *guard = nullptr, 0; }
int32_t aoti_torch_delete_cuda_stream_guard(void*) { return 0; }

// ---- what a container names, and no model of ours calls: constants are the runner's, calls are waited for on its stream ----

constexpr int kNotSupported = 801;  // cudaErrorNotSupported
int32_t aoti_torch_cuda_caching_allocator_raw_alloc(uint64_t, void**) { return 1; }
int32_t aoti_torch_cuda_caching_allocator_raw_delete(void*) { return 1; }
int cudaGetDevice(int*) { return kNotSupported; }
int cudaSetDevice(int) { return 0; }
int cudaMalloc(void**, size_t) { return kNotSupported; }
int cudaFree(void*) { return kNotSupported; }
int cudaMemcpy(void*, const void*, size_t, int) { return kNotSupported; }
int cudaEventCreate(void** event) { return *event = nullptr, 0; }
int cudaEventDestroy(void*) { return 0; }
int cudaEventRecord(void*, void*) { return 0; }
int cudaEventQuery(void*) { return kNotSupported; }
int cudaEventSynchronize(void*) { return kNotSupported; }
int cudaGetLastError() { return 0; }
const char* cudaGetErrorString(int code) { return code == kNotSupported ? "not supported in a package" : "unknown error"; }
}

// ---- elementary functions of 8 floats, under Sleef's names: in double precision, then rounded, so within 0.51 units in the last place ----

namespace {

using F = __m256;
using D = __m256d;

D all(double x) { return _mm256_set1_pd(x); }

// c[0] + x (c[1] + x (c[2] + ...))
template <size_t N>
D polynomial(D x, const double (&c)[N]) {
  D sum = all(c[N - 1]);
  for (size_t i = N - 1; i-- > 0;) sum = _mm256_fmadd_pd(sum, x, all(c[i]));
  return sum;
}

constexpr double kRound = 6755399441055744.0;  // 1.5 x 2^52: added, it leaves the nearest integer in the low bits

D exp_d(D x) {
  x = _mm256_min_pd(all(700), _mm256_max_pd(all(-700), x));  // second operands win: NaN stays
  D shifted = _mm256_fmadd_pd(x, all(1.4426950408889634), all(kRound)), n = _mm256_sub_pd(shifted, all(kRound));
  D r = _mm256_fnmadd_pd(n, all(1.9082149292705877e-10), _mm256_fnmadd_pd(n, all(6.93147180369123816490e-01), x));
  constexpr double c[] = {1, 1, 1 / 2., 1 / 6., 1 / 24., 1 / 120., 1 / 720., 1 / 5040., 1 / 40320., 1 / 362880.};
  __m256i scale = _mm256_add_epi64(_mm256_slli_epi64(_mm256_castpd_si256(shifted), 52), _mm256_castpd_si256(all(1)));
  return _mm256_mul_pd(polynomial(r, c), _mm256_castsi256_pd(scale));
}

D tanh_d(D x) {
  D sign = _mm256_and_pd(x, all(-0.0)), magnitude = _mm256_andnot_pd(all(-0.0), x), square = _mm256_mul_pd(x, x);
  D large = _mm256_sub_pd(all(1), _mm256_div_pd(all(2), _mm256_add_pd(exp_d(_mm256_add_pd(magnitude, magnitude)), all(1))));
  constexpr double c[] = {1, -1 / 3., 2 / 15., -17 / 315., 62 / 2835.};
  D small = _mm256_mul_pd(magnitude, polynomial(square, c));
  return _mm256_or_pd(_mm256_blendv_pd(large, small, _mm256_cmp_pd(magnitude, all(0.0625), _CMP_LT_OQ)), sign);
}

// Of normal positive numbers.
D log_d(D x) {
  __m256i bits = _mm256_castpd_si256(x), below = _mm256_set1_epi64x(0x3FE6A09E667F3BCD);  // sqrt(1/2)
  __m256i shifted = _mm256_sub_epi64(bits, below), exponent = _mm256_srli_epi64(_mm256_add_epi64(shifted, _mm256_set1_epi64x(1024LL << 52)), 52);
  D m = _mm256_castsi256_pd(_mm256_add_epi64(_mm256_and_si256(shifted, _mm256_set1_epi64x(0xFFFFFFFFFFFFF)), below));  // sqrt(1/2) .. sqrt(2)
  D e = _mm256_sub_pd(_mm256_castsi256_pd(_mm256_or_si256(exponent, _mm256_castpd_si256(all(4503599627370496.0)))), all(4503599627370496.0 + 1024));
  D s = _mm256_div_pd(_mm256_sub_pd(m, all(1)), _mm256_add_pd(m, all(1)));
  constexpr double c[] = {2, 2 / 3., 2 / 5., 2 / 7., 2 / 9., 2 / 11., 2 / 13., 2 / 15.};
  return _mm256_fmadd_pd(e, all(0.69314718055994531), _mm256_mul_pd(s, polynomial(_mm256_mul_pd(s, s), c)));
}

constexpr float kMostReduced = 1e6f;  // of an angle, in radians

// sin(x + quarters * pi/2)
D sin_d(D x, int quarters) {
  D shifted = _mm256_fmadd_pd(x, all(0.63661977236758134), all(kRound)), n = _mm256_sub_pd(shifted, all(kRound));
  D r = _mm256_fnmadd_pd(n, all(6.07710050650619224932e-11), _mm256_fnmadd_pd(n, all(1.57079632673412561417), x)), square = _mm256_mul_pd(r, r);
  __m256i quadrant = _mm256_add_epi64(_mm256_castpd_si256(shifted), _mm256_set1_epi64x(quarters));
  constexpr double s[] = {1, -1 / 6., 1 / 120., -1 / 5040., 1 / 362880., -1 / 39916800.};
  constexpr double c[] = {1, -1 / 2., 1 / 24., -1 / 720., 1 / 40320., -1 / 3628800., 1 / 479001600.};
  D odd = _mm256_castsi256_pd(_mm256_slli_epi64(quadrant, 63)), sign = _mm256_castsi256_pd(_mm256_slli_epi64(_mm256_srli_epi64(quadrant, 1), 63));
  return _mm256_xor_pd(_mm256_blendv_pd(_mm256_mul_pd(r, polynomial(square, s)), polynomial(square, c), odd), sign);
}

template <typename Function>
F in_double(F x, Function f) {
  __m128 low = _mm256_cvtpd_ps(f(_mm256_cvtps_pd(_mm256_castps256_ps128(x)))), high = _mm256_cvtpd_ps(f(_mm256_cvtps_pd(_mm256_extractf128_ps(x, 1))));
  return _mm256_set_m128(high, low);
}

template <typename Function>
F each(F x, Function f) {
  alignas(32) float v[8];
  _mm256_store_ps(v, x);
  for (float& e : v) e = f(e);
  return _mm256_load_ps(v);
}

template <typename Function>
F each(F x, F y, Function f) {
  alignas(32) float v[8], w[8];
  _mm256_store_ps(v, x), _mm256_store_ps(w, y);
  for (int i = 0; i < 8; ++i) v[i] = f(v[i], w[i]);
  return _mm256_load_ps(v);
}

template <typename Function>
D each(D x, Function f) {
  alignas(32) double v[4];
  _mm256_store_pd(v, x);
  for (double& e : v) e = f(e);
  return _mm256_load_pd(v);
}

bool every(F mask) { return _mm256_movemask_ps(mask) == 0xFF; }
bool positive(F x) {  // and normal: 0 < x < infinity
  return every(_mm256_and_ps(_mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_GT_OQ), _mm256_cmp_ps(x, _mm256_set1_ps(INFINITY), _CMP_LT_OQ)));
}
bool reducible(F x) { return every(_mm256_cmp_ps(_mm256_andnot_ps(_mm256_set1_ps(-0.f), x), _mm256_set1_ps(kMostReduced), _CMP_LT_OQ)); }

}  // namespace

#define EACH(name, function) \
  F Sleef_##name(F x) { return each(x, [](float v) { return function(v); }); }
#define EACH_DOUBLE(name, function) \
  D Sleef_##name(D x) { return each(x, [](double v) { return function(v); }); }
extern "C" {
F Sleef_expf8_u10(F x) { return in_double(x, exp_d); }
F Sleef_tanhf8_u10(F x) { return in_double(x, tanh_d); }
F Sleef_logf8_u10(F x) { return positive(x) ? in_double(x, log_d) : each(x, [](float v) { return std::log(v); }); }
F Sleef_sinf8_u35(F x) { return reducible(x) ? in_double(x, [](D v) { return sin_d(v, 0); }) : each(x, [](float v) { return std::sin(v); }); }
F Sleef_cosf8_u35(F x) { return reducible(x) ? in_double(x, [](D v) { return sin_d(v, 1); }) : each(x, [](float v) { return std::cos(v); }); }
F Sleef_powf8_u10(F x, F y) {
  F finite = _mm256_cmp_ps(_mm256_andnot_ps(_mm256_set1_ps(-0.f), y), _mm256_set1_ps(1e6f), _CMP_LT_OQ);
  if (!positive(x) || !every(finite)) return each(x, y, [](float a, float b) { return std::pow(a, b); });
  D low = _mm256_mul_pd(log_d(_mm256_cvtps_pd(_mm256_castps256_ps128(x))), _mm256_cvtps_pd(_mm256_castps256_ps128(y)));
  D high = _mm256_mul_pd(log_d(_mm256_cvtps_pd(_mm256_extractf128_ps(x, 1))), _mm256_cvtps_pd(_mm256_extractf128_ps(y, 1)));
  return _mm256_set_m128(_mm256_cvtpd_ps(exp_d(high)), _mm256_cvtpd_ps(exp_d(low)));
}
EACH(exp2f8_u10, std::exp2)
EACH(expm1f8_u10, std::expm1)
EACH(log2f8_u10, std::log2)
EACH(log10f8_u10, std::log10)
EACH(log1pf8_u10, std::log1p)
EACH(tanf8_u10, std::tan)
EACH(sinhf8_u10, std::sinh)
EACH(coshf8_u10, std::cosh)
EACH(erff8_u10, std::erf)
EACH(erfcf8_u15, std::erfc)
F Sleef_fmodf8(F x, F y) {
  return each(x, y, [](float a, float b) { return std::fmod(a, b); });
}
EACH_DOUBLE(expd4_u10, std::exp)
EACH_DOUBLE(exp2d4_u10, std::exp2)
EACH_DOUBLE(logd4_u10, std::log)
EACH_DOUBLE(sind4_u10, std::sin)
EACH_DOUBLE(cosd4_u10, std::cos)
EACH_DOUBLE(tanhd4_u10, std::tanh)
EACH_DOUBLE(erfd4_u10, std::erf)
}
