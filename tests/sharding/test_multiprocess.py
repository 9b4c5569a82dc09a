"""A training step in several processes, each with a shard of the classes, and the death of one of them."""

import subprocess
import time

import pytest

from benchmarks.vocab_parallel import Problem, in_processes, start_processes

TIMEOUT = 240  # Seconds, so many that only a deadlock exceeds them.


@pytest.mark.parametrize("count", [2, 4])
def test_step_matches_float64(count):
    """The last process has fewer classes. There is one all-gather, and one all-reduce for the inputs."""
    figures = in_processes(count, Problem(features=4, batch=8), rounds=0, timeout=TIMEOUT)
    assert figures["processes"] == figures["devices"] == count
    ours = figures["ours"]
    assert [kind for kind, _ in ours["collectives"]] == ["all-gather", "all-reduce"]
    assert ours["error of the loss"] <= 4e-6  # 4 ULP of a loss of at least 8.
    assert max(ours["errors of gradients"]) <= 16  # Most of the error is the matrix products'.


def test_killed_process_ends_the_others_with_an_error(tmp_path):
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
        # JAX terminates a process that cannot go on, or the step raises; the log has an error in both cases.
        assert all("rror" in (tmp_path / f"{rank}.log").read_text(errors="replace") for rank in (0, 2))
    except subprocess.TimeoutExpired:
        pytest.fail("a process waits for one that is dead")
    finally:
        for process in processes:
            process.kill()
            process.wait()
