"""Skips tests of what other libraries' versions, or the platform that JAX runs on, lack, with the reason."""

import jax
import pytest
from packaging.version import Version


def has(module, version):
    return Version(module.__version__) >= Version(version)


def since(module, version, what):
    """The mark of a test that needs a feature which a library has since a version."""
    return pytest.mark.skipif(
        not has(module, version), reason=f"{module.__name__} has {what} since {version}"
    )


cpu_only = pytest.mark.skipif(jax.default_backend() != "cpu", reason="JAX runs on another platform than CPUs")
"""The mark of a test of what the reference does only in place of native kernels."""
