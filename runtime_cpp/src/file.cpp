#include "file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

namespace kiln {

namespace {

int open_file(const std::string& path, uint64_t* size) {
  int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) fail(path, ": cannot open: ", std::strerror(errno));
  struct stat st;
  if (fstat(fd, &st) != 0 || !S_ISREG(st.st_mode)) {
    close(fd);
    fail(path, ": not a regular file");
  }
  *size = static_cast<uint64_t>(st.st_size);
  return fd;
}

}  // namespace

std::string read_file(const std::string& path) {
  uint64_t size = 0;
  int fd = open_file(path, &size);
  std::string text(size, '\0');
  uint64_t done = 0;
  while (done < size) {
    ssize_t n = read(fd, &text[done], size - done);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) {
      close(fd);
      fail(path, ": read ", done, " of ", size, " bytes: ", n < 0 ? std::strerror(errno) : "the file ended");
    }
    done += static_cast<uint64_t>(n);
  }
  close(fd);
  return text;
}

bool file_exists(const std::string& path) {
  struct stat st;
  return stat(path.c_str(), &st) == 0;
}

uint64_t file_size(const std::string& path) {
  struct stat st;
  if (stat(path.c_str(), &st) != 0) fail(path, ": ", std::strerror(errno));
  return static_cast<uint64_t>(st.st_size);
}

MappedFile::MappedFile(const std::string& path) : path_(path) {
  fd_ = open_file(path, &size_);
  if (size_ == 0) {
    close(fd_);
    fail(path, ": the file is empty");
  }
  void* p = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, fd_, 0);
  if (p == MAP_FAILED) {
    int code = errno;
    close(fd_);
    fail(path, ": cannot map ", size_, " bytes: ", std::strerror(code));
  }
  data_ = static_cast<const char*>(p);
}

MappedFile::~MappedFile() {
  munmap(const_cast<char*>(data_), size_);
  close(fd_);
}

}  // namespace kiln
