#include "compiled/package.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstdlib>
#include <cstring>

#include "artifact/archive.h"
#include "artifact/file.h"
#include "compiled/host.h"
#include "artifact/sha256.h"
#include "compiled/shims.h"

namespace kiln {

namespace {

constexpr uint32_t kAbi = 1;  // of the tables below
constexpr const char* kAgain = "; export the model again";

struct Shims {
  uint32_t version, count;
  const char* const* names;
  void** slots;
};

bool write_all(int fd, std::string_view bytes) {
  while (!bytes.empty()) {
    ssize_t n = write(fd, bytes.data(), bytes.size());
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return false;
    bytes.remove_prefix(static_cast<size_t>(n));
  }
  return true;
}

// Of a file without a name, from which code may be mapped; -1: this kernel has none, or KILN_NO_MEMFD says to do without.
int memory_file() {
  if (std::getenv("KILN_NO_MEMFD")) return -1;
  constexpr unsigned kExecutable = 0x10;  // MFD_EXEC, since Linux 6.3
  int fd = memfd_create("kiln", MFD_CLOEXEC | kExecutable);
  return fd < 0 ? memfd_create("kiln", MFD_CLOEXEC) : fd;
}

std::string scratch_folder() {
  for (const char* name : {"KILN_TMPDIR", "TMPDIR"})
    if (const char* folder = std::getenv(name); folder && *folder) return folder;
  return "/tmp";
}

std::string dl_error() {
  const char* why = dlerror();
  return why ? why : "unknown error";
}

// A file in a folder of its own that both go with the object.
class ScratchFile {
 public:
  ScratchFile(std::string_view bytes, const std::string& where) : folder_(scratch_folder() + "/kiln-XXXXXX") {
    if (!mkdtemp(folder_.data())) fail(where, ": cannot make a folder in ", scratch_folder(), ": ", std::strerror(errno), "; name another in KILN_TMPDIR");
    path_ = folder_ + "/model.so";
    int fd = ::open(path_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0700);
    bool written = fd >= 0 && write_all(fd, bytes);
    int code = errno;
    if (fd >= 0) close(fd);
    if (!written) {
      remove();
      fail(where, ": cannot write ", bytes.size(), " bytes to ", scratch_folder(), ": ", std::strerror(code), "; name another folder in KILN_TMPDIR");
    }
  }
  ~ScratchFile() { remove(); }
  const std::string& path() const { return path_; }

