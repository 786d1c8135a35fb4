#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "kiln/error.h"

// The part of the CUDA driver's interface that the runner uses, declared here: no toolkit is needed to build it, and the driver is opened at
// run time, so that one binary starts on a machine without a GPU. Layouts and numbers are those of cuda.h, whose interface is fixed.
namespace kiln::cuda {

using Result = int;
using Device = int;
using Pointer = unsigned long long;
using Context = struct OpaqueContext*;
using Module = struct OpaqueModule*;
using Function = struct OpaqueFunction*;
using Kernel = struct OpaqueKernel*;
using Stream = struct OpaqueStream*;
using Event = struct OpaqueEvent*;
using Graph = struct OpaqueGraph*;
using GraphExec = struct OpaqueGraphExec*;
using GraphNode = struct OpaqueGraphNode*;
using Allocation = unsigned long long;

constexpr Result kSuccess = 0, kOutOfMemory = 2;
constexpr int kMultiprocessors = 16;                   // CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
constexpr int kMajor = 75, kMinor = 76;                 // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
constexpr int kLimitStackSize = 0;                      // CU_LIMIT_STACK_SIZE
constexpr unsigned kNonBlocking = 1;                    // CU_STREAM_NON_BLOCKING
constexpr unsigned kDisableTiming = 2;                  // CU_EVENT_DISABLE_TIMING
constexpr int kCaptureThreadLocal = 1;                  // CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
constexpr int kKernelNode = 0;                          // CU_GRAPH_NODE_TYPE_KERNEL
constexpr unsigned char kProgrammaticPort = 1;          // CU_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC
constexpr unsigned char kDefaultDependency = 0, kProgrammaticDependency = 1;

struct KernelNodeParams {  // CUDA_KERNEL_NODE_PARAMS_v2
  Function function;
  unsigned grid[3], block[3], shared_bytes;
  void** params;
  void** extra;
  Kernel kernel;
  Context context;
};
struct EdgeData {  // CUgraphEdgeData
  unsigned char from_port, to_port, type, reserved[5];
};
struct Location {
  int type;  // 1: a device
  int id;
};
struct AllocationProp {  // CUmemAllocationProp
  int type;              // 1: pinned
  int handle_types;
  Location location;
  void* win32;
  struct {
    unsigned char compression, rdma;
    unsigned short usage;
    unsigned char reserved[4];
  } flags;
};
struct AccessDesc {
  Location location;
  int flags;  // 3: read and write
};
static_assert(sizeof(KernelNodeParams) == 72 && sizeof(EdgeData) == 8 && sizeof(AllocationProp) == 32 && sizeof(AccessDesc) == 12);

// Function, name, the CUDA version whose form of it is meant. A driver without one of the first list is too old; without one of the second,
// the decode graph has no early launches.
#define KILN_DRIVER_FUNCTIONS(F)                                                                                                        \
  F(init, "cuInit", 2000, (unsigned))                                                                                                   \
  F(driver_version, "cuDriverGetVersion", 2020, (int*))                                                                                 \
  F(device_count, "cuDeviceGetCount", 2000, (int*))                                                                                     \
  F(device_get, "cuDeviceGet", 2000, (Device*, int))                                                                                    \
  F(device_attribute, "cuDeviceGetAttribute", 2000, (int*, int, Device))                                                                \
  F(device_total, "cuDeviceTotalMem", 3020, (size_t*, Device))                                                                          \
  F(context_retain, "cuDevicePrimaryCtxRetain", 7000, (Context*, Device))                                                               \
  F(context_release, "cuDevicePrimaryCtxRelease", 11000, (Device))                                                                      \
  F(context_push, "cuCtxPushCurrent", 4000, (Context))                                                                                  \
  F(context_pop, "cuCtxPopCurrent", 4000, (Context*))                                                                                   \
  F(context_limit, "cuCtxSetLimit", 3010, (int, size_t))                                                                                \
  F(memory_info, "cuMemGetInfo", 3020, (size_t*, size_t*))                                                                              \
  F(memory_alloc, "cuMemAlloc", 3020, (Pointer*, size_t))                                                                               \
  F(memory_free, "cuMemFree", 3020, (Pointer))                                                                                          \
  F(host_alloc, "cuMemHostAlloc", 2020, (void**, size_t, unsigned))                                                                     \
  F(host_free, "cuMemFreeHost", 2000, (void*))                                                                                          \
  F(reserve, "cuMemAddressReserve", 10020, (Pointer*, size_t, size_t, Pointer, unsigned long long))                                     \
  F(unreserve, "cuMemAddressFree", 10020, (Pointer, size_t))                                                                            \
  F(create, "cuMemCreate", 10020, (Allocation*, size_t, const AllocationProp*, unsigned long long))                                     \
  F(release, "cuMemRelease", 10020, (Allocation))                                                                                       \
  F(map, "cuMemMap", 10020, (Pointer, size_t, size_t, Allocation, unsigned long long))                                                  \
  F(unmap, "cuMemUnmap", 10020, (Pointer, size_t))                                                                                      \
  F(set_access, "cuMemSetAccess", 10020, (Pointer, size_t, const AccessDesc*, size_t))                                                  \
  F(granularity, "cuMemGetAllocationGranularity", 10020, (size_t*, const AllocationProp*, int))                                         \
  F(copy_to_device, "cuMemcpyHtoDAsync", 3020, (Pointer, const void*, size_t, Stream))                                                  \
  F(copy_to_host, "cuMemcpyDtoHAsync", 3020, (void*, Pointer, size_t, Stream))                                                          \
  F(copy, "cuMemcpyDtoDAsync", 3020, (Pointer, Pointer, size_t, Stream))                                                                \
  F(set_bytes, "cuMemsetD8Async", 3020, (Pointer, unsigned char, size_t, Stream))                                                       \
  F(set_words, "cuMemsetD32Async", 3020, (Pointer, unsigned, size_t, Stream))                                                           \
  F(stream_create, "cuStreamCreate", 2000, (Stream*, unsigned))                                                                         \
  F(stream_destroy, "cuStreamDestroy", 4000, (Stream))                                                                                  \
  F(stream_wait, "cuStreamSynchronize", 2000, (Stream))                                                                                 \
  F(begin_capture, "cuStreamBeginCapture", 10010, (Stream, int))                                                                        \
  F(end_capture, "cuStreamEndCapture", 10000, (Stream, Graph*))                                                                         \
  F(event_create, "cuEventCreate", 2000, (Event*, unsigned))                                                                            \
  F(event_destroy, "cuEventDestroy", 4000, (Event))                                                                                     \
  F(event_record, "cuEventRecord", 2000, (Event, Stream))                                                                               \
  F(event_wait, "cuEventSynchronize", 2000, (Event))                                                                                    \
  F(graph_instantiate, "cuGraphInstantiateWithFlags", 11040, (GraphExec*, Graph, unsigned long long))                                   \
  F(graph_launch, "cuGraphLaunch", 10000, (GraphExec, Stream))                                                                          \
  F(graph_exec_destroy, "cuGraphExecDestroy", 10000, (GraphExec))                                                                       \
  F(graph_destroy, "cuGraphDestroy", 10000, (Graph))                                                                                    \
  F(module_load, "cuModuleLoadData", 2000, (Module*, const void*))                                                                      \
  F(module_unload, "cuModuleUnload", 2000, (Module))                                                                                    \
  F(module_function, "cuModuleGetFunction", 2000, (Function*, Module, const char*))                                                     \
  F(function_set, "cuFuncSetAttribute", 9000, (Function, int, int))                                                                     \
  F(launch, "cuLaunchKernel", 4000, (Function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, Stream, void**, void**)) \
  F(error_string, "cuGetErrorString", 6000, (Result, const char**))

#define KILN_DRIVER_GRAPH_FUNCTIONS(F)                                                                                                  \
  F(graph_nodes, "cuGraphGetNodes", 10000, (Graph, GraphNode*, size_t*))                                                                \
  F(node_type, "cuGraphNodeGetType", 10000, (GraphNode, int*))                                                                          \
  F(node_kernel, "cuGraphKernelNodeGetParams", 12000, (GraphNode, KernelNodeParams*))                                                   \
  F(function_name, "cuFuncGetName", 12030, (const char**, Function))                                                                    \
  F(kernel_name, "cuKernelGetName", 12030, (const char**, Kernel))                                                                      \
  F(graph_edges, "cuGraphGetEdges", 12030, (Graph, GraphNode*, GraphNode*, EdgeData*, size_t*))                                         \
  F(add_edges, "cuGraphAddDependencies", 12030, (Graph, const GraphNode*, const GraphNode*, const EdgeData*, size_t))                   \
  F(remove_edges, "cuGraphRemoveDependencies", 12030, (Graph, const GraphNode*, const GraphNode*, const EdgeData*, size_t))

struct Driver {
#define F(member, name, version, arguments) Result(*member) arguments = nullptr;
  KILN_DRIVER_FUNCTIONS(F)
  KILN_DRIVER_GRAPH_FUNCTIONS(F)
#undef F
  std::string missing;        // why the driver cannot be used; empty: it can
  std::string missing_graph;  // the first function of the second list that it lacks

