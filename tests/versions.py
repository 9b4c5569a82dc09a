"""What older versions of other libraries lack: tests that need it are skipped there, and say so."""

import pytest
from packaging.version import Version


def has(module, version):
    return Version(module.__version__) >= Version(version)


def since(module, version, what):
    """The mark of a test that needs what a library has since a version."""
    return pytest.mark.skipif(
        not has(module, version), reason=f"{module.__name__} has {what} since {version}"
    )
