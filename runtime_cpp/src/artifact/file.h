#pragma once
#include <cstdint>
#include <string>

#include "kiln/error.h"

namespace kiln {

std::string read_file(const std::string& path, uint64_t most);  // Error when it cannot be read or has more than `most` bytes
bool file_exists(const std::string& path);
uint64_t file_size(const std::string& path);     // Error when it does not exist

// A file mapped read-only for as long as the object lives.
class MappedFile {
 public:
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const std::string& path() const { return path_; }
  const char* data() const { return data_; }
  uint64_t size() const { return size_; }
  int fd() const { return fd_; }

  // Copies bytes [offset, offset + bytes) to `to`, on `threads` threads: one alone takes less from the page cache than a bus carries.
  // Error when they cannot be read.
  void read(uint64_t offset, uint64_t bytes, char* to, unsigned threads) const;

 private:
  std::string path_;
  int fd_ = -1;
  const char* data_ = nullptr;
  uint64_t size_ = 0;
};

}  // namespace kiln
