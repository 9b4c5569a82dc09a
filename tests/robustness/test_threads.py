"""Many threads calling at once, and threads that call from strange places."""

import threading

import jax
import jax.numpy as jnp
import numpy as np

from jax_softmax2p import softmax

SHAPES = [(3, 5), (128, 1024), (1, 200_000), (40, 40_000), (7, 1, 33), (2000, 3)]
TIMEOUT = 120  # seconds: a deadlock, not slowness


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
    for thread in threads:
        thread.join(TIMEOUT)
    assert not any(thread.is_alive() for thread in threads), "deadlock"
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
        for n in range(1, 8):
            x = jnp.ones((index + 1, n * 4099), jnp.float32)
            y = jax.jit(lambda x: softmax(x, 0) + softmax(x))(x)
            np.testing.assert_allclose(y, 1 / (index + 1) + 1 / (n * 4099), rtol=1e-6)

    run_in_threads(8, work)


def test_several_large_calls_in_one_program():
    """They run at the same time on XLA's own threads, and each asks the pool for helpers."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((8, 100_000)), jnp.float32)

    @jax.jit
    def f(x):
        return jnp.stack([softmax(jnp.roll(x, i, 0)) for i in range(8)])

    def work(_):
        for _ in range(5):
            assert f(x).shape == (8, 8, 100_000)

    run_in_threads(4, work)
    np.testing.assert_array_equal(f(x)[3], softmax(jnp.roll(x, 3, 0)))


def test_call_from_inside_a_callback():
    def host(x):
        return np.asarray(softmax(np.asarray(x)))

    @jax.jit
    def f(x):
        y = jax.pure_callback(host, jax.ShapeDtypeStruct(x.shape, x.dtype), x)
        return softmax(y) + softmax(x)

    def work(_):
        x = jnp.ones((64, 2048), jnp.float32)
        np.testing.assert_allclose(f(x), 2 / 2048, rtol=1e-6)

    run_in_threads(1, work)
