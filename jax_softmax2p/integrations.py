"""Ways into other libraries: attention for flax and equinox, and jax.nn's own functions replaced.

    flax.nnx.MultiHeadAttention(..., attention_fn=integrations.flax_attention)
    flax.linen.MultiHeadDotProductAttention(..., attention_fn=integrations.flax_attention)
    integrations.EquinoxMultiheadAttention(...)  # equinox.nn.MultiheadAttention's constructor
    integrations.replace_equinox_attention(model)  # or that of a model that there is
    with integrations.patch_jax_nn(): ...

Neither flax nor equinox is imported before it is needed, or required.
"""

import contextlib
import dataclasses
import functools
import math
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import jax.scipy.special

from jax_softmax2p import attention, ops

Array = jax.Array


def flax_attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: jax.typing.DTypeLike | None = None,
    precision: Any = None,
    module: Any = None,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: Callable[..., Array] | None = None,
    qk_attn_weights_einsum: Callable[..., Array] | None = None,
    attn_weights_value_einsum: Callable[..., Array] | None = None,
    promote_dtype: Callable[..., Any] | None = None,
    is_causal: bool = False,
) -> Array:
    """Attention for the argument ``attention_fn`` of flax's layers, of ``nnx`` and of ``linen``.

    It computes what flax's own ``dot_product_attention`` does, with the same random numbers in dropout, as
    :func:`jax_softmax2p.dot_product_attention` does it: logits in float32 whatever the dtype, in place, and
    block by block where there are many.

    Args:
      query: array of shape (batch..., T, N, H), with any number of batch dimensions.
      key: array of shape (batch..., S, K, H), where N is a multiple of K.
      value: array of shape (batch..., S, K, H').
      bias: broadcasts to (batch..., N, T, S).
      mask: broadcasts alike; what is 0 or False takes no part.
      broadcast_dropout: whether the batch and the heads drop the same weights.
      dropout_rng: key for dropout.
      dropout_rate: of weights, how many are dropped.
      deterministic: drop none.
      dtype: of the computation's operands and result; by default what the arrays promote to.
      precision: of matrix products.
      module: the layer that is to keep the weights, as "attention_weights"; then they exist as a whole.
      force_fp32_for_softmax: return float32 at least, as linen does. The softmax is in float32 anyway.
      einsum_dot_general: the products' ``dot_general``; with it, and with the next two, weights exist as a
        whole.
      qk_attn_weights_einsum: instead of ``jnp.einsum`` for the logits.
      attn_weights_value_einsum: instead of ``jnp.einsum`` for the result.
      promote_dtype: promote_dtype((query, key, value), dtype=dtype) instead of the usual promotion.
      is_causal: as in :func:`jax_softmax2p.dot_product_attention`.

    Returns:
      Array of shape (batch..., T, N, H').

    Raises:
      ValueError: shapes do not go together.

    Example:
      >>> from flax import nnx
      >>> from jax_softmax2p.integrations import flax_attention
      >>> layer = nnx.MultiHeadAttention(
      ...     4, 32, decode=False, attention_fn=flax_attention, rngs=nnx.Rngs(0)
      ... )
      >>> layer(jax.numpy.ones((2, 5, 32)), is_causal=True).shape
      (2, 5, 32)
    """
    if promote_dtype is not None:
        query, key, value = promote_dtype((query, key, value), dtype=dtype)
    else:
        dtype = dtype or jnp.result_type(query, key, value)
        dtype = dtype if jnp.issubdtype(dtype, jnp.inexact) else jnp.promote_types(dtype, jnp.float32)
        query, key, value = (jnp.asarray(x, dtype) for x in (query, key, value))
    if force_fp32_for_softmax:
        query, key, value = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (query, key, value))
    batch, heads = query.shape[:-3], query.shape[-2]
    _check_flax_shapes(query, key, value)
    shape = (*batch, heads, query.shape[-3], key.shape[-3])
    if mask is not None:
        mask = jnp.asarray(mask).astype(bool)
    kept, keep_rate = None, 1.0
    if not deterministic and dropout_rate > 0:
        if dropout_rng is None:
            raise ValueError("dropout_rng must be given where dropout_rate is not 0")
        keep_rate = 1 - dropout_rate
        drawn = (1,) * (len(shape) - 2) + shape[-2:] if broadcast_dropout else shape
        kept = jax.random.bernoulli(dropout_rng, keep_rate, drawn)
    if module is not None or einsum_dot_general or qk_attn_weights_einsum or attn_weights_value_einsum:
        einsum = functools.partial(jnp.einsum, precision=precision)
        if einsum_dot_general:
            einsum = functools.partial(einsum, _dot_general=einsum_dot_general)
        einsums = qk_attn_weights_einsum or einsum, attn_weights_value_einsum or einsum
        weights = _weights(query, key, bias, mask, is_causal, einsums[0])
        if module is not None:
            _sow(module, weights)
        if kept is not None:
            weights = weights * (kept / jnp.asarray(keep_rate, weights.dtype))
        return einsums[1]("...hqk,...khd->...qhd", weights.astype(value.dtype), _repeated(value, heads))
    options = attention.Options(
        band=attention.Limits(None, 0) if is_causal else None, keep_rate=keep_rate, precision=precision
    )
    flat = lambda x: x.reshape(math.prod(batch), *x.shape[-3:])
    flat_operand = lambda x: None if x is None else _flat_operand(x, shape)
    result, _ = attention.attend(
        flat(query),
        flat(key),
        flat(value),
        bias=flat_operand(bias),
        mask=flat_operand(mask),
        kept=flat_operand(kept),
        options=options,
    )
    return result.reshape(*query.shape[:-1], value.shape[-1])


