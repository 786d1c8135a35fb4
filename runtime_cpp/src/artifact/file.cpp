#include "artifact/file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

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

// What went wrong, or nothing.
std::string read_part(int fd, uint64_t at, uint64_t bytes, char* to) {
  while (bytes > 0) {
    ssize_t got = pread(fd, to, bytes, static_cast<off_t>(at));
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return "cannot read byte " + std::to_string(at) + ": " + (got < 0 ? std::strerror(errno) : "the file ended");
    to += got, at += static_cast<uint64_t>(got), bytes -= static_cast<uint64_t>(got);
  }
  return "";
}

}  // namespace

std::string read_file(const std::string& path, uint64_t most) {
  uint64_t size = 0;
  int fd = open_file(path, &size);
  if (size > most) {
    close(fd);
    fail(path, ": ", size, " bytes, ", most, " at most");
  }
  std::string text(size, '\0');
  std::string error = read_part(fd, 0, size, text.data());
  close(fd);
  if (!error.empty()) fail(path, ": ", error);
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

void MappedFile::read(uint64_t offset, uint64_t bytes, char* to, unsigned threads) const {
  std::vector<std::string> errors(threads);
  auto part = [&](unsigned i) {
    uint64_t low = bytes * i / threads, high = bytes * (i + 1) / threads;
    errors[i] = read_part(fd_, offset + low, high - low, to + low);
  };
  std::vector<std::thread> others;
  for (unsigned i = 1; i < threads; ++i) {
    try {
      others.emplace_back(part, i);
    } catch (const std::system_error&) {  // no thread to be had
      part(i);
    }
  }
  part(0);
  for (std::thread& other : others) other.join();
  for (const std::string& error : errors)
    if (!error.empty()) fail(path_, ": ", error);
}

MappedFile::~MappedFile() {
  munmap(const_cast<char*>(data_), size_);
  close(fd_);
}

}  // namespace kiln
