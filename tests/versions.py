"""Skips tests of features that older versions of other libraries lack, with the reason."""

import pytest
from packaging.version import Version


def has(module, version):
    return Version(module.__version__) >= Version(version)


def since(module, version, what):
    """The mark of a test that needs a feature which a library has since a version."""
    return pytest.mark.skipif(
        not has(module, version), reason=f"{module.__name__} has {what} since {version}"
    )