def _check_flax_shapes(query: Array, key: Array, value: Array) -> None:
    if (
        key.shape[:-3] != query.shape[:-3]
        or key.shape[-1] != query.shape[-1]
        or query.shape[-2] % key.shape[-2]
    ):
        raise ValueError(f"key must go with query's shape {query.shape}, got {key.shape}")
    if value.shape[:-1] != key.shape[:-1]:
        raise ValueError(f"value must have key's shape {key.shape} but for the last size, got {value.shape}")


def _flat_operand(x: Array, shape: tuple[int, ...]) -> Array:
    """One that broadcasts to (batch..., N, T, S), with one batch dimension."""
    x = jnp.asarray(x)
    x = x.reshape((1,) * (len(shape) - x.ndim) + x.shape)
    batch = shape[:-3] if math.prod(x.shape[:-3]) != 1 else x.shape[:-3]
    return jnp.broadcast_to(x, (*batch, *x.shape[-3:])).reshape(math.prod(batch), *x.shape[-3:])


def _repeated(x: Array, heads: int) -> Array:
    """With as many heads as the queries have."""
    return x if x.shape[-2] == heads else jnp.repeat(x, heads // x.shape[-2], -2)


def _weights(query, key, bias, mask, is_causal: bool, einsum: Callable[..., Array]) -> Array:
    """All of attention's weights, masked as flax does it."""
    scaled = query / jnp.sqrt(query.shape[-1]).astype(query.dtype)
    logits = einsum("...qhd,...khd->...hqk", scaled, _repeated(key, query.shape[-2]))
    if bias is not None:
        logits = logits + bias
    if is_causal:
        causal = jnp.tri(logits.shape[-2], logits.shape[-1], dtype=bool)
        mask = causal if mask is None else mask & causal
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
    return ops.softmax(logits).astype(query.dtype)


def _sow(module: Any, weights: Array) -> None:
    from flax import linen, nnx

    collection = "intermediates" if isinstance(module, linen.Module) else nnx.Intermediate
    module.sow(collection, "attention_weights", weights)


@functools.cache
def _equinox_attention() -> type:
    import equinox

    class EquinoxMultiheadAttention(equinox.nn.MultiheadAttention):
        """equinox.nn.MultiheadAttention with this package's attention.

        Its constructor, weights and results are equinox's, dropout included, for the same key. An instance
        is a MultiheadAttention to equinox; :func:`replace_equinox_attention` makes one of another.
        """

        def __call__(
            self,
            query: Array,
            key_: Array,
            value: Array,
            mask: Array | None = None,
            *,
            key: Array | None = None,
            inference: bool | None = None,
            deterministic: bool | None = None,
            process_heads: Callable[..., tuple[Array, Array, Array]] | None = None,
        ) -> Array:
            if deterministic is not None:
                inference = deterministic
                warnings.warn("deterministic is equinox's former name of inference", stacklevel=2)
            if key_.shape[0] != value.shape[0]:
                raise ValueError(f"value must be as long as key_, {key_.shape[0]}, got {value.shape[0]}")
            projections = (self.query_proj, query), (self.key_proj, key_), (self.value_proj, value)
            heads = tuple(
                jax.vmap(projection)(x).reshape(x.shape[0], self.num_heads, -1)
                for projection, x in projections
            )
            if process_heads is not None:
                shapes = [x.shape for x in heads]
                heads = process_heads(*heads)
                if [x.shape for x in heads] != shapes:
                    raise ValueError(f"process_heads must not change the shapes {shapes}")
            size = query.shape[0], key_.shape[0]
            if mask is not None and mask.shape not in (size, (self.num_heads, *size)):
                raise ValueError(
                    f"mask must have shape {size} or {(self.num_heads, *size)}, got {mask.shape}"
                )
            kept, keep_rate = self._kept(size, key, inference)
            result, _ = attention.attend(
                *(x[None] for x in heads),
                mask=None if mask is None else mask.astype(bool).reshape(1, -1, *size),
                kept=kept,
                options=attention.Options(keep_rate=keep_rate),
            )
            return jax.vmap(self.output_proj)(result.reshape(size[0], -1))

        def _kept(self, size, key, inference) -> tuple[Array | None, float]:
            """Which weights the dropout layer keeps, asked of the layer itself, a head at a time."""
            ones = jnp.ones(size)
            if key is None:
                # Whether it does without a key, it says itself.
                self.dropout(ones, inference=inference)
                return None, 1.0
            rate = self.dropout.p
            none_dropped = isinstance(rate, int | float) and rate == 0
            if none_dropped or (self.dropout.inference if inference is None else inference):
                return None, 1.0
            drop = lambda key: self.dropout(ones, key=key, inference=inference) > 0
            return jax.vmap(drop)(jax.random.split(key, self.num_heads))[None], 1 - rate

    EquinoxMultiheadAttention.__module__ = __name__
    EquinoxMultiheadAttention.__qualname__ = EquinoxMultiheadAttention.__name__
    return EquinoxMultiheadAttention


def __getattr__(name: str) -> Any:
    if name == "EquinoxMultiheadAttention":
        return _equinox_attention()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def replace_equinox_attention(model: Any) -> Any:
    """The model with an EquinoxMultiheadAttention in place of every equinox.nn.MultiheadAttention.

    Args:
      model: a pytree, such as an equinox.Module. It stays as it is.

    Returns:
      The like of it; weights are shared.

    Example:
      >>> import equinox
      >>> from jax_softmax2p.integrations import replace_equinox_attention
      >>> layer = equinox.nn.MultiheadAttention(2, 8, key=jax.random.key(0))
      >>> type(replace_equinox_attention([layer])[0]).__name__
      'EquinoxMultiheadAttention'
    """
    import equinox

    theirs, ours = equinox.nn.MultiheadAttention, _equinox_attention()

    def replace(x: Any) -> Any:
        if type(x) is not theirs:
            return x
        layer: Any = object.__new__(ours)
        for field in dataclasses.fields(x):
            object.__setattr__(layer, field.name, getattr(x, field.name))
        return layer

    return jax.tree.map(replace, model, is_leaf=lambda x: isinstance(x, theirs))


def _or_original(ours: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def routed(*args, **kwargs):
        try:
            return ours(*args, **kwargs)
        except (TypeError, ValueError):
            # What ours refuses, such as a mask of integers, jax.nn may take, or have its own words against.
            return original(*args, **kwargs)

    return routed


_OURS = (ops.softmax, ops.log_softmax, ops.logsumexp, attention.dot_product_attention)
_ORIGINALS: dict[str, Any] = {ours.__name__: getattr(jax.nn, ours.__name__) for ours in _OURS}
_ROUTED = {ours.__name__: _or_original(ours, _ORIGINALS[ours.__name__]) for ours in _OURS}
_patch_lock = threading.Lock()
_patch_depths: dict[tuple[types.ModuleType, str], int] = {}


@contextlib.contextmanager
def patch_jax_nn(*modules: types.ModuleType) -> Iterator[None]:
    """Routes jax.nn's softmax, log_softmax, logsumexp and dot_product_attention through this package.

    For code that one does not own: within the context, ``jax.nn`` has this package's functions under those
    names, and so has ``jax.scipy.special`` for logsumexp, which is jax.nn's. A call that these refuse goes to
    JAX's own. On leaving, exceptions included, everything is as it was. Contexts may nest.

    It is the attribute that is replaced. So it reaches code that says ``jax.nn.softmax(...)`` when it runs or
    is traced, as flax, equinox and optax do in their layers and losses, but neither what has been imported by
    name (``from jax.nn import softmax``), for which there is ``modules``, nor JAX's internals.

    A jitted function keeps what it was traced with: traced inside, it uses this package afterwards too; one
    that has been traced before, for the same shapes and dtypes, does not change inside.
    ``jax.clear_caches()`` makes JAX forget such traces.

    Modules belong to the process: other threads see the same functions for as long as any thread is inside.

    Args:
      modules: others in which names of these four functions are to be replaced, where they stand for JAX's,
        such as ``flax.linen``, whose ``softmax`` is JAX's.

    Example:
      >>> import jax, jax_softmax2p
      >>> model = lambda x: jax.nn.softmax(x).sum()
      >>> with jax_softmax2p.patch_jax_nn():
      ...     "softmax2p" in str(jax.make_jaxpr(model)(jax.numpy.ones(3)))
      True
    """
    with _patch_lock:
        places = [
            (module, name)
            for module in dict.fromkeys((jax.nn, jax.scipy.special, *modules))
            for name in _ORIGINALS
            if getattr(module, name, None) in (_ORIGINALS[name], _ROUTED[name])
        ]
        for module, name in places:
            _patch_depths[module, name] = _patch_depths.get((module, name), 0) + 1
            setattr(module, name, _ROUTED[name])
    try:
        yield
    finally:
        with _patch_lock:
            for module, name in places:
                _patch_depths[module, name] -= 1
                if not _patch_depths[module, name]:
                    setattr(module, name, _ORIGINALS[name])
