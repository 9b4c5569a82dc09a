#pragma once

namespace jax_softmax2p {

// With the guard compiled out the kernels are as the paper has them and fail on masks and on large
// inputs. For measuring what the guard costs (benchmarks/guard_cost.py), and for nothing else.
#ifdef JAX_SOFTMAX2P_UNGUARDED
inline constexpr bool kGuarded = false;
#else
inline constexpr bool kGuarded = true;
#endif

}  // namespace jax_softmax2p
