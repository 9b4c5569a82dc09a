import jax
import pytest

from jax_softmax2p import native

# float64 needs it, float32 does not mind.
jax.config.update("jax_enable_x64", True)


@pytest.fixture(params=["native", "reference"])
def implementation(request):
    return request.param


@pytest.fixture(params=native.supported_isas())
def isa(request):
    return request.param


@pytest.fixture(params=native.ALGORITHMS)
def algorithm(request):
    return request.param
