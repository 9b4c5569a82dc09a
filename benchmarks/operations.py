"""What is computed in jit: an entry for each operation, as each library writes it."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jax_softmax2p
from benchmarks.cases import Case

Function = Callable[..., Any]

SCALE = 0.125
"""Of masked softmax: that of attention with heads of 64."""


class Operation(NamedTuple):
    """An operation.

    Attributes:
      operands: what it takes beside x, from the case.
      ours: the function of x and the operands, from the case's axis.
      jax_nn: the same with JAX's own functions, or optax's.
      torch: the same on tensors.
    """

    operands: Callable[[Case], Sequence[np.ndarray]]
    ours: Callable[[int], Function]
    jax_nn: Callable[[int], Function]
    torch: Callable[[int], Function]


def _nothing(case: Case) -> Sequence[np.ndarray]:
    return ()


def _cotangent(case: Case) -> Sequence[np.ndarray]:
    return (np.random.default_rng(1).standard_normal(case.shape, np.float32).astype(case.dtype),)


def _labels(case: Case) -> Sequence[np.ndarray]:
    return (np.random.default_rng(1).integers(case.shape[-1], size=case.shape[:-1], dtype=np.int32),)


def _bias_and_mask(case: Case) -> Sequence[np.ndarray]:
    shape = (case.shape[0], *(1 for _ in case.shape[1:-1]), case.shape[-1])
    rng = np.random.default_rng(1)
    return rng.standard_normal(shape, np.float32).astype(case.dtype), rng.random(shape) < 0.8


def _vjp_of(softmax: Callable[..., jax.Array]) -> Callable[[int], Function]:
    return lambda axis: lambda x, t: jax.vjp(lambda x: softmax(x, axis=axis), x)[1](t)[0]


def _loss_of(cross_entropy: Callable[..., jax.Array]) -> Callable[[int], Function]:
    return lambda axis: jax.value_and_grad(lambda x, labels: cross_entropy(x, labels, axis=axis).mean())


def _optax_loss(x, labels, axis):
    optax = importlib.import_module("optax")
    return optax.softmax_cross_entropy_with_integer_labels(x, labels, axis=axis)


def _torch() -> Any:
    return importlib.import_module("torch")


def _torch_vjp(axis: int) -> Function:
    def call(x, t):
        x = x.detach().requires_grad_()
        _torch().softmax(x, axis).backward(t)
        return x.grad

    return call


def _torch_loss(axis: int) -> Function:
    def call(x, labels):
        x = x.detach().requires_grad_()
        loss = _torch().nn.functional.cross_entropy(x, labels.long())
        loss.backward()
        return loss.detach(), x.grad

    return call


def _torch_masked(axis: int) -> Function:
    return lambda x, bias, mask: _torch().softmax((x * SCALE + bias).masked_fill(~mask, -jnp.inf), axis)


def _key_and_value(case: Case) -> Sequence[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.standard_normal(case.shape, np.float32).astype(case.dtype) for _ in range(2)]


def _attention(causal: bool, gradient: bool) -> Operation:
    """Attention of a query of shape (B, T, N, H), or its gradient in query, key and value."""

    def of(attention: Function) -> Callable[[int], Function]:
        function = lambda q, k, v: attention(q, k, v, is_causal=causal)
        loss = lambda *operands: jnp.sum(jnp.sin(function(*operands)))
        return lambda axis: jax.grad(loss, (0, 1, 2)) if gradient else function

    def of_torch(axis: int) -> Function:
        def forward(*operands):
            heads_first = (x.transpose(1, 2) for x in operands)
            attention = _torch().nn.functional.scaled_dot_product_attention
            return attention(*heads_first, is_causal=causal).transpose(1, 2)

        def backward(*operands):
            leaves = [x.detach().requires_grad_() for x in operands]
            forward(*leaves).sin().sum().backward()
            return tuple(x.grad for x in leaves)

        return backward if gradient else lambda *operands: forward(*operands).contiguous()

    return Operation(
        _key_and_value, of(jax_softmax2p.dot_product_attention), of(jax.nn.dot_product_attention), of_torch
    )


OPERATIONS = {
    "softmax": Operation(
        _nothing,
        lambda axis: lambda x: jax_softmax2p.softmax(x, axis),
        lambda axis: lambda x: jax.nn.softmax(x, axis),
        lambda axis: lambda x: _torch().softmax(x, axis),
    ),
    "logsumexp": Operation(
        _nothing,
        lambda axis: lambda x: jax_softmax2p.logsumexp(x, axis),
        lambda axis: lambda x: jax.nn.logsumexp(x, axis),
        lambda axis: lambda x: _torch().logsumexp(x, axis),
    ),
    "softmax and VJP": Operation(
        _cotangent, _vjp_of(jax_softmax2p.softmax), _vjp_of(jax.nn.softmax), _torch_vjp
    ),
    "cross-entropy and gradient": Operation(
        _labels,
        _loss_of(jax_softmax2p.softmax_cross_entropy_with_integer_labels),
        _loss_of(_optax_loss),
        _torch_loss,
    ),
    "masked softmax": Operation(
        _bias_and_mask,
        lambda axis: lambda x, bias, mask: jax_softmax2p.softmax(x, axis, mask, scale=SCALE, bias=bias),
        lambda axis: lambda x, bias, mask: jax.nn.softmax(x * SCALE + bias, axis, mask),
        _torch_masked,
    ),
    "attention": _attention(causal=False, gradient=False),
    "causal attention": _attention(causal=True, gradient=False),
    "gradient of attention": _attention(causal=False, gradient=True),
    "gradient of causal attention": _attention(causal=True, gradient=True),
}
"""By the name that a case gives."""

GRADIENTS = {
    "softmax and VJP",
    "cross-entropy and gradient",
    "gradient of attention",
    "gradient of causal attention",
}
"""Those that differentiate."""
