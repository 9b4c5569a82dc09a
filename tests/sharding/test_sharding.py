"""Runs the tests of this folder that need several devices, in processes with eight."""

import pathlib

import pytest
from comparison import QUICK_COMPILATION
from processes import run_pytest

HERE = pathlib.Path(__file__).parent


@pytest.mark.parametrize(
    "name", ["sharded_batch.py", "sharded_axis.py", "sharded_labels.py", "sharded_linear.py"]
)
def test_on_eight_devices(name):
    flags = {"xla_force_host_platform_device_count": 8}
    # Without optimisation, XLA's exponential is off by more ULP than near certainty allows.
    if name != "sharded_labels.py":
        flags |= QUICK_COMPILATION
    run_pytest(HERE / name, timeout=600, XLA_FLAGS=" ".join(f"--{flag}={x}" for flag, x in flags.items()))
