"""The examples in the docstrings, run as users would: with JAX's default of 32 bits."""

import doctest

import flax
import jax
import pytest
from versions import has

from jax_softmax2p import losses, ops, sum_exp
from jax_softmax2p.attention import api
from jax_softmax2p.integrations import equinox_models, flax_hook, jax_patch
from jax_softmax2p.native import library, measurement, numpy_kernels
from jax_softmax2p.primitives import operands

# The package's attribute is the function, which hides its module.
MODULES = [
    api,
    equinox_models,
    flax_hook,
    jax_patch,
    losses,
    library,
    measurement,
    numpy_kernels,
    operands,
    ops,
    __import__("sys").modules[sum_exp.__module__],
]

EXAMPLES = {
    f"{test.name}": test
    for module in MODULES
    for test in doctest.DocTestFinder(exclude_empty=True).find(module)
    if test.examples
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name):
    if name.endswith("flax_attention") and not has(flax, "0.12.2"):
        # The example passes an argument that an older flax does not know.
        pytest.skip("layers of nnx take is_causal since flax 0.12.2")
    report = []
    with jax.enable_x64(False):
        failed, tried = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(
            EXAMPLES[name], out=report.append, clear_globs=False
        )
    assert tried
    assert not failed, "".join(report)


@pytest.mark.parametrize(
    "function",
    [
        "attention.api.dot_product_attention",
        "integrations.flax_hook.flax_attention",
        "integrations.jax_patch.patch_jax_nn",
        "integrations.equinox_models.replace_equinox_attention",
        "losses.softmax_cross_entropy",
        "losses.softmax_cross_entropy_with_integer_labels",
        "ops.log_softmax",
        "ops.logsumexp",
        "ops.softmax",
        "primitives.operands.Band",
        "sum_exp.sum_exp",
    ],
)
def test_every_public_function_has_an_example(function):
    assert f"jax_softmax2p.{function}" in EXAMPLES
