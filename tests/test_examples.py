"""The scripts of docs/examples, run with few steps."""

import importlib.util
import os
import runpy
import subprocess
import sys

import flax
import jax
import numpy as np
import pytest
from processes import ROOT
from versions import since

pytestmark = pytest.mark.long

FOLDER = ROOT / "docs" / "examples"


def run_example(name, size):
    """What the main function of an example returns, in JAX's default of 32 bits."""
    with jax.enable_x64(False):
        return runpy.run_path(str(FOLDER / f"{name}.py"))["main"](size)


def needs(library):
    """The mark of a test of an example that imports a library which only the extra "docs" brings."""
    return pytest.mark.skipif(
        importlib.util.find_spec(library) is None, reason=f"{library} is missing: pip install '.[docs]'"
    )


@since(flax, "0.12.2", "is_causal of nnx's layers")
def test_attention_flax():
    losses = run_example("attention_flax", 100)
    assert losses[-1] < np.log(17) - 0.3 < 3 < losses[0]


def test_language_model(capsys):
    losses = run_example("language_model", 3)
    assert losses[-1] < losses[0]
    stored, linear = (int(line.split()[1]) for line in capsys.readouterr().out.splitlines()[1:3])
    assert linear < stored / 2


@needs("numpyro")
def test_mixture_numpyro():
    centres, calls = run_example("mixture_numpyro", 400)
    np.testing.assert_allclose(centres, [-4, 0, 3], atol=0.1)
    assert calls.computed["jax.nn.logsumexp"]
    assert not calls.fallbacks


def test_sinkhorn():
    error, value = run_example("sinkhorn", 200)
    assert error < 1e-3
    assert 6 < value < 10


def test_distillation():
    losses, agreement = run_example("distillation", 40)
    assert losses[-1] < losses[0]
    assert agreement > 0.3


def test_streaming_logsumexp():
    estimate, exact = run_example("streaming_logsumexp", 10)
    assert abs(estimate - exact) < 0.02


def test_vocab_parallel():
    """In a process of its own, which it gives four devices."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    result = subprocess.run(
        [sys.executable, "-W", "error", FOLDER / "vocab_parallel.py", "--steps", "11"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    devices, first, last = result.stdout.splitlines()
    assert devices.startswith("4 devices, 5000 of 20000 classes")
    assert float(last.split()[-1]) < 0.1 < 9 < float(first.split()[-1])
