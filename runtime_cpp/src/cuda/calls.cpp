#include "cuda/calls.h"

#include <cstring>

#include "compiled/shims.h"

namespace kiln {

namespace {

using namespace cuda;

int32_t aoti_torch_cuda_mm_out(Tensor* out, Tensor* a, Tensor* b) {
  return shim([&] {
    Surroundings& s = Running::now();
    if (!s.cuda) fail("mm on a GPU in a model for the CPU");
    Among others;
    s.cuda->matmul(*out, *a, *b, static_cast<Stream>(s.stream));
  });
}

Result cuModuleLoadData(Module* module, const void* image) {
  Result code = 999;  // CUDA_ERROR_UNKNOWN
  shim([&] {
    Surroundings& s = Running::now();
    if (!s.cuda) fail("GPU code in a model for the CPU");
    code = s.cuda->modules().load(module, image);
  });
  return code;
}

Result cuModuleGetFunction(Function* function, Module module, const char* name) {
  Among others;
  return driver().module_function(function, module, name);
}
Result cuFuncSetAttribute(Function function, int attribute, int value) {
  Among others;
  return driver().function_set(function, attribute, value);
}
Result cuGetErrorString(Result code, const char** text) { return driver().error_string(code, text); }
Result cuLaunchKernel(Function f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, Stream stream,
                      void** params, void** extra) {
  Among others;
  return driver().launch(f, gx, gy, gz, bx, by, bz, shared, stream, params, extra);
}

struct Named {
  const char* name;
  void* function;
};

}  // namespace

void* find_cuda_shim(const char* name) {
#define KILN_SHIM(function)
#define KILN_CUDA_SHIM(function) {#function, reinterpret_cast<void*>(function)},
  static const Named table[] = {
#include "shims.def"
  };
  for (const Named& row : table)
    if (!std::strcmp(row.name, name)) return row.function;
  return nullptr;
}

Modules::~Modules() {
  try {
    Current current(*gpu_);
    Among others;
    for (const auto& [image, module] : modules_) driver().module_unload(module);
  } catch (const Error&) {  // the driver is gone: so is the code
  }
}

Result Modules::load(Module* module, const void* image) {
  Among others;  // before the mutex: who captures loads nothing, and may wait for no one
  std::lock_guard<std::mutex> lock(mutex_);
  auto [it, fresh] = modules_.emplace(image, nullptr);
  if (fresh)
    if (Result code = driver().module_load(&it->second, image); code != kSuccess) {
      modules_.erase(it);
      return code;
    }
  *module = it->second;
  return kSuccess;
}

}  // namespace kiln
