"""Attention, with jax.nn's signature and results, around softmax in place.

Within this module arrays have five dimensions: batch, key/value heads, query heads for each of those, then
queries or keys, then whatever is left. Names of sizes are jax.nn's: B, K, G, T queries, S keys, H.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jax_softmax2p.arguments import as_logits, as_numeric_array
from jax_softmax2p.ops import logsumexp, softmax_of_logits
from jax_softmax2p.primitives.operands import Band, operand_mask
from jax_softmax2p.primitives.partitioning import num_shards
from jax_softmax2p.reference import compute_dtype

Array = jax.Array

BLOCK_ELEMENTS = 1 << 20
"""So many logits are computed at a time, at most: 4 MiB of float32, which caches hold. Measured."""

LEAST_QUERIES = 128
"""A block has so many queries at least, for matrix products of fewer are slow. Measured."""

BANDED_PARTS = 16
"""Into so many parts queries are divided at most, each of which reads the keys that its band lets through."""

MASKED = -0.7 * float(np.finfo(np.float32).max)
"""What jax.nn writes over logits that are masked."""


def dot_product_attention(
    query: jax.typing.ArrayLike,
    key: jax.typing.ArrayLike,
    value: jax.typing.ArrayLike,
    bias: jax.typing.ArrayLike | None = None,
    mask: jax.typing.ArrayLike | None = None,
    *,
    scale: jax.typing.ArrayLike | None = None,
    is_causal: bool = False,
    query_seq_lengths: jax.typing.ArrayLike | None = None,
    key_value_seq_lengths: jax.typing.ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
    query_block_size: int | None = None,
) -> Any:
    r"""Scaled dot-product attention, in memory that does not grow with queries times keys.

    .. math:: \mathrm{Attention}(Q, K, V) = \mathrm{softmax}(scale · QK^T + B) V

    A drop-in for :func:`jax.nn.dot_product_attention`, which it follows on every edge case: a query that may
    attend to nothing attends to all keys alike, and one beyond its sequence's length gives 0. One exception:
    a query that masks leave nothing but keys with a bias below -2.38e38 attends to all keys alike here, and
    there to those that are masked.

    Logits are computed once, and scaled, biased, masked and normalised in place; many of them block by block,
    which the gradient computes again instead of keeping them. Of keys that ``is_causal`` or
    ``local_window_size`` hide from a block, nothing is computed. Differentiable to any order in both modes.

    Sizes: B batch, T queries, S keys, N heads, K key/value heads, of which N is a multiple (multi-head,
    grouped or multi-query attention), H.

    Args:
      query: floating-point array of shape (B, T, N, H) or (T, N, H).
      key: array of shape (B, S, K, H) or (S, K, H), of query's dtype.
      value: array like key.
      bias: array of up to four dimensions that broadcasts to (B, N, T, S), added to the scaled logits.
      mask: boolean array that broadcasts like bias; where it is False, a query does not attend to a key.
      scale: number by which logits are multiplied; 1/sqrt(H) by default.
      is_causal: query i attends to the keys up to the i-th only.
      query_seq_lengths: int32 array of shape (B,): how many of the queries there are. Others give 0.
      key_value_seq_lengths: int32 array of shape (B,): how many of the keys there are.
      local_window_size: (left, right): query i attends to the keys from i - left to i + right only; one
        integer stands for both.
      implementation: as in :func:`softmax`; "xla", which is one of jax.nn's, is None.
      return_residual: whether to return also the logarithm of each query's sum of exponentials, which has no
        gradient.
      query_block_size: how many queries of a head to process at a time. By default all that there are, where
        there are no more than 2^20 logits; else as many as make that many logits, and 128 at least. The
        gradient of blocks keeps query, key and value alone.

    Returns:
      Array of query's shape and dtype; with return_residual, and one of shape (B, T, N) or (T, N). It is
      computed in float32, or in float64 for float64, and rounded once.

    Raises:
      TypeError: query, key or value is not floating-point, or bias or scale not real.
      ValueError: an argument's shape or dtype is not as described; query_block_size is no positive integer;
        implementation is unknown, "cudnn", or "native" where it cannot run.

    Example:
      >>> import jax.numpy as jnp
      >>> import jax_softmax2p
      >>> q = k = jnp.zeros((3, 1, 8))
      >>> v = jnp.arange(3.0)[:, None, None] * jnp.ones(8)
      >>> jax_softmax2p.dot_product_attention(q, k, v, is_causal=True)[:, 0, 0].tolist()
      [0.0, 0.5, 1.0]

    Sources: A. Vaswani et al., "Attention Is All You Need", arXiv 1706.03762; for blocks, M. N. Rabe and C.
    Staats, "Self-attention Does Not Need O(n^2) Memory", arXiv 2112.05682; jax.nn's documentation.
    """
    named = {"query": query, "key": key, "value": value}
    batched = np.ndim(query) != 3
    query, key, value = (_as_heads(name, x) for name, x in named.items())
    _check_heads(query, key, value)
    b, t, n, _ = query.shape
    shape = (b, n, t, key.shape[1])
    if bias is not None:
        bias = _as_operand("bias", as_numeric_array(bias, "bias"), shape)
    if mask is not None:
        mask = _as_operand("mask", jnp.asarray(mask), shape)
        if mask.dtype != jnp.bool_:
            raise ValueError(f"mask must be boolean, got dtype {mask.dtype}")
    result, log_sum = attend(
        query,
        key,
        value,
        bias=bias,
        mask=mask,
        query_lengths=_as_lengths("query_seq_lengths", query_seq_lengths, b),
        key_lengths=_as_lengths("key_value_seq_lengths", key_value_seq_lengths, b),
        scale=scale,
        options=Options(
            band=_as_limits(is_causal, local_window_size),
            implementation=_as_implementation(implementation),
            with_log_sum=bool(return_residual),
            block_size=_as_block_size(query_block_size),
        ),
    )
    if not batched:
        result = result[0]
    return result if log_sum is None else (result, log_sum.reshape(result.shape[:-1]))


class Limits(NamedTuple):
    """Query i attends to the keys from i - before to i + after; None: no limit."""

    before: int | None
    after: int | None

    def keys_of(self, queries: range, size: int) -> range:
        """The keys, of ``size``, to which some of the queries attend."""
        first = 0 if self.before is None else min(size, max(0, queries.start - self.before))
        stop = size if self.after is None else max(0, min(size, queries.stop + self.after))
        return range(first, max(first, stop))

    def between(self, first_query: int, first_key: int) -> Band | None:
        """The same for queries and keys that are counted from these; None where that is no Band."""
        shift = first_query - first_key
        if self.before is not None and self.before < shift:
            return None
        return Band(
            None if self.before is None else self.before - shift,
            None if self.after is None else self.after + shift,
        )

    def holds(self, queries: Array, keys: Array) -> Array:
        """A mask, for queries and keys by their numbers."""
        inside = jnp.ones(jnp.broadcast_shapes(queries.shape, keys.shape), bool)
        if self.before is not None:
            inside &= keys >= queries - self.before
        if self.after is not None:
            inside &= keys <= queries + self.after
        return inside


@dataclasses.dataclass(frozen=True)
class Options:
    """What is known when attention is traced.

    Attributes:
      band: which keys a query attends to by its number; None: all.
      implementation: as in :func:`softmax`.
      with_log_sum: whether the logarithms of the sums are wanted.
      block_size: queries of a head to process at a time; None: by size.
      keep_rate: of weights that dropout keeps.
      precision: of matrix products.
    """

    band: Limits | None = None
    implementation: str | None = None
    with_log_sum: bool = False
    block_size: int | None = None
    keep_rate: float = 1.0
    precision: Any = None


class Operands(NamedTuple):
    """Arrays of attention, of five dimensions each, or fewer of the first where they have been mapped over.

    Attributes:
      query: (B, K, G, T, H).
      key: (B, K, 1, S, H).
      value: (B, K, 1, S, H'), where H' may differ from H.
      scale: of sizes 1.
      bias: broadcasts to (B, K, G, T, S), as do all that follow; or None, as may they.
      mask: which logits take part.
      queries: which queries there are; the last size is 1.
      keys: which keys there are; the last size but one is 1.
      hidden: the queries for which no logit counts; the last size is 1.
      kept: which weights dropout keeps.
    """

    query: Array
    key: Array
    value: Array
    scale: Array
    bias: Array | None = None
    mask: Array | None = None
    queries: Array | None = None
    keys: Array | None = None
    hidden: Array | None = None
    kept: Array | None = None

    @property
    def sizes(self) -> tuple[int, ...]:
        """(B, K, G, T, S)."""
        return (*self.query.shape[:-1], self.key.shape[-2])

    def of_keys(self, keys: range) -> "Operands":
        """For these keys alone."""
        return self._cut({"key": -2, "value": -2, "bias": -1, "mask": -1, "keys": -1, "kept": -1}, keys)

    def of_queries(self, queries: range) -> "Operands":
        """For these queries alone."""
        return self._cut(self._query_axes(), queries)

    def without_dimensions(self, dimensions: Sequence[int]) -> "Operands":
        """Without these, which have size 1 in query, and so in all."""
        return jax.tree.map(lambda x: jax.lax.squeeze(x, dimensions), self)

    def in_blocks(self, size: int) -> tuple["Operands", "Operands"]:
        """For blocks of so many queries, along a new first dimension; and what all blocks share."""
        own, shared = self.apart(lambda x: x.shape[-2] == self.sizes[-2], self._query_axes())
        split = lambda x: jnp.moveaxis(x.reshape(*x.shape[:-2], -1, size, x.shape[-1]), -3, 0)
        return jax.tree.map(split, own), shared

    def apart(
        self, chosen: Callable[[Array], bool], among: Iterable[str] | None = None
    ) -> tuple["Operands", "Operands"]:
        """Those that are chosen, and the others, with None in place of what is in the other."""
        names = set(self._fields if among is None else among)
        own = {name: x for name, x in self._asdict().items() if name in names and x is not None and chosen(x)}
        nothing: dict[str, Any] = dict.fromkeys(self._fields)
        others = {name: x for name, x in self._asdict().items() if name not in own}
        return Operands(**(nothing | own)), Operands(**(nothing | others))

    def or_else(self, others: "Operands") -> "Operands":
        """These, and others where there is none."""
        there = {name: x for name, x in self._asdict().items() if x is not None}
        return others._replace(**there)

    @staticmethod
    def _query_axes() -> dict[str, int]:
        return dict.fromkeys(("query", "bias", "mask", "queries", "hidden", "kept"), -2)

    def _cut(self, axes: dict[str, int], chosen: range) -> "Operands":
        def cut(name: str, x: Any) -> Any:
            if x is None or name not in axes or x.shape[axes[name]] == 1:
                return x
            return jax.lax.slice_in_dim(x, chosen.start, chosen.stop, axis=x.ndim + axes[name])

        return Operands(**{name: cut(name, x) for name, x in self._asdict().items()})


Result = tuple[Array, Array | None]
"""Attention's, of query's dimensions, and the logarithms of the sums, with a last size of 1, or None."""


def attend(
    query: Array,
    key: Array,
    value: Array,
    *,
    bias: Array | None = None,
    mask: Array | None = None,
    query_lengths: Array | None = None,
    key_lengths: Array | None = None,
    kept: Array | None = None,
    scale: jax.typing.ArrayLike | None = None,
    options: Options,
) -> Result:
    """Attention of checked arguments, as :func:`dot_product_attention`, but value's H may differ.

    Args:
      kept: boolean array that broadcasts to (B, N, T, S): the weights that dropout keeps.
    """
    optional = {"bias": bias, "mask": mask, "kept": kept}
    optional |= {"query_lengths": query_lengths, "key_lengths": key_lengths}
    arrays = {"query": query, "key": key, "value": value}
    arrays |= {name: x for name, x in optional.items() if x is not None}
    arrays["scale"] = _as_scale(scale, query.shape[-1])
    of_devices = functools.partial(_attend, options=options)
    specs = _explicit_specs(arrays)
    if specs is None:
        return of_devices(arrays)
    arrays = jax.tree.map(jax.sharding.reshard, arrays, specs)
    mesh = jax.typeof(query).sharding.mesh
    return jax.shard_map(of_devices, mesh=mesh, in_specs=(specs,), out_specs=specs["query"])(arrays)


def _explicit_specs(arrays: dict[str, Array]) -> dict[str, PartitionSpec] | None:
    """How the arguments are divided where query says that it is: by batch and heads. None where it does not.

    XLA is free to divide what is not explicit as it likes, and does so in the loops as well.
    """
    sharding = jax.typeof(arrays["query"]).sharding
    if not any(sharding.spec):
        return None
    batch, _, heads, _ = sharding.spec
    if arrays["key"].shape[2] % num_shards(sharding.mesh, heads):
        heads = None
    of_heads = PartitionSpec(batch, None, heads, None)
    specs = {"query": of_heads, "key": of_heads, "value": of_heads, "scale": PartitionSpec()}
    for name, x in arrays.items():
        if name not in specs:
            divided = zip(x.shape, (batch, heads, None, None), strict=False)
            specs[name] = PartitionSpec(*(None if size == 1 else part for size, part in divided))
    return specs


def _attend(arrays: dict[str, Array], *, options: Options) -> Result:
    query, key, value = (arrays[name] for name in ("query", "key", "value"))
    b, t, n, _ = query.shape
    s, k = key.shape[1:3]
    dtype = compute_dtype(query.dtype)
    split = lambda x: x.reshape(*x.shape[:2], k, x.shape[2] // k, x.shape[3])
    heads_first = lambda x: jnp.moveaxis(split(x), 1, 3).astype(dtype)
    by_head = lambda name: _split_heads(arrays[name], k) if name in arrays else None
    counted = lambda name, size: _counted(arrays[name], size) if name in arrays else None
    bias, queries, keys = by_head("bias"), counted("query_lengths", t), counted("key_lengths", s)
    operands = Operands(
        query=heads_first(query),
        key=heads_first(key),
        value=heads_first(value),
        scale=arrays["scale"].astype(dtype),
        bias=None if bias is None else bias.astype(dtype),
        mask=by_head("mask"),
        queries=None if queries is None else queries[..., :, None],
        keys=None if keys is None else keys[..., None, :],
        kept=by_head("kept"),
    )
    operands = operands._replace(hidden=_hidden(operands, options.band))
    result, log_sum = _for_hidden(operands, *_dispatch(operands, options))
    heads_last = lambda x: jnp.moveaxis(x, 3, 1).reshape(b, t, n, x.shape[-1]).astype(query.dtype)
    return heads_last(result), None if log_sum is None else heads_last(jax.lax.stop_gradient(log_sum))


def _hidden(operands: Operands, band: Limits | None) -> Array | None:
    """The queries for which every logit is masked, or so far down that it might as well be."""
    t, s = operands.sizes[-2:]
    arrays = (operands.bias, operands.mask, operands.keys)
    if all(x is None for x in arrays) and (
        band is None or all(band.keys_of(range(i, i + 1), s) for i in range(t))
    ):
        return None
    of_band = (
        None if band is None else band.holds(jnp.arange(t)[:, None], jnp.arange(s)).reshape(1, 1, 1, t, s)
    )
    inside = _all_of(operands.mask, operands.keys, of_band)
    if inside is None:
        return None
    if operands.bias is None:
        return ~jnp.any(inside, -1, keepdims=True)
    bias = jax.lax.stop_gradient(operands.bias)
    return jnp.max(bias, -1, keepdims=True, where=inside, initial=-jnp.inf) <= MASKED


def _for_hidden(operands: Operands, result: Array, log_sum: Array | None) -> Result:
    """Hidden queries attend to all keys alike; those that are not there give 0."""
    hidden, queries = operands.hidden, operands.queries
    if hidden is not None and operands.kept is None:
        mean = jnp.sum(operands.value, -2, keepdims=True) / max(1, operands.sizes[-1])
        result = jnp.where(hidden, mean, result)
    if queries is not None:
        result = jnp.where(queries, result, 0)
    absent = None if queries is None else ~queries
    if log_sum is not None:
        for rows in (hidden, absent):
            log_sum = log_sum if rows is None else jnp.where(rows, MASKED, log_sum)
    return result, log_sum


def _dispatch(operands: Operands, options: Options) -> Result:
    """Whole, or in parts where that is too much at a time."""
    b, k, g, t, s = operands.sizes
    if 0 in operands.sizes or (options.block_size is None and b * k * g * t * s <= BLOCK_ELEMENTS):
        return _block(operands, options, options.band and options.band.between(0, 0))
    devices = _devices()
    side_by_side = math.gcd(b, devices), math.gcd(k, devices)
    rows, heads = options.block_size, 1
    if rows is None:
        elements = max(1, BLOCK_ELEMENTS * devices // math.prod(side_by_side))
        rows, heads = max(LEAST_QUERIES, elements // (g * s)), max(1, elements // (g * t * s))
    of_heads = functools.partial(_in_parts, rows=rows, options=options)
    operands = jax.tree.map(functools.partial(_in_turn, side_by_side=side_by_side), operands)
    b_turns, k_turns = operands.query.shape[:2]
    if all(x is None or x.shape[0] * x.shape[1] in (1, b_turns * k_turns) for x in operands):
        # One loop copies less than two.
        merged = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), operands)
        result = _mapped(of_heads, merged, at_a_time=heads)
        result = jax.tree.map(lambda x: x.reshape(b_turns, k_turns, *x.shape[1:]), result)
    else:
        of_batch = functools.partial(_mapped, of_heads, at_a_time=heads)
        result = _mapped(of_batch, operands, at_a_time=max(1, heads // k_turns))
    return jax.tree.map(lambda x: jnp.moveaxis(x, (0, 1), (1, 3)).reshape(b, k, *x.shape[4:]), result)


def _devices() -> int:
    """Among how many devices XLA may divide what is traced here."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.device_count()
    return math.prod(size for name, size in mesh.shape.items() if name not in mesh.manual_axes)


def _in_turn(x: Array, side_by_side: tuple[int, int]) -> Array:
    """(B, K, ...) as (turns of B, turns of K, side by side of B, of K, ...).

    A loop over turns, the minor parts, leaves what is divided among devices where it is: XLA divides arrays
    into major parts.
    """
    parts = [min(size, at_once) for size, at_once in zip(x.shape[:2], side_by_side, strict=True)]
    split = x.reshape(parts[0], x.shape[0] // parts[0], parts[1], x.shape[1] // parts[1], *x.shape[2:])
    return jnp.moveaxis(split, (1, 3), (0, 1))


def _mapped(function: Callable[[Operands], Result], operands: Operands, at_a_time: int) -> Result:
    """The function mapped over the first dimension. Operands that broadcast there are not repeated."""
    size = operands.query.shape[0]
    own, shared = operands.apart(lambda x: x.shape[0] == size)
    shared = jax.tree.map(lambda x: x[0], shared)
    call = lambda own: function(own.or_else(shared))
    if size == 1:
        return jax.tree.map(lambda x: x[None], call(jax.tree.map(lambda x: x[0], own)))
    if at_a_time >= size:
        return jax.vmap(call)(own)
    return jax.lax.map(call, own, batch_size=at_a_time if at_a_time > 1 else None)


def _in_parts(operands: Operands, rows: int, options: Options) -> Result:
    """Attention of one head, in blocks of up to ``rows`` queries; with a band, to the keys that it needs."""
    t, s = operands.sizes[-2:]
    # What hidden queries attend to is no matter of the band, and dropout wants to know each of its weights.
    band = None if operands.kept is not None else options.band
    size = t if band is None else max(min(rows, LEAST_QUERIES), -(-t // BANDED_PARTS))
    results = []
    for start in range(0, t, size):
        queries = range(start, min(t, start + size))
        keys = range(s) if band is None else band.keys_of(queries, s)
        # Cut inside: what has been cut out would be kept for the gradient, and be more than the operands.
        part = functools.partial(_part, queries=queries, keys=keys, rows=rows, options=options)
        results.append(jax.checkpoint(part)(operands))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, -2), *results)


def _part(operands: Operands, queries: range, keys: range, rows: int, options: Options) -> Result:
    """Attention of these queries, which attend to no other keys than these, in blocks."""
    limits = options.band if len(keys) else None
    operands = operands.of_keys(keys)

    def inside(numbers: Array) -> Array | None:
        return None if limits is None else limits.holds(numbers[:, None], keys.start + jnp.arange(len(keys)))

    def single(operands: Operands, queries: range) -> Result:
        band = limits and limits.between(queries.start, keys.start)
        by_array = None if band else inside(queries.start + jnp.arange(len(queries)))
        return _block(operands.of_queries(queries), options, band, by_array)

    if len(queries) <= rows:
        return single(operands, queries)
    count, rest = divmod(len(queries), rows)
    last = range(queries.stop - rest, queries.stop)
    own, shared = operands.of_queries(range(queries.start, last.start)).in_blocks(rows)

    @jax.checkpoint
    def block(start: Array, own: Operands) -> Result:
        # Where a block starts is known when it runs: its band is an array.
        return _block(own.or_else(shared), options, None, inside(start + jnp.arange(rows)))

    starts = queries.start + rows * jnp.arange(count)
    joined = lambda x: jnp.moveaxis(x, 0, -3).reshape(*x.shape[1:-2], count * rows, x.shape[-1])
    result = jax.tree.map(joined, jax.lax.map(lambda xs: block(*xs), (starts, own)))
    if not rest:
        return result
    of_last = jax.checkpoint(functools.partial(single, queries=last))(operands)
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, -2), result, of_last)


