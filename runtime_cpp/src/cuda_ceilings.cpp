#include "cuda_ceilings.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <functional>
#include <random>

#include "cublaslt.h"
#include "cuda_memory.h"

namespace kiln {

using namespace cuda;

namespace {

constexpr uint64_t kCopyBytes = 4'000'000'000, kPatternBytes = 64 << 20;
constexpr int64_t kMatmul = 8192;
constexpr unsigned kBlocks = 4096, kThreads = 256;

// sum_of(float4* data, uint64 count, float* out): a thread adds up every (blocks x threads)-th element and writes its sum where it is NaN, so
// that no read can be left out and nothing else is written. Compiled by the driver.
constexpr const char* kReadCode = R"(
.version 7.0
.target sm_70
.address_size 64
.visible .entry sum_of(.param .u64 data, .param .u64 count, .param .u64 out)
{
  .reg .pred %p<3>;
  .reg .u32 %r<6>;
  .reg .u64 %rd<10>;
  .reg .f32 %f<24>;
  ld.param.u64 %rd1, [data];
  cvta.to.global.u64 %rd1, %rd1;
  ld.param.u64 %rd2, [count];
  mov.u32 %r1, %ctaid.x;
  mov.u32 %r2, %ntid.x;
  mov.u32 %r3, %tid.x;
  mov.u32 %r4, %nctaid.x;
  mad.lo.u32 %r5, %r1, %r2, %r3;
  cvt.u64.u32 %rd3, %r5;
  mul.wide.u32 %rd4, %r2, %r4;
  shl.b64 %rd5, %rd4, 4;
  shl.b64 %rd6, %rd3, 4;
  add.u64 %rd6, %rd1, %rd6;
  shl.b64 %rd9, %rd4, 2;
  mov.f32 %f1, 0f00000000;
  mov.f32 %f2, 0f00000000;
  mov.f32 %f3, 0f00000000;
  mov.f32 %f4, 0f00000000;
LOOP:
  add.u64 %rd7, %rd3, %rd9;
  setp.gt.u64 %p1, %rd7, %rd2;
  @%p1 bra DONE;
  ld.global.v4.f32 {%f5, %f6, %f7, %f8}, [%rd6];
  add.u64 %rd6, %rd6, %rd5;
  ld.global.v4.f32 {%f9, %f10, %f11, %f12}, [%rd6];
  add.u64 %rd6, %rd6, %rd5;
  ld.global.v4.f32 {%f13, %f14, %f15, %f16}, [%rd6];
  add.u64 %rd6, %rd6, %rd5;
  ld.global.v4.f32 {%f17, %f18, %f19, %f20}, [%rd6];
  add.u64 %rd6, %rd6, %rd5;
  add.f32 %f1, %f1, %f5;
  add.f32 %f2, %f2, %f6;
  add.f32 %f3, %f3, %f7;
  add.f32 %f4, %f4, %f8;
  add.f32 %f1, %f1, %f9;
  add.f32 %f2, %f2, %f10;
  add.f32 %f3, %f3, %f11;
  add.f32 %f4, %f4, %f12;
  add.f32 %f1, %f1, %f13;
  add.f32 %f2, %f2, %f14;
  add.f32 %f3, %f3, %f15;
  add.f32 %f4, %f4, %f16;
  add.f32 %f1, %f1, %f17;
  add.f32 %f2, %f2, %f18;
  add.f32 %f3, %f3, %f19;
  add.f32 %f4, %f4, %f20;
  mov.u64 %rd3, %rd7;
  bra LOOP;
DONE:
  add.f32 %f1, %f1, %f2;
  add.f32 %f3, %f3, %f4;
  add.f32 %f1, %f1, %f3;
  setp.nan.f32 %p2, %f1, %f1;
  @!%p2 bra END;
  ld.param.u64 %rd8, [out];
  cvta.to.global.u64 %rd8, %rd8;
  st.global.f32 [%rd8], %f1;
END:
  ret;
}
)";

using Clock = std::chrono::steady_clock;

class Measurement {
 public:
  explicit Measurement(const std::shared_ptr<const Gpu>& gpu) : gpu_(gpu), memory_(std::make_shared<DeviceMemory>(gpu)) {
    driver().check(driver().stream_create(&stream_, kNonBlocking), "cannot make a stream");
  }
  ~Measurement() {
    driver().stream_wait(stream_);
    if (module_) driver().module_unload(module_);
    driver().stream_destroy(stream_);
  }

