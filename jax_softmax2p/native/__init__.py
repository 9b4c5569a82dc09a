"""The compiled kernels: whether they can run here, which, and how to call them on NumPy arrays."""

from jax_softmax2p.native.library import active_isa as active_isa
from jax_softmax2p.native.library import export_disabled_checks as export_disabled_checks
from jax_softmax2p.native.library import ffi_api_version as ffi_api_version
from jax_softmax2p.native.library import supported_isas as supported_isas
from jax_softmax2p.native.library import unavailable_reason as unavailable_reason
from jax_softmax2p.native.library import unsupported_reason as unsupported_reason
from jax_softmax2p.native.measurement import PASSES as PASSES
from jax_softmax2p.native.measurement import cache_bytes as cache_bytes
from jax_softmax2p.native.measurement import pass_into as pass_into
from jax_softmax2p.native.measurement import product as product
from jax_softmax2p.native.measurement import softmax_plan as softmax_plan
from jax_softmax2p.native.names import ALGORITHMS as ALGORITHMS
from jax_softmax2p.native.names import ATTENTION_TARGET as ATTENTION_TARGET
from jax_softmax2p.native.names import DTYPES as DTYPES
from jax_softmax2p.native.names import LOG_SOFTMAX_TARGET as LOG_SOFTMAX_TARGET
from jax_softmax2p.native.names import LOG_SOFTMAX_VJP_TARGET as LOG_SOFTMAX_VJP_TARGET
from jax_softmax2p.native.names import LOG_SUM_JVP_TARGET as LOG_SUM_JVP_TARGET
from jax_softmax2p.native.names import LOG_SUM_TARGET as LOG_SUM_TARGET
from jax_softmax2p.native.names import LOG_SUM_VJP_TARGET as LOG_SUM_VJP_TARGET
from jax_softmax2p.native.names import SOFTMAX_JACOBIAN_TARGET as SOFTMAX_JACOBIAN_TARGET
from jax_softmax2p.native.names import SOFTMAX_TARGET as SOFTMAX_TARGET
from jax_softmax2p.native.names import TARGETS as TARGETS
from jax_softmax2p.native.names import Algorithm as Algorithm
from jax_softmax2p.native.names import check_algorithm as check_algorithm
from jax_softmax2p.native.numpy_kernels import softmax_into as softmax_into
from jax_softmax2p.native.numpy_kernels import softmax_jacobian_into as softmax_jacobian_into
