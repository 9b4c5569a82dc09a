"""The operations that are timed inside jit, as each library writes them: one entry for each.

Worker processes import this module, with an older revision of jax_softmax2p under ``--compare REVISION``: it
uses public names of that package only, and those when an operation is used.
"""

import functools
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
"""The scale of masked softmax, which is that of attention with heads of size 64."""


class Operation(NamedTuple):
    """An operation in every library. All functions of a library take x and the operands.

    Attributes:
      operands: makes the operands beside x from the case.
      ours: makes this package's function from the axis.
      jax_nn: makes the function of JAX or optax.
      torch: makes the function of tensors, where torch is a peer.
      scipy: makes the function of NumPy arrays, where SciPy has one.
      onnx: makes ONNX nodes from ``onnx.helper.make_node`` and the case, where ONNX has the operation. Their
        input is "x", or "x", "operand 0" and so on; their output is "y".
      multiply_adds: how many the operation's matrix products have, from the case.
    """

    operands: Callable[[Case], Sequence[np.ndarray]]
    ours: Callable[[int], Function]
    jax_nn: Callable[[int], Function]
    torch: Callable[[int], Function] | None = None
    scipy: Callable[[int], Function] | None = None
    onnx: Callable[[Function, Case], Sequence[Any]] | None = None
    multiply_adds: Callable[[Case], int] | None = None


def _with_common_name(name: str, onnx: Callable[[Function, Case], Sequence[Any]]) -> Operation:
    """An operation of x along an axis, which has the same name in all libraries but ONNX."""
    of = lambda library: lambda axis: lambda x: getattr(library(), name)(x, axis)
    return Operation(
        _no_operands, of(lambda: jax_softmax2p), of(lambda: jax.nn), of(_torch), of(_scipy), onnx
    )


def _no_operands(case: Case) -> Sequence[np.ndarray]:
    return ()


def _cotangent(case: Case) -> Sequence[np.ndarray]:
    return (np.random.default_rng(1).standard_normal(case.shape, np.float32).astype(case.dtype),)


def _labels(case: Case) -> Sequence[np.ndarray]:
    return (np.random.default_rng(1).integers(case.shape[-1], size=case.shape[:-1], dtype=np.int32),)


def _bias_and_mask(case: Case) -> Sequence[np.ndarray]:
    shape = (case.shape[0], *(1 for _ in case.shape[1:-1]), case.shape[-1])
    rng = np.random.default_rng(1)
    return rng.standard_normal(shape, np.float32).astype(case.dtype), rng.random(shape) < 0.8


def _softmax_vjp(library: Callable[[], Any]) -> Callable[[int], Function]:
    return lambda axis: lambda x, t: jax.vjp(lambda x: library().softmax(x, axis=axis), x)[1](t)[0]


def _scipy() -> Any:
    return importlib.import_module("scipy.special")


def _scipy_loss(axis: int) -> Function:
    def call(x, labels):
        chosen = np.take_along_axis(x, labels[..., None], axis)[..., 0]
        return (_scipy().logsumexp(x, axis) - chosen).mean()

    return call


def _scipy_attention(q, k, v):
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    scores = _scipy().softmax(q @ k.swapaxes(2, 3) * np.float32(q.shape[-1] ** -0.5), -1)
    return np.ascontiguousarray((scores @ v).swapaxes(1, 2))


def _onnx_attention(node: Function, case: Case) -> Sequence[Any]:
    scale = np.float32(case.shape[-1] ** -0.5)
    return [
        node("Transpose", ["x"], ["q"], perm=[0, 2, 1, 3]),
        node("Transpose", ["operand 0"], ["k"], perm=[0, 2, 3, 1]),
        node("Transpose", ["operand 1"], ["v"], perm=[0, 2, 1, 3]),
        node("Constant", [], ["scale"], value_float=scale),
        node("Mul", ["q", "scale"], ["scaled q"]),
        node("MatMul", ["scaled q", "k"], ["logits"]),
        node("Softmax", ["logits"], ["weights"], axis=-1),
        node("MatMul", ["weights", "v"], ["heads"]),
        node("Transpose", ["heads"], ["y"], perm=[0, 2, 1, 3]),
    ]


def _loss(library: Callable[[], Any]) -> Callable[[int], Function]:
    """The mean cross-entropy, whose function has the same name here and in optax."""
    return lambda axis: (
        lambda x, labels: library().softmax_cross_entropy_with_integer_labels(x, labels, axis=axis).mean()
    )


def _value_and_grad(loss: Callable[[int], Function]) -> Callable[[int], Function]:
    return lambda axis: jax.value_and_grad(loss(axis))


def _optax() -> Any:
    return importlib.import_module("optax")


def _torch() -> Any:
    return importlib.import_module("torch")


def _torch_vjp(axis: int) -> Function:
    def call(x, t):
        x = x.detach().requires_grad_()
        _torch().softmax(x, axis).backward(t)
        return x.grad

    return call


def _torch_loss(axis: int) -> Function:
    return lambda x, labels: _torch().nn.functional.cross_entropy(x, labels.long())


def _torch_loss_and_gradient(axis: int) -> Function:
    def call(x, labels):
        x = x.detach().requires_grad_()
        loss = _torch_loss(axis)(x, labels)
        loss.backward()
        return loss.detach(), x.grad

    return call


