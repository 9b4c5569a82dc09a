#include "ffi/runtime/dispatch.h"

#include <cstdlib>

#include "ffi/runtime/cpu.h"
#include "ffi/targets/targets.h"

namespace jax_softmax2p {
namespace {

constexpr const char* kVariable = "JAX_SOFTMAX2P_ISA";

struct Target {
  const Kernels* kernels;
  bool supported;
};

// Every instruction set of this build, best first. Tests and benchmarks take the list from here.
std::vector<Target> Targets() {
  return {
#if defined(__x86_64__)
      {&kAvx512Kernels, Cpu().avx512},
      {&kAvx2Kernels, Cpu().avx2},
#elif defined(__aarch64__)
      {&kNeonKernels, true},
#endif
      {&kPortableKernels, true},
  };
}

std::string Names(const std::vector<const Kernels*>& all) {
  std::string names;
  for (const Kernels* kernels : all) {
    if (!names.empty()) names += ", ";
    names += kernels->name;
  }
  return names;
}

}  // namespace

const std::vector<const Kernels*>& SupportedKernels() {
  static const std::vector<const Kernels*> supported = [] {
    std::vector<const Kernels*> result;
    for (const Target& target : Targets()) {
      if (target.supported) result.push_back(target.kernels);
    }
    return result;
  }();
  return supported;
}

KernelChoice FindKernels(std::string_view name, std::string_view source) {
  for (const Target& target : Targets()) {
    if (target.kernels->name != name) continue;
    if (target.supported) return {target.kernels, ""};
    return {nullptr, std::string(source) + "='" + std::string(name) +
                         "': this CPU, or its operating system, does not support that instruction set; "
                         "supported here: " +
                         Names(SupportedKernels())};
  }
  return {nullptr,
          std::string(source) + "='" + std::string(name) +
              "' names no instruction set of this build; supported here: " + Names(SupportedKernels())};
}

const KernelChoice& ActiveKernels() {
  static const KernelChoice choice = [] {
    const char* name = std::getenv(kVariable);
    if (name == nullptr || *name == '\0') return KernelChoice{SupportedKernels().front(), ""};
    return FindKernels(name, kVariable);
  }();
  return choice;
}

}  // namespace jax_softmax2p
