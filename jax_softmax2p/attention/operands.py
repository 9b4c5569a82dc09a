"""The arrays of attention as one record, the options that are fixed when it is traced, and its results.

The sizes have jax.nn's names: B batch, K key/value heads, G query heads for each of these, T queries, S keys
and H features of a head. An array has the five dimensions (B, K, G, T or S, ...); where a function is mapped
over leading dimensions, its arrays lack these.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_softmax2p.primitives.dispatch import Implementation

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Options:
    """What is known when attention is traced.

    Attributes:
      implementation: as in :func:`jax_softmax2p.softmax`.
      return_lse: whether to compute the logsumexp of each query's logits.
      lse_has_gradient: whether that is differentiated. It is not what users get.
      logits_soft_cap: c, where the scaled logits z become c·tanh(z / c), before the bias; None: they stay.
      query_block_size: how many queries of a head a block has; None: as many as max_block_logits() allows.
      keep_prob: the probability with which dropout keeps a weight.
      precision: of the two matrix products, as in :func:`jax.numpy.einsum`.
    """

    implementation: Implementation | None = None
    return_lse: bool = False
    lse_has_gradient: bool = False
    logits_soft_cap: float | None = None
    query_block_size: int | None = None
    keep_prob: float = 1.0
    precision: jax.lax.PrecisionLike = None


class Result(NamedTuple):
    """What attention returns, in the layout of its query.

    Attributes:
      output: the weighted means of the values: query's shape, but with the size of the values' heads at its
        end.
      lse: the logsumexp of each query's logits: query's shape, but with size 1 at its end. None where it is
        not wanted.
    """

    output: Array
    lse: Array | None


class Operands(NamedTuple):
    """The arrays of attention. Those that are None do not take part.

    Attributes:
      query: (B, K, G, T, H).
      key: (B, K, 1, S, H).
      value: (B, K, 1, S, H'), where H' may differ from H.
      scale: the factor of the logits: size 1 in every dimension.
      bias: the summand of the scaled logits. It broadcasts to (B, K, G, T, S), as do all that follow.
      mask: boolean: True where a query attends to a key.
      q_padding: boolean: True for the queries beyond their sequence's length. The last size is 1.
      kv_padding: boolean: True for the keys beyond their sequence's length. The last size but one is 1.
      fully_masked: boolean: True for the queries that attend to no key. The last size is 1.
      dropout_mask: boolean: True for the weights that dropout keeps.
    """

    query: Array
    key: Array
    value: Array
    scale: Array
    bias: Array | None = None
    mask: Array | None = None
    q_padding: Array | None = None
    kv_padding: Array | None = None
    fully_masked: Array | None = None
    dropout_mask: Array | None = None

    @property
    def sizes(self) -> tuple[int, ...]:
        """The logits' shape: (B, K, G, T, S) without the dimensions that are mapped over."""
        return (*self.query.shape[:-1], self.key.shape[-2])

    def slice_queries(self, queries: range) -> "Operands":
        """The operands of a contiguous range of the queries."""
        return self._slice(_QUERY_AXES, queries)

    def slice_keys(self, keys: range) -> "Operands":
        """The operands of a contiguous range of the keys."""
        return self._slice(_KEY_AXES, keys)

    def squeeze(self, axes: Sequence[int]) -> "Operands":
        """The operands without axes that have size 1 in query, and therefore in all arrays."""
        return jax.tree.map(lambda x: jax.lax.squeeze(x, axes), self)

    def split_queries(self, block_size: int) -> tuple["Operands", "Operands"]:
        """Cuts the queries into blocks.

        Args:
          block_size: how many queries a block has. It divides T, which is larger.

        Returns:
          The arrays with an axis of queries, (T / block_size, ..., block_size, ...) each, for a loop over the
          first axis; and the arrays that all blocks share.
        """
        per_query, shared = self.partition(lambda x: x.shape[-2] == self.sizes[-2], _QUERY_AXES)
        split = lambda x: jnp.moveaxis(x.reshape(*x.shape[:-2], -1, block_size, x.shape[-1]), -3, 0)
        return jax.tree.map(split, per_query), shared

    def partition(
        self, predicate: Callable[[Array], bool], names: Iterable[str] | None = None
    ) -> tuple["Operands", "Operands"]:
        """Splits the record in two, each with None in place of what the other one has. See ``combine``.

        Args:
          predicate: whether an array belongs to the first record.
          names: the fields that may belong to the first record; None: all.
        """
        names = set(self._fields if names is None else names)
        chosen = {name for name in names if (x := getattr(self, name)) is not None and predicate(x)}
        first = {name: x if name in chosen else None for name, x in self._asdict().items()}
        second = {name: None if name in chosen else x for name, x in self._asdict().items()}
        return Operands._make(first.values()), Operands._make(second.values())

    def combine(self, other: "Operands") -> "Operands":
        """Merges the two records that ``partition`` has made."""
        return Operands._make(b if a is None else a for a, b in zip(self, other, strict=True))

    def _slice(self, axes: dict[str, int], indices: range) -> "Operands":
        """Slices the arrays of the given names along their axes, unless they broadcast there."""

        def slice_array(name: str, x: Array | None) -> Array | None:
            if x is None or name not in axes or x.shape[axes[name]] == 1:
                return x
            return jax.lax.slice_in_dim(x, indices.start, indices.stop, axis=x.ndim + axes[name])

        return Operands._make(slice_array(name, x) for name, x in self._asdict().items())


def promote_to_inexact(
    arrays: tuple[Array, ...], dtype: jax.typing.DTypeLike | None = None
) -> tuple[Array, ...]:
    """Query, key and value, say, in one dtype: that given, or theirs; in float32 in place of integers."""
    dtype = dtype or jnp.result_type(*arrays)
    dtype = dtype if jnp.issubdtype(dtype, jnp.inexact) else jnp.promote_types(dtype, jnp.float32)
    return tuple(jnp.asarray(x, dtype) for x in arrays)


def are_known(*sizes: Any) -> bool:
    """Whether sizes are numbers, and not jax.export's symbols, which often cannot be compared."""
    return all(isinstance(size, int) for size in sizes)


def at_least_one(size: Any) -> Any:
    """The size, or 1 for 0. A symbol is at least 1, and cannot be compared with it."""
    return max(1, size) if are_known(size) else size


_QUERY_AXES = dict.fromkeys(("query", "bias", "mask", "q_padding", "fully_masked", "dropout_mask"), -2)
"""Which axis of which operand belongs to the queries."""

_KEY_AXES = {"key": -2, "value": -2, "bias": -1, "mask": -1, "kv_padding": -1, "dropout_mask": -1}
"""Which axis of which operand belongs to the keys."""
