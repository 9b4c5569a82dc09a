"""What a program is, and how one is traced: as it is written, patched, or with this package's losses."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np

import jax_softmax2p

Function = Callable[..., Any]
Build = Callable[[tuple[int, ...], np.random.Generator], tuple[Function, tuple[Any, ...]]]


class Program(NamedTuple):
    """A workload of a few lines, written for jax.nn and optax.

    Its functions look up ``jax.nn.softmax`` and the like when they are traced, as users' code does, so that
    patching reaches them, and take their dtype from their arguments.

    Attributes:
      build: makes the function and its arguments, pytrees of NumPy arrays, for a shape, of which the
        builder's docstring says what it means. Every call returns a new function: JAX caches traces by
        function, and an old one may have been traced otherwise.
      shapes: the sizes that are measured.
      small_shape: the size that tests run.
      differentiates: whether the value and the gradient with respect to the first argument are computed,
        rather than the value alone.
      tolerance: the largest accepted error of a float32 result against float64, relative to the result's
        largest entry.
      has_our_losses: whether it calls losses of optax that this package has as well.
    """

    build: Build
    shapes: tuple[tuple[int, ...], ...]
    small_shape: tuple[int, ...]
    differentiates: bool = False
    tolerance: float = 2e-6
    has_our_losses: bool = False

    def instantiate(
        self, shape: tuple[int, ...], dtype: str = "float32", seed: int = 0
    ) -> tuple[Function, tuple[Any, ...]]:
        """A new function that returns a tuple of arrays, and its arguments, on the device, of a dtype."""
        function, arguments = self.build(shape, np.random.default_rng(seed))
        if self.differentiates:
            function = jax.value_and_grad(function)

        def flat(*arguments):
            return tuple(jax.tree.leaves(function(*arguments)))

        def on_device(x: np.ndarray) -> jax.Array:
            return jax.device_put(x.astype(dtype) if np.issubdtype(x.dtype, np.floating) else x)

        return flat, jax.tree.map(on_device, arguments)


def with_gradient(name: str, program: Program) -> dict[str, Program]:
    """Two entries: the program, and what differentiates it."""
    return {name: program, f"gradient of {name}": program._replace(differentiates=True)}


@contextlib.contextmanager
def our_losses() -> Iterator[None]:
    """Patches jax.nn, and puts this package's losses in place of optax's, as a user would import them."""
    import optax

    losses: dict[str, Any] = {
        loss.__name__: loss
        for loss in (
            jax_softmax2p.softmax_cross_entropy,
            jax_softmax2p.softmax_cross_entropy_with_integer_labels,
        )
    }
    with jax_softmax2p.patch_jax_nn(), mock.patch.multiple(optax, **losses):
        yield


TRACINGS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "jax.nn": contextlib.nullcontext,
    "patched": lambda: jax_softmax2p.patch_jax_nn(),
    "our losses": our_losses,
}
"""The contexts in which a program is traced, by name."""


def compiled(function: Function, arguments: tuple[Any, ...], tracing: str) -> jax.stages.Compiled:
    """The program, traced as one of :data:`TRACINGS` says."""
    with TRACINGS[tracing]():
        return jax.jit(function).lower(*arguments).compile()


def temporary_bytes(executable: jax.stages.Compiled) -> int | None:
    """Memory that it needs beside arguments and results, as XLA plans it; None where XLA does not tell.

    What a fusion or a custom call allocates for itself while it runs is not part of it.
    """
    analysis = executable.memory_analysis()
    return None if analysis is None else analysis.temp_size_in_bytes


def normal(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> np.ndarray:
    """Numbers that are normally distributed, in float32."""
    return rng.standard_normal(shape, np.float32) * np.float32(scale)


def matrix(rng: np.random.Generator, inputs: int, *outputs: int) -> np.ndarray:
    """A layer's weights, scaled so that its outputs are as large as its inputs."""
    return normal(rng, inputs, *outputs, scale=inputs**-0.5)


def integers(rng: np.random.Generator, below: int, *shape: int) -> np.ndarray:
    """Classes, tokens or places."""
    return rng.integers(below, size=shape, dtype=np.int32)
