#pragma once
#include <string>
#include <string_view>

namespace kiln {

// kiln-run as a process: signals, standard output, text that comes in.

// The process is to end and nothing went wrong: exit code 128 + signal, as a shell has it.
struct Ended {
  int signal;
};

// From here on SIGINT and SIGTERM are only noted, the second of a kind kills; SIGPIPE is ignored and print() ends the process.
void note_signals();
int noted_signal();   // the newest, 0: none
void end_if_noted();  // throws Ended

// Writes all of `text` to standard output. Throws Ended when nobody reads it any more, or when it has to wait and a signal was noted;
// Error when it cannot be written.
void print(std::string_view text);

// UTF-8 text from a file of any kind, a pipe too; "-" is standard input. A byte order mark in front is not text. Error when it cannot be
// read or is UTF-16; Ended when it has to wait and a signal was noted.
std::string read_text(const std::string& path);

}  // namespace kiln
