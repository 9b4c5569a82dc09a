"""Several processes, each with a part of the classes: a step of training, and what a death does to it."""

import subprocess
import time

import pytest

from benchmarks.vocab_parallel import Problem, in_processes, start_processes

TIMEOUT = 240  # seconds: a deadlock, not slowness


@pytest.mark.parametrize("count", [2, 4])
def test_a_step_equals_that_of_float64(count):
    """The last process has fewer classes than the others. One all-gather, and one sum for the inputs."""
    figures = in_processes(count, Problem(features=4, batch=8), rounds=0, timeout=TIMEOUT)
    assert figures["processes"] == figures["devices"] == count
    ours = figures["ours"]
    assert [kind for kind, _ in ours["collectives"]] == ["all-gather", "all-reduce"]
    assert ours["error of the loss"] <= 4e-6  # 4 ULP of a loss from 8 on.
    assert max(ours["errors of gradients"]) <= 16  # Of which those of the matrix products are most.


def test_when_a_process_is_killed_the_others_end_with_an_error(tmp_path):
    problem = Problem(classes=1003, features=4, batch=8)
    processes = start_processes(3, problem, rounds=10**9, folder=str(tmp_path))
    try:
        deadline = time.monotonic() + TIMEOUT
        while not (tmp_path / "started").exists():
            assert all(process.poll() is None for process in processes), "ended before it was killed"
            assert time.monotonic() < deadline
            time.sleep(0.1)
        processes[1].kill()
        for process in processes[::2]:
            assert process.wait(TIMEOUT) != 0
        # JAX ends the process that cannot go on, or the step raises: either way it says so.
        assert all("rror" in (tmp_path / f"{rank}.log").read_text(errors="replace") for rank in (0, 2))
    except subprocess.TimeoutExpired:
        pytest.fail("a process waits for one that is dead")
    finally:
        for process in processes:
            process.kill()
            process.wait()
