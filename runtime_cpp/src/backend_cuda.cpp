#include "backend.h"
namespace kiln {
int cuda_device_count(std::string* why) {
  *why = "this runner was built without CUDA";
  return 0;
}
std::pair<int, int> cuda_compute_capability(int) { fail("this runner was built without CUDA"); }
std::unique_ptr<Backend> make_cuda_backend(int, bool) { fail("this runner was built without CUDA"); }
void* find_cuda_shim(const char* ) { return reinterpret_cast<void*>(cuda_device_count); }
}  // namespace kiln
