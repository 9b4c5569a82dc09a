"""What the library offers, by name: FFI targets, algorithms and dtypes."""

from typing import Literal, get_args

import jax.numpy as jnp
import numpy as np

SOFTMAX_TARGET = "jax_softmax2p_softmax_v1"
LOG_SOFTMAX_TARGET = "jax_softmax2p_log_softmax_v1"
LOG_SOFTMAX_VJP_TARGET = "jax_softmax2p_log_softmax_vjp_v1"
LOGSUMEXP_TARGET = "jax_softmax2p_log_sum_v1"
LOGSUMEXP_JVP_TARGET = "jax_softmax2p_log_sum_jvp_v1"
LOGSUMEXP_VJP_TARGET = "jax_softmax2p_log_sum_vjp_v1"
SOFTMAX_JACOBIAN_TARGET = "jax_softmax2p_softmax_jacobian_v1"
ATTENTION_TARGET = "jax_softmax2p_attention_v1"
ATTENTION_VJP_TARGET = "jax_softmax2p_attention_vjp_v1"

TARGETS = (
    SOFTMAX_TARGET,
    LOG_SOFTMAX_TARGET,
    LOG_SOFTMAX_VJP_TARGET,
    LOGSUMEXP_TARGET,
    LOGSUMEXP_JVP_TARGET,
    LOGSUMEXP_VJP_TARGET,
    SOFTMAX_JACOBIAN_TARGET,
    ATTENTION_TARGET,
    ATTENTION_VJP_TARGET,
)
"""The names of the FFI targets."""

Algorithm = Literal["auto", "two_pass", "two_pass_reload", "three_pass_recompute", "three_pass_reload"]

ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)
"""The names that ``algorithm`` may have."""

DTYPE_NAMES = {np.dtype(d): np.dtype(d).name for d in (np.float32, np.float64, jnp.bfloat16, np.float16)}
"""What the library calls the dtypes that have native kernels."""

DTYPES = tuple(DTYPE_NAMES)
"""The dtypes that have native kernels."""


def check_algorithm(algorithm: str) -> None:
    """Raises ValueError unless ``algorithm`` is one of :data:`ALGORITHMS`."""
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm must be one of {', '.join(ALGORITHMS)}; got {algorithm!r}")