def _block(operands: Operands, options: Options, band: Band | None, inside: Array | None = None) -> Result:
    """Attention of all that is passed. ``band`` or ``inside``, an array, is the part of the band."""
    sizes = operands.sizes
    # XLA copies the product before it goes into a custom call if it has a dimension of size 1 in front.
    o = operands.without_dimensions([d for d, size in enumerate(sizes[:-2]) if size == 1])
    into, out_of = "...th,...sh->...ts", "...ts,...sh->...th"
    key, value = o.key, o.value
    if sizes[-3] != 1:
        into, out_of = "...gth,...sh->...gts", "...gts,...sh->...gth"
        key, value = key[..., 0, :, :], value[..., 0, :, :]
    x = jnp.einsum(into, o.query, key, precision=options.precision)
    # A bias of -inf throughout would make NaN.
    seen = ~o.hidden if o.bias is not None and o.hidden is not None else None
    if inside is not None:
        inside = inside.reshape((1,) * (x.ndim - 2) + inside.shape)
    where = _all_of(o.mask, o.queries, o.keys, inside, seen)
    applied: dict[str, Any] = {
        "scale": o.scale,
        "bias": o.bias,
        "implementation": options.implementation,
    }
    log_sum: Any = None
    if options.with_log_sum:
        both = where if band is None else operand_mask(x.shape, where, band)
        log_sum = logsumexp(jax.lax.stop_gradient(x), -1, where=both, keepdims=True, **applied)
        log_sum = log_sum.reshape(*sizes[:-1], 1)
    weights = softmax_of_logits(as_logits(x, -1, where, band=band, **applied), in_place=True)
    if o.kept is not None:
        if o.hidden is not None:
            weights = jnp.where(o.hidden, 1 / sizes[-1], weights)
        weights = jnp.where(o.kept, weights, 0)
    result = jnp.einsum(out_of, weights, value, precision=options.precision)
    result = result.reshape(*sizes[:-1], value.shape[-1])
    return result / options.keep_rate if o.kept is not None else result, log_sum


