// Makes memory run out: any `new` of the program, in whichever thread, can be made to fail.
#pragma once

#include <cstdint>

namespace jax_softmax2p {

enum class Failing { kOne, kAllFrom };

// For its lifetime the k-th allocation from now, counted from 0, fails, or that one and all after it.
class AllocationFault {
 public:
  AllocationFault(Failing failing, std::int64_t k);
  ~AllocationFault();
  AllocationFault(const AllocationFault&) = delete;
  AllocationFault& operator=(const AllocationFault&) = delete;

  // Whether an allocation has failed.
  bool Injected() const;
};

// For its lifetime no allocation of this thread fails or is counted. For what belongs to the test itself.
class ExemptFromFaults {
 public:
  ExemptFromFaults();
  ~ExemptFromFaults();
  ExemptFromFaults(const ExemptFromFaults&) = delete;
  ExemptFromFaults& operator=(const ExemptFromFaults&) = delete;
};

}  // namespace jax_softmax2p
