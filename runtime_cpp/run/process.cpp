#include "process.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "kiln/error.h"

namespace kiln {

namespace {

volatile sig_atomic_t noted = 0;

void note(int signal) { noted = signal; }

constexpr size_t kPiece = 4096;  // PIPE_BUF: what poll() says a pipe takes
constexpr int kLookMs = 100;

// Waits until `fd` can be read or written (events). A noted signal ends the wait.
void wait_for(int fd, short events) {
  pollfd p{fd, events, 0};
  while (poll(&p, 1, kLookMs) <= 0) end_if_noted();
}

std::string read_all(int fd, const std::string& name) {
  std::string text;
  char piece[1 << 16];
  for (;;) {
    wait_for(fd, POLLIN);
    end_if_noted();
    ssize_t n = read(fd, piece, sizeof piece);
    if (n == 0) return text;
    if (n > 0)
      text.append(piece, static_cast<size_t>(n));
    else if (errno != EINTR && errno != EAGAIN)
      fail(name, ": cannot read: ", std::strerror(errno));
  }
}

}  // namespace

void note_signals() {
  struct sigaction action = {};
  action.sa_handler = note;
  action.sa_flags = SA_RESTART | static_cast<int>(SA_RESETHAND);
  for (int signal : {SIGINT, SIGTERM}) {
    struct sigaction before;
    if (sigaction(signal, nullptr, &before) == 0 && before.sa_handler == SIG_IGN) continue;  // as nohup and a shell's `&` want it
    sigaction(signal, &action, nullptr);
  }
  signal(SIGPIPE, SIG_IGN);
}

int noted_signal() { return noted; }

void end_if_noted() {
  if (noted) throw Ended{noted};
}

void print(std::string_view text) {
  while (!text.empty()) {
    wait_for(STDOUT_FILENO, POLLOUT);
    ssize_t n = write(STDOUT_FILENO, text.data(), std::min(text.size(), kPiece));
    if (n >= 0) {
      text.remove_prefix(static_cast<size_t>(n));
      continue;
    }
    if (errno == EPIPE) throw Ended{SIGPIPE};
    if (errno != EINTR && errno != EAGAIN) fail("standard output: ", std::strerror(errno));
  }
}

std::string read_text(const std::string& path) {
  std::string text;
  if (path == "-") {
    text = read_all(STDIN_FILENO, "standard input");
  } else {
    int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0) fail(path, ": cannot open: ", std::strerror(errno));
    struct stat st;
    if (fstat(fd, &st) == 0 && S_ISDIR(st.st_mode)) {
      close(fd);
      fail(path, ": is a directory");
    }
    try {
      text = read_all(fd, path);
    } catch (...) {
      close(fd);
      throw;
    }
    close(fd);
  }
  if (text.compare(0, 2, "\xFF\xFE") == 0 || text.compare(0, 2, "\xFE\xFF") == 0) fail(path, ": is UTF-16 text; save it as UTF-8");
  if (text.compare(0, 3, "\xEF\xBB\xBF") == 0) text.erase(0, 3);
  return text;
}

}  // namespace kiln
