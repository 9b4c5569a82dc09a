"""The main job: ``python -m jax_softmax2p``."""

import json
import pathlib
import subprocess
import sys

import pytest

from jax_softmax2p import native

ROOT = pathlib.Path(__file__).parent.parent


def run(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "jax_softmax2p", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("place", ["root of the checkout", "elsewhere"])
def test_json(place, tmp_path):
    """Where the package's sources lie beside the caller, they must not hide the installed library."""
    result = run("--json", "--steps", "3", cwd=ROOT if place == "root of the checkout" else tmp_path)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["environment"]["runs"] == "native kernels"
    assert native.active_isa() in report["environment"]["instruction set"]
    assert report["training"]["agree"]
    assert len(report["training"]["jax.nn"]["losses"]) == 3
    assert all(row["ulp"]["ours"] <= 2 for row in report["shapes"])


def test_bad_steps(tmp_path):
    result = run("--steps", "0", cwd=tmp_path)
    assert result.returncode == 2
    assert "--steps must be at least 2, got 0" in result.stderr
