"""Fast, accurate softmax for JAX on CPUs, by the two-pass algorithm (arXiv 2001.04438)."""

from importlib.metadata import version as _version
from pkgutil import extend_path as _extend_path

# In the root of a checkout Python finds this folder before the installed one. The compiled library is in
# the installed one.
__path__ = _extend_path(__path__, __name__)

from jax_softmax2p import integrations as integrations
from jax_softmax2p import native as native
from jax_softmax2p.attention import dot_product_attention as dot_product_attention
from jax_softmax2p.explain import Explanation as Explanation
from jax_softmax2p.explain import explain as explain
from jax_softmax2p.integrations import patch_jax_nn as patch_jax_nn
from jax_softmax2p.linear import linear_softmax_cross_entropy as linear_softmax_cross_entropy
from jax_softmax2p.linear import logsumexp_of_products as logsumexp_of_products
from jax_softmax2p.losses import softmax_cross_entropy as softmax_cross_entropy
from jax_softmax2p.losses import (
    softmax_cross_entropy_with_integer_labels as softmax_cross_entropy_with_integer_labels,
)
from jax_softmax2p.memory import keep_memory as keep_memory
from jax_softmax2p.native import export_disabled_checks as export_disabled_checks
from jax_softmax2p.ops import log_softmax as log_softmax
from jax_softmax2p.ops import logsumexp as logsumexp
from jax_softmax2p.ops import softmax as softmax
from jax_softmax2p.primitives.operands import Band as Band
from jax_softmax2p.sum_exp import SumExp as SumExp
from jax_softmax2p.sum_exp import sum_exp as sum_exp

__version__ = _version("jax_softmax2p")

__all__ = [
    "Band",
    "Explanation",
    "SumExp",
    "__version__",
    "dot_product_attention",
    "explain",
    "export_disabled_checks",
    "integrations",
    "keep_memory",
    "linear_softmax_cross_entropy",
    "log_softmax",
    "logsumexp",
    "logsumexp_of_products",
    "native",
    "patch_jax_nn",
    "softmax",
    "softmax_cross_entropy",
    "softmax_cross_entropy_with_integer_labels",
    "sum_exp",
]