def _all_of(*masks: Array | None) -> Array | None:
    """The conjunction of those that there are."""
    there = [mask for mask in masks if mask is not None]
    return functools.reduce(operator.and_, there) if there else None


def _counted(lengths: Array, size: int) -> Array:
    """Of shape (B, 1, 1, size): whether a number is below the length."""
    return jnp.arange(size) < lengths.reshape(-1, 1, 1, 1)


def _split_heads(x: Array, k: int) -> Array:
    """(B, N, T, S) as (B, K, G, T, S), or with size 1 where x has it."""
    b, n, t, s = x.shape
    return x.reshape(b, 1, 1, t, s) if n == 1 else x.reshape(b, k, n // k, t, s)


def _as_heads(name: str, x: jax.typing.ArrayLike) -> Array:
    array = as_numeric_array(x, name)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} must be floating-point numbers, got dtype {array.dtype}")
    if array.ndim not in (3, 4):
        raise ValueError(f"{name} must have 3 or 4 dimensions, got shape {array.shape}")
    return array if array.ndim == 4 else array[None]


def _check_heads(query: Array, key: Array, value: Array) -> None:
    b, _, n, h = query.shape
    k = key.shape[2]
    if key.shape[0] != b or key.shape[3] != h:
        raise ValueError(f"key must have query's batch {b} and head size {h}, got shape {key.shape}")
    if value.shape != key.shape:
        raise ValueError(f"value must have key's shape {key.shape}, got {value.shape}")
    for name, array in (("key", key), ("value", value)):
        if array.dtype != query.dtype:
            raise ValueError(f"{name} must have query's dtype {query.dtype}, got {array.dtype}")
    if k == 0 or n % k:
        raise ValueError(f"query must have a multiple of key's {k} heads, got {n}")


