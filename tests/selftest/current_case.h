// What the program is doing, for when it is ended from outside: by a signal, or by a sanitizer.
#pragma once

#include <signal.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstring>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
extern "C" void __sanitizer_set_death_callback(void (*callback)());
#endif

namespace jax_softmax2p {

inline char current_case[256];

// As printf.
__attribute__((format(printf, 1, 2))) inline void SetCurrentCase(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(current_case, sizeof current_case, format, arguments);
  va_end(arguments);
}

// Async-signal-safe.
inline void PrintCurrentCase(const char* what) {
  for (const char* text : {"FAILED ", what, ": ", static_cast<const char*>(current_case), "\n"}) {
    if (write(STDOUT_FILENO, text, std::strlen(text)) < 0) return;
  }
}

// Ends the program for a signal.
inline void TellOfSignal(int signal) {
  PrintCurrentCase(signal == SIGALRM   ? "to return in time"
                   : signal == SIGABRT ? "not to abort"
                   : signal == SIGFPE  ? "not to divide by zero"
                   : signal == SIGILL  ? "to do with the CPU's instructions"
                                       : "to stay within its arrays");
  _exit(1);
}

// From now on the current case is told of where a signal or a sanitizer ends the program; SIGALRM comes
// `seconds` from now. A sanitizer tells itself of accesses to memory that is not there.
inline void WatchCases(unsigned seconds) {
  std::fflush(stdout);
  for (const int each : {SIGALRM, SIGABRT, SIGFPE, SIGILL}) signal(each, TellOfSignal);
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  __sanitizer_set_death_callback([] { PrintCurrentCase("what the sanitizer has reported"); });
#else
  for (const int each : {SIGSEGV, SIGBUS}) signal(each, TellOfSignal);
#endif
  alarm(seconds);
}

}  // namespace jax_softmax2p
