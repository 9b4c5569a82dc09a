"""Fast, accurate softmax for JAX on CPUs, by the two-pass algorithm (arXiv 2001.04438)."""

from importlib.metadata import version as _version
from pkgutil import extend_path as _extend_path

# In the root of a checkout Python finds this folder before the installed one. The compiled library is in
# the installed one.
__path__ = _extend_path(__path__, __name__)

from jax_softmax2p import native as native
from jax_softmax2p.native import export_disabled_checks as export_disabled_checks
from jax_softmax2p.ops import softmax as softmax

__version__ = _version("jax_softmax2p")

__all__ = ["__version__", "export_disabled_checks", "native", "softmax"]
