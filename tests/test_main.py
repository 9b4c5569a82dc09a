"""The demonstration: ``python -m jax_softmax2p``."""

import json
import subprocess
import sys

import pytest
from processes import ROOT

from jax_softmax2p import native


def run(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "jax_softmax2p", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.long  # .ci/run runs the program itself.
def test_json(tmp_path):
    result = run("--json", "--steps", "3", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["environment"]["runs"] == "native kernels"
    assert native.active_isa() in report["environment"]["instruction set"]
    assert report["training"]["agree"]
    assert len(report["training"]["jax.nn"]["losses"]) == 3
    assert all(row["ulp"]["ours"] <= 2 for row in report["shapes"])
    kept = report["keep_memory"]
    if kept["keeps"]:
        assert kept["kept"]["peak_bytes"] > kept["default"]["peak_bytes"] > 2**26
        assert kept["kept"]["seconds"].keys() == kept["default"]["seconds"].keys() == {"x + 1", "softmax"}


def test_root_of_the_checkout():
    """A checkout in the current folder does not hide the installed library."""
    program = "from jax_softmax2p import native; print(native.unavailable_reason())"
    command = [sys.executable, "-W", "error", "-c", program]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stdout) == (0, "None\n"), result.stderr


def test_bad_steps(tmp_path):
    result = run("--steps", "0", cwd=tmp_path)
    assert result.returncode == 2
    assert "--steps must be at least 2, got 0" in result.stderr
