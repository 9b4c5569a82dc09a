import sys

import hypothesis
import jax
import processes
import pytest
import turns

from jax_softmax2p import native

# The tests import the benchmarks. The path comes last, since the package's sources lie in the same folder.
sys.path.append(str(processes.ROOT))

# float64 needs it, and it does not change float32.
jax.config.update("jax_enable_x64", True)

# GPUs would round what they multiply to 11 bits.
if jax.default_backend() != "cpu":
    jax.config.update("jax_default_matmul_precision", "highest")

# Every run is the same and writes no file. --hypothesis-profile=long searches more widely.
hypothesis.settings.register_profile(
    "deterministic", max_examples=100, derandomize=True, database=None, deadline=None
)
hypothesis.settings.register_profile("long", max_examples=20_000, database=None, deadline=None)
hypothesis.settings.load_profile("deterministic")


def pytest_collection_modifyitems(config, items):
    items[:], left = turns.of_this_run(items)
    config.hook.pytest_deselected(items=left)


@pytest.fixture(params=["native", "reference"])
def implementation(request):
    return request.param


@pytest.fixture(params=native.supported_isas())
def isa(request):
    return request.param


@pytest.fixture(params=native.ALGORITHMS)
def algorithm(request):
    return request.param
