// The case that is being tested, to be printed when a signal or a sanitizer ends the program.
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

// Sets the case; arguments as printf.
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

// Prints the current case and ends the program.
inline void ReportSignal(int signal) {
  PrintCurrentCase(signal == SIGALRM   ? "to return in time"
                   : signal == SIGABRT ? "not to abort"
                   : signal == SIGFPE  ? "not to divide by zero"
                   : signal == SIGILL  ? "to do with the CPU's instructions"
                                       : "to stay within its arrays");
  _exit(1);
}

// From now on the current case is printed where a signal or a sanitizer ends the program. SIGALRM comes in
// `seconds`. A sanitizer reports accesses to unmapped memory itself.
inline void WatchCases(unsigned seconds) {
  std::fflush(stdout);
  for (const int each : {SIGALRM, SIGABRT, SIGFPE, SIGILL}) signal(each, ReportSignal);
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  __sanitizer_set_death_callback([] { PrintCurrentCase("what the sanitizer has reported"); });
#else
  for (const int each : {SIGSEGV, SIGBUS}) signal(each, ReportSignal);
#endif
  alarm(seconds);
}

}  // namespace jax_softmax2p