def _as_operand(name: str, array: Array, shape: tuple[int, ...]) -> Array:
    """Of four dimensions, each 1 or that of (B, N, T, S)."""
    if array.ndim > 4 or any(
        own not in (1, size) for own, size in zip(array.shape[::-1], shape[::-1], strict=False)
    ):
        raise ValueError(f"{name} must broadcast to (B, N, T, S) = {shape}, got shape {array.shape}")
    return array.reshape((1,) * (4 - array.ndim) + array.shape)


def _as_lengths(name: str, lengths: jax.typing.ArrayLike | None, batch: int) -> Array | None:
    if lengths is None:
        return None
    array = jnp.asarray(lengths)
    if array.dtype != jnp.int32 or array.shape != (batch,):
        raise ValueError(
            f"{name} must be int32 of shape ({batch},), got {array.dtype} of shape {array.shape}"
        )
    return array


def _as_scale(scale: jax.typing.ArrayLike | None, h: int) -> Array:
    array = as_numeric_array(1 / np.sqrt(max(1, h)) if scale is None else scale, "scale")
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise TypeError(f"scale must be real, got dtype {array.dtype}")
    if array.size != 1:
        raise ValueError(f"scale must be one number, got shape {array.shape}")
    return array.reshape((1,) * 5)


def _as_limits(is_causal: bool, window: int | tuple[int, int] | None) -> Limits | None:
    if window is None:
        return Limits(None, 0) if is_causal else None
    try:
        before, after = map(operator.index, window if isinstance(window, tuple | list) else (window, window))
    except (TypeError, ValueError):
        raise ValueError(f"local_window_size must be an integer or two, got {window!r}") from None
    if before < 0 or after < 0:
        raise ValueError(f"local_window_size must not be negative, got {window!r}")
    return Limits(before, 0 if is_causal else after)


def _as_block_size(size: int | None) -> int | None:
    if size is not None and not (isinstance(size, int) and size > 0):
        raise ValueError(f"query_block_size must be a positive integer or None, got {size!r}")
    return size


def _as_implementation(implementation: str | None) -> str | None:
    if implementation == "cudnn":
        raise ValueError("implementation='cudnn' is jax.nn's alone; None runs on any device")
    return None if implementation == "xla" else implementation