 private:
  void remove() { unlink(path_.c_str()), rmdir(folder_.c_str()); }
  std::string folder_, path_;
};

}  // namespace

Library::Library(std::string_view code, const std::string& where) : where_(where) {
  check_glibc(code, where_);
  open(code);
  try {
    fill_shims();
    auto find = [&](auto& function, const char* name) {
      void* symbol = dlsym(handle_, (std::string("AOTInductorModelContainer") + name).c_str());
      if (!symbol) fail(where_, ": has no AOTInductorModelContainer", name, kAgain);
      function = reinterpret_cast<std::decay_t<decltype(function)>>(symbol);
    };
    find(create, "CreateWithDevice");
    find(destroy, "Delete");
    find(run, "RunSingleThreaded");
    find(count_constants, "GetNumConstants");
    find(constant_name, "GetConstantName");
    find(constant_fqn, "GetConstantOriginalFQN");
    find(constant_dtype, "GetConstantDtype");
    find(constant_bytes, "GetConstantDataSize");
    find(bind, "UpdateUserManagedConstantBufferPairs");
    find(count_inputs, "GetNumInputs");
    find(count_outputs, "GetNumOutputs");
    read_constants();
  } catch (...) {
    close_library();
    throw;
  }
}

Library::~Library() { close_library(); }

void Library::close_library() {
  if (handle_) {
    dlclose(handle_);
    // The loader finds a library by its path: while it keeps this one, no other may get the number.
    if (void* kept = fd_ < 0 ? nullptr : dlopen(path_.c_str(), RTLD_NOW | RTLD_NOLOAD)) dlclose(kept), fd_ = -1;
  }
  if (fd_ >= 0) close(fd_);
}

void Library::open(std::string_view code) {
  // Local: a process may hold several packages, and torch.
  constexpr int kMode = RTLD_NOW | RTLD_LOCAL;
  fd_ = memory_file();
  if (fd_ >= 0 && write_all(fd_, code)) {
    path_ = "/proc/self/fd/" + std::to_string(fd_);
    handle_ = dlopen(path_.c_str(), kMode);
  }
  if (handle_) return;
  if (fd_ >= 0) close(fd_), fd_ = -1;
  ScratchFile file(code, where_);
  handle_ = dlopen(file.path().c_str(), kMode);
  if (handle_) return;
  std::string why = dl_error();
  if (why.find("failed to map segment") != std::string::npos)
    fail(where_, ": ", scratch_folder(), " does not allow execution; name a folder that does in KILN_TMPDIR");
  fail(where_, ": cannot open the compiled model: ", why);
}

void Library::fill_shims() {
  const auto* shims = static_cast<const Shims*>(dlsym(handle_, "kiln_shims"));
  if (!shims) fail(where_, ": not compiled for this runner", kAgain);
  if (shims->version != kAbi) fail(where_, ": its code has version ", shims->version, ", this runner has ", kAbi, "; use a runner of that version, or export again");
  for (uint32_t i = 0; i < shims->count; ++i) {
    shims->slots[i] = find_shim(shims->names[i]);
    if (!shims->slots[i]) fail(where_, ": calls ", shims->names[i], ", which this runner does not have; use a newer runner");
  }
}

// Lines of "name dtype size,size,..".
void Library::read_constants() {
  const auto* text = static_cast<const char*>(dlsym(handle_, "kiln_constants"));
  if (!text) fail(where_, ": not compiled for this runner", kAgain);
  for (std::string_view rest = text; !rest.empty();) {
    std::string_view line = rest.substr(0, rest.find('\n'));
    rest.remove_prefix(std::min(rest.size(), line.size() + 1));
    size_t name = line.find(' '), dtype = line.find(' ', name + 1);
    if (name == std::string_view::npos || dtype == std::string_view::npos) fail(where_, ": its list of constants is damaged", kAgain);
    Constant constant{scalar_named(line.substr(name + 1, dtype - name - 1)), {}};
    for (const char *p = line.data() + dtype + 1, *end = line.data() + line.size(); p < end;) {
      auto r = std::from_chars(p, end, constant.shape.emplace_back());
      if (r.ec != std::errc()) fail(where_, ": its list of constants is damaged", kAgain);
      p = r.ptr + (r.ptr < end);
    }
    constants_.emplace(line.substr(0, name), std::move(constant));
  }
}

Package::Package(const Artifact& artifact, const TargetSpec& target) : path_(artifact.path(target.file)) {
  check_cpu();
  if (uint64_t size = file_size(path_); size != target.bytes) fail(path_, ": ", size, " bytes, the manifest says ", target.bytes, "; copy the artifact again");
  const std::string bytes = read_file(path_, target.bytes);
  if (std::string found = sha256(bytes.data(), bytes.size()); found != target.sha256)
    fail(path_, ": damaged: SHA-256 is ", found, ", the manifest says ", target.sha256, "; copy the artifact again");
  std::map<std::string, std::string_view> files = list_archive(bytes, path_);
  for (const auto& [entry, point] : artifact.entry_points) {
    auto it = files.find(entry + ".so");
    if (it == files.end()) fail(path_, ": has no ", entry, ".so, which the manifest names", kAgain);
    libraries_.emplace(entry, std::make_unique<Library>(it->second, path_ + ": " + entry));
    files.erase(it);
  }
  if (target.pack_words && target.pack_halves) {
    loader_ = std::make_unique<LoaderCode>(LoaderCode{{*target.pack_words, ""}, {*target.pack_halves, ""}});
    for (LoaderCode::Kernel* kernel : {&loader_->words, &loader_->halves}) {
      auto it = files.find(kernel->spec.file);
      if (it == files.end()) fail(path_, ": has no ", kernel->spec.file, ", which the manifest names", kAgain);
      kernel->image = it->second;
      files.erase(it);
    }
  }
  if (!files.empty()) fail(path_, ": has '", files.begin()->first, "', which the manifest does not name", kAgain);
}

}  // namespace kiln
