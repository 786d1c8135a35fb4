#pragma once
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "kiln/artifact.h"
#include "compiled/tensor.h"

namespace kiln {

// The shared library of one entry point, opened for as long as the object lives. AOTInductor's container in it is used by name.
class Library {
 public:
  using Container = struct OpaqueContainer*;
  struct NamedTensor {
    const char* name;
    Tensor* handle;
  };

  // `code` is an ELF file; `where` begins every error.
  Library(std::string_view code, const std::string& where);
  ~Library();
  Library(const Library&) = delete;
  Library& operator=(const Library&) = delete;

  struct Constant {
    Scalar scalar;
    std::vector<int64_t> shape;
  };
  const std::map<std::string, Constant>& constants() const { return constants_; }  // as the code was compiled for, by fully qualified name

  // Zero: success. Else kiln_model_error was told why.
  int (*create)(Container*, size_t models, const char* device, const char* cubins) = nullptr;
  int (*destroy)(Container) = nullptr;
  int (*run)(Container, Tensor** inputs, size_t, Tensor** outputs, size_t, void* stream, void* proxy) = nullptr;
  int (*count_constants)(Container, size_t*) = nullptr;
  int (*constant_name)(Container, size_t, const char**) = nullptr;
  int (*constant_fqn)(Container, size_t, const char**) = nullptr;
  int (*constant_dtype)(Container, size_t, int32_t*) = nullptr;
  int (*constant_bytes)(Container, size_t, size_t*) = nullptr;
  int (*bind)(Container, const NamedTensor*, size_t, bool inactive, bool full) = nullptr;
  int (*count_inputs)(Container, size_t*) = nullptr;
  int (*count_outputs)(Container, size_t*) = nullptr;

 private:
  void open(std::string_view code);
  void close_library();
  void fill_shims();
  void read_constants();

  std::string where_;
  int fd_ = -1;  // of the memory file that is open as a library
  std::string path_;
  void* handle_ = nullptr;
  std::map<std::string, Constant> constants_;
};

// Kernels that pack blocks of a GGUF file on a GPU, and their code.
struct LoaderCode {
  struct Kernel {
    PackKernel spec;
    std::string image;
  };
  Kernel words, halves;
};

// The code of one target of an artifact: hashed against the manifest, its names checked, its libraries open. Shared by all sessions of a model.
class Package {
 public:
  Package(const Artifact& artifact, const TargetSpec& target);
  const Library& library(const std::string& entry) const { return *libraries_.at(entry); }
  const LoaderCode* loader() const { return loader_.get(); }  // null: the package has none
  const std::string& path() const { return path_; }

 private:
  std::string path_;
  std::map<std::string, std::unique_ptr<Library>> libraries_;
  std::unique_ptr<LoaderCode> loader_;
};

}  // namespace kiln