  Ceilings run() {
    Ceilings result;
    size_t free = 0, total = 0;
    driver().check(driver().memory_info(&free, &total), "cannot ask the GPU for its free memory");
    {
      const uint64_t bytes = std::min<uint64_t>(kCopyBytes, free / 3) / 16 * 16;
      Tensor from = random(Scalar::F32, {static_cast<int64_t>(bytes / 4)}), to = random(Scalar::F32, {static_cast<int64_t>(bytes / 4)});
      const double gb = static_cast<double>(bytes) / 1e9;
      result.copy_gb_s = 2 * gb / time_calls(8, [&] { driver().check(driver().copy(at(to), at(from), bytes, stream_), "cannot copy on the GPU"); });
      load_reader();
      Pointer data = at(from), out = at(to);
      uint64_t count = bytes / 16;
      void* arguments[] = {&data, &count, &out};
      // Whole rounds of four reads a thread are read, the rest is not.
      const uint64_t round = 4ull * kBlocks * kThreads, read = count / round * round;
      result.read_gb_s = static_cast<double>(read) * 16 / 1e9 / time_calls(8, [&] {
                           driver().check(driver().launch(sum_of_, kBlocks, 1, 1, kThreads, 1, 1, 0, stream_, arguments, nullptr), "cannot launch a kernel");
                         });
    }
    Tensor a = random(Scalar::BF16, {kMatmul, kMatmul}), b = random(Scalar::BF16, {kMatmul, kMatmul}), c = random(Scalar::BF16, {kMatmul, kMatmul});
    CublasLt blas(*gpu_, memory_);
    const double tflop = 2e-12 * kMatmul * kMatmul * kMatmul;
    auto product = [&] { blas.matmul(c, a, b, stream_); };
    double one = time_calls(2, product);
    result.matmul_tflop_s = tflop / one;
    result.matmul_sustained_tflop_s = tflop / time_calls(std::max(1, static_cast<int>(0.3 / one)), product);
    driver().check(driver().stream_wait(stream_), "the GPU failed");
    return result;
  }

 private:
  static Pointer at(const Tensor& t) { return address(t.data()); }

  // Random data: a product of zeros takes less power and runs faster. Normal numbers, one pattern again and again.
  Tensor random(Scalar scalar, const std::vector<int64_t>& shape) {
    static const std::vector<char> patterns[2] = {pattern(Scalar::F32), pattern(Scalar::BF16)};
    const std::vector<char>& bits = patterns[scalar == Scalar::BF16];
    Tensor t = Tensor::make(memory_, {true, gpu_->index()}, scalar, shape);
    for (uint64_t done = 0; done < t.bytes(); done += bits.size())
      driver().check(driver().copy_to_device(at(t) + done, bits.data(), std::min<uint64_t>(bits.size(), t.bytes() - done), stream_), "cannot copy to the GPU");
    return t;
  }

  static std::vector<char> pattern(Scalar scalar) {
    std::vector<char> bits(kPatternBytes);
    std::mt19937 random(0);
    std::normal_distribution<float> normal;
    const size_t width = scalar_bytes(scalar);
    for (size_t i = 0; i < bits.size(); i += width) {
      float value = normal(random);
      std::memcpy(&bits[i], reinterpret_cast<const char*>(&value) + sizeof value - width, width);  // bfloat16: the upper half
    }
    return bits;
  }

  void load_reader() {
    driver().check(driver().module_load(&module_, kReadCode), "the driver cannot compile a kernel");
    driver().check(driver().module_function(&sum_of_, module_, "sum_of"), "cannot find a kernel");
  }

  // Seconds of one call: the median over a few batches of `calls`, each waited for.
  double time_calls(int calls, const std::function<void()>& f) {
    std::vector<double> times;
    for (int batch = 0; batch < 6; ++batch) {
      driver().check(driver().stream_wait(stream_), "the GPU failed");
      auto start = Clock::now();
      for (int i = 0; i < calls; ++i) f();
      driver().check(driver().stream_wait(stream_), "the GPU failed");
      if (batch > 0) times.push_back(std::chrono::duration<double>(Clock::now() - start).count() / calls);  // the first one warms up
    }
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
  }

  std::shared_ptr<const Gpu> gpu_;
  std::shared_ptr<Memory> memory_;
  Stream stream_ = nullptr;
  Module module_ = nullptr;
  Function sum_of_ = nullptr;
};

}  // namespace

Ceilings measure_ceilings(const std::shared_ptr<const Gpu>& gpu) {
  Current current(*gpu);
  return Measurement(gpu).run();
}

}  // namespace kiln