def _torch_masked(axis: int) -> Function:
    return lambda x, bias, mask: _torch().softmax((x * SCALE + bias).masked_fill(~mask, -jnp.inf), axis)


def _key_and_value(case: Case, group: int = 1) -> Sequence[np.ndarray]:
    """A key and a value like the query (B, T, N, H), with one head for a group of the query's."""
    return _normal((*case.shape[:2], case.shape[2] // group, case.shape[3]), case.dtype, 2)


def _value_and_query(case: Case, group: int = 1) -> Sequence[np.ndarray]:
    """A value like the key (B, S, K, H), and the query (B, 1, N, H) of a step of decoding, N = K·group."""
    batch, _, heads, size = case.shape
    return *_normal(case.shape, case.dtype, 1), *_normal((batch, 1, heads * group, size), case.dtype, 1)


def _normal(shape: tuple[int, ...], dtype: str, count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.standard_normal(shape, np.float32).astype(dtype) for _ in range(count)]


def _torch_attention(q, k, v, **options):
    """torch's attention of arrays (B, T, N, H)."""
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    attention = _torch().nn.functional.scaled_dot_product_attention
    return attention(*heads_first, enable_gqa=k.shape[2] < q.shape[2], **options).transpose(1, 2)


def _attention(causal: bool, gradient: bool, group: int = 1) -> Operation:
    """Attention of a query of shape (B, T, N, H), or its gradient in query, key and value."""

    def of(library: Callable[[], Any]) -> Callable[[int], Function]:
        function = lambda q, k, v: library().dot_product_attention(q, k, v, is_causal=causal)
        loss = lambda *operands: jnp.sum(jnp.sin(function(*operands)))
        return lambda axis: jax.grad(loss, (0, 1, 2)) if gradient else function

    def of_torch(axis: int) -> Function:
        forward = functools.partial(_torch_attention, is_causal=causal)

        def backward(*operands):
            leaves = [x.detach().requires_grad_() for x in operands]
            forward(*leaves).sin().sum().backward()
            return tuple(x.grad for x in leaves)

        return backward if gradient else lambda *operands: forward(*operands).contiguous()

    def multiply_adds(case: Case) -> int:
        batch, length, heads, size = case.shape
        scores = batch * heads * (length * (length + 1) // 2 if causal else length**2)
        return scores * size * (7 if gradient else 2)  # Of seven, two are those of the output.

    has_scipy_and_onnx = not (causal or gradient or group > 1)
    return Operation(
        functools.partial(_key_and_value, group=group),
        of(lambda: jax_softmax2p),
        of(lambda: jax.nn),
        of_torch,
        (lambda axis: _scipy_attention) if has_scipy_and_onnx else None,
        _onnx_attention if has_scipy_and_onnx else None,
        multiply_adds,
    )


def _decode(group: int = 1) -> Operation:
    """Attention of one query a head to a key of shape (B, S, K, H)."""
    of = lambda library: lambda axis: lambda k, v, q: library().dot_product_attention(q, k, v)
    return Operation(
        functools.partial(_value_and_query, group=group),
        of(lambda: jax_softmax2p),
        of(lambda: jax.nn),
        lambda axis: lambda k, v, q: _torch_attention(q, k, v).contiguous(),
    )


_OUR_LOSS = _loss(lambda: jax_softmax2p)
_OPTAX_LOSS = _loss(_optax)

OPERATIONS = {
    "softmax": _with_common_name(
        "softmax", lambda node, case: [node("Softmax", ["x"], ["y"], axis=case.axis)]
    ),
    "log_softmax": _with_common_name(
        "log_softmax", lambda node, case: [node("LogSoftmax", ["x"], ["y"], axis=case.axis)]
    ),
    "logsumexp": _with_common_name(
        "logsumexp",
        lambda node, case: [
            node("Constant", [], ["axes"], value_ints=[case.axis]),
            node("ReduceLogSumExp", ["x", "axes"], ["y"], keepdims=0),
        ],
    ),
    "cross-entropy": Operation(
        _labels,
        _OUR_LOSS,
        _OPTAX_LOSS,
        _torch_loss,
        _scipy_loss,
        lambda node, case: [node("SoftmaxCrossEntropyLoss", ["x", "operand 0"], ["y"], reduction="mean")],
    ),
    "softmax and VJP": Operation(
        _cotangent, _softmax_vjp(lambda: jax_softmax2p), _softmax_vjp(lambda: jax.nn), _torch_vjp
    ),
    "cross-entropy and gradient": Operation(
        _labels, _value_and_grad(_OUR_LOSS), _value_and_grad(_OPTAX_LOSS), _torch_loss_and_gradient
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
    "causal attention, 4 heads a key": _attention(causal=True, gradient=False, group=4),
    "gradient of causal attention, 4 heads a key": _attention(causal=True, gradient=True, group=4),
    "decode": _decode(),
    "decode, 4 heads a key": _decode(group=4),
}
"""Operations by the name that a case gives."""

GRADIENTS = {
    "softmax and VJP",
    "cross-entropy and gradient",
    "gradient of attention",
    "gradient of causal attention",
    "gradient of causal attention, 4 heads a key",
}
"""The names of the operations that differentiate."""
