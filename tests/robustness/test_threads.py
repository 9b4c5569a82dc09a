"""Concurrent calls from many threads, calls from callbacks, and processes that fork.

As a program it calls from 64 threads for a number of seconds and prints the number of calls:
``NPROC=5 python tests/robustness/test_threads.py 600``. XLA takes the size of its thread pools from NPROC.
"""

import contextlib
import faulthandler
import os
import pathlib
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_softmax2p import native, softmax

SHAPES = [(3, 5), (128, 1024), (1, 200_000), (40, 40_000), (7, 1, 33), (2000, 3)]
TIMEOUT = 120  # Seconds, so many that only a deadlock exceeds them.


def run_in_threads(count, work):
    failures = []

    def guarded(index):
        try:
            work(index)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(i,), daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + TIMEOUT
    for thread in threads:
        thread.join(max(0, deadline - time.monotonic()))
    if any(thread.is_alive() for thread in threads):
        faulthandler.dump_traceback(all_threads=True)
        pytest.fail("deadlock: the stacks are above")
    assert not failures, failures


def test_eight_threads_calling_at_once():
    def loss(x):
        return jnp.sum(softmax(x) * x)

    inputs = [jnp.asarray(np.random.default_rng(0).standard_normal(s), jnp.float32) for s in SHAPES]
    expected = [(softmax(x), jax.grad(loss)(x)) for x in inputs]
    jitted = jax.jit(lambda x: (softmax(x), jax.grad(loss)(x)))

    def work(index):
        for step in range(24):
            k = (index + step) % len(inputs)
            for actual, wanted in zip(jitted(inputs[k]), expected[k], strict=True):
                np.testing.assert_allclose(actual, wanted, rtol=1e-6, atol=1e-9)
            np.testing.assert_array_equal(softmax(inputs[k]), expected[k][0])

    run_in_threads(8, work)


def test_threads_that_compile_at_once():
    def work(index):
        for n in range(1, 5):
            x = np.ones((index + 1, n * 4099), np.float32)
            y = jax.jit(lambda x: softmax(x, 0) + softmax(x))(x)
            np.testing.assert_allclose(y, 1 / (index + 1) + 1 / (n * 4099), rtol=1e-6)

    run_in_threads(8, work)


def test_several_large_calls_in_one_program():
    """The calls run concurrently on XLA's threads, and each requests helpers from the same pool."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((8, 100_000)), jnp.float32)

    @jax.jit
    def f(x):
        return jnp.stack([softmax(jnp.roll(x, i, 0)) for i in range(8)])

    def work(_):
        for _ in range(5):
            assert f(x).shape == (8, 8, 100_000)

    run_in_threads(4, work)
    np.testing.assert_array_equal(f(x)[3], softmax(jnp.roll(x, 3, 0)))


def test_calls_from_inside_callbacks():
    def host(x):
        return np.asarray(softmax(np.asarray(x)))

    @jax.jit
    def f(x):
        y = jax.pure_callback(host, jax.ShapeDtypeStruct(x.shape, x.dtype), x)
        return softmax(y) + softmax(x)

    def work(_):
        x = jnp.ones((64, 2048), jnp.float32)
        np.testing.assert_allclose(f(x), 2 / 2048, rtol=1e-6)

    run_in_threads(16, work)


def single_threaded_softmax(x):
    y = np.empty_like(x)
    native.softmax_into(x, y)
    return y


def call_from_64_threads(seconds):
    """Calls mixed sizes on every device, while every eighth thread compiles; returns the number of calls."""
    inputs = [np.random.default_rng(0).standard_normal(shape).astype(np.float32) for shape in SHAPES]
    expected = [single_threaded_softmax(x) for x in inputs]
    on_device = [[jax.device_put(x, device) for x in inputs] for device in jax.devices()]
    jitted = jax.jit(softmax)
    end = time.monotonic() + seconds
    calls = [0] * 64

    def work(index):
        operands = on_device[index % len(on_device)]
        while time.monotonic() < end or calls[index] == 0:
            k = (index + calls[index]) % len(inputs)
            # JAX compiles a new function, even if its code is the same.
            function = jitted if index % 8 else jax.jit(lambda x: softmax(x))
            np.testing.assert_array_equal(function(operands[k]), expected[k])
            calls[index] += 1

    run_in_threads(64, work)
    return sum(calls)


def test_64_threads_while_some_compile():
    call_from_64_threads(seconds=2)


@pytest.mark.skipif("JAX_SOFTMAX2P_ISA" in os.environ, reason="pools are the same for every instruction set")
@pytest.mark.long(pool=5)
@pytest.mark.parametrize(("pool", "devices"), [(1, 1), (5, 1), (64, 1), (2, 8)])
def test_thread_pool_sizes(pool, devices):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    result = subprocess.run(
        [sys.executable, __file__, "1"],
        env={**os.environ, "NPROC": str(pool), "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=2 * TIMEOUT,
    )
    assert result.returncode == 0, result.stderr
    # XLA has at least one thread for each device.
    assert f"on {devices} devices with {max(pool, devices)} threads" in result.stdout


def thread_names():
    for task in pathlib.Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # The thread may have ended.
            yield (task / "comm").read_text()


def main():
    calls = call_from_64_threads(float(sys.argv[1]))
    pool = sum("Eigen" in name for name in thread_names())
    print(f"{calls} calls on {jax.device_count()} devices with {pool} threads: the same bits always")


FORK = """
import multiprocessing, os, threading, warnings
import jax, numpy as np
from jax_softmax2p import native, softmax

x = np.random.default_rng(0).standard_normal((64, 20_000)).astype(np.float32)

def kernel(threads):
    y = np.empty_like(x)
    native.softmax_into(x, y, threads=threads)
    return y

def forked(work):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        child = multiprocessing.get_context("fork").Process(target=work)
        child.start()
        child.join(60)
    assert child.exitcode == 0, ("killed" if child.is_alive() else child.exitcode, child.kill())
    return [str(warning.message) for warning in caught]

def jitted_call():
    assert (np.asarray(jax.jit(softmax)(x)) == expected).all()

def kernels():
    for threads in (1, 4):
        assert (kernel(threads) == expected).all()

expected = kernel(4)
forked(jitted_call)
jitted_call()
busy = threading.Thread(target=lambda: [kernel(4) for _ in range(50)])
busy.start()
for _ in range(10):
    assert any("os.fork() is incompatible with multithreaded code" in words for words in forked(kernels))
busy.join()
"""


@pytest.mark.skipif("JAX_SOFTMAX2P_ISA" in os.environ, reason="a fork is the same for every instruction set")
def test_fork():
    """A child can call JAX if its parent has not, and the kernels on NumPy arrays in any case.

    docs/limits.md says so. XLA's threads do not exist in the child, so that whatever waits for them, jax.nn's
    softmax included, waits forever. JAX warns of that.
    """
    command = [sys.executable, "-W", "error", "-c", FORK]
    result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    assert result.returncode == 0, result.stderr


if __name__ == "__main__":
    main()
