"""CONTRIBUTING.md and docs/how_it_works.md name files that exist, and the walks functions in them."""

import re
import subprocess

import pytest
from processes import ROOT

TEXT = "".join(
    (ROOT / name).read_text(encoding="utf-8") for name in ("CONTRIBUTING.md", "docs/how_it_works.md")
)

PATHS = sorted(set(re.findall(r"`([\w./*]+\.(?:py|cc|h|toml|md|txt))`", TEXT)))

STEPS = re.findall(r"^\d+\. `([^`]+)`:[^`]*`([^`]+)`", TEXT, re.MULTILINE)


def test_there_are_walks():
    assert len(PATHS) > 50
    assert len(STEPS) >= 28


@pytest.mark.parametrize("path", PATHS)
def test_paths_exist(path):
    """A path from the root, or of a folder that the text has just named."""
    assert "NAME" in path or any(ROOT.glob(path)) or any(ROOT.glob(f"*/**/{path}"))


@pytest.mark.parametrize(("path", "name"), STEPS)
def test_steps_of_the_walks(path, name):
    text = (ROOT / path).read_text(encoding="utf-8")
    assert all(re.search(rf"\b{part}\b", text) for part in name.split("::"))


def test_checklist_of_instruction_sets_is_complete():
    """Every file that names an instruction set other than the portable one stands in its checklist."""
    command = ["git", "grep", "-lwE", "avx512|avx2|neon", "--", "*.py", "*.cc", "*.h", "*.txt", "*.toml"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        pytest.skip("needs a git checkout")
    checklist = TEXT.split("### An instruction set")[1].split("### A primitive")[0]
    # The target_clones of the oracle, and results made up for the tests of the benchmarks.
    others = {"tests/selftest/selftest.cc", "tests/test_benchmarks.py", "tests/test_contributing.py"}
    named = {re.sub(r"(avx512|avx2|neon)\.", "NAME.", path) for path in found.stdout.split()} - others
    assert {
        path for path in named if path not in checklist and path.rpartition("/")[2] not in checklist
    } == set()