  void check(Result code, const char* doing) const {
    if (code != kSuccess) complain(code, doing);
  }
  [[noreturn]] void complain(Result code, const char* doing) const;
};

// Opened and initialized at the first call; `missing` says what is wrong.
const Driver& try_driver();
// The same; Error when it cannot be used.
const Driver& driver();

// A GPU and its primary context, which a process shares with whatever else uses the GPU in it.
class Gpu {
 public:
  explicit Gpu(int index);
  ~Gpu();
  Gpu(const Gpu&) = delete;
  Gpu& operator=(const Gpu&) = delete;
  int index() const { return index_; }
  Context context() const { return context_; }
  uint64_t total_bytes() const { return total_; }

 private:
  int index_;
  Device device_ = 0;
  Context context_ = nullptr;
  size_t total_ = 0;
};

// Makes the calling thread's current device a GPU for as long as it lives.
class Current {
 public:
  explicit Current(const Gpu& gpu) { driver().check(driver().context_push(gpu.context()), "cannot select the GPU"); }
  ~Current() {
    Context old = nullptr;
    driver().context_pop(&old);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;
};

// A capture fails when another thread changes the context meanwhile: memory, code (a kernel's first launch loads it), streams and events. So a
// capture is Alone, and whoever does such a thing is Among others, for no longer than a call; the thread that captures may do both.
class Among {
 public:
  Among();
  ~Among();
  Among(const Among&) = delete;
  Among& operator=(const Among&) = delete;
};
class Alone {
 public:
  Alone();
  ~Alone();
  Alone(const Alone&) = delete;
  Alone& operator=(const Alone&) = delete;
};

inline Pointer address(const void* data) { return reinterpret_cast<Pointer>(data); }

}  // namespace kiln::cuda
