"""Equinox's attention layer with this package's attention. Importing this module imports equinox."""

import warnings
from collections.abc import Callable

import equinox
import jax
import jax.numpy as jnp

from jax_softmax2p.attention.multi_head import multi_head_attention
from jax_softmax2p.attention.operands import Options, promote_to_inexact

Array = jax.Array
ProcessHeads = Callable[[Array, Array, Array], tuple[Array, Array, Array]]


class EquinoxMultiheadAttention(equinox.nn.MultiheadAttention):
    """equinox.nn.MultiheadAttention with this package's attention.

    Its constructor, weights and results are equinox's, those of dropout with the same key included. An
    instance is a MultiheadAttention to equinox. :func:`replace_equinox_attention` makes one of another.
    """

    # Pickles name the class by its public place.
    __module__ = "jax_softmax2p.integrations"

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
        process_heads: ProcessHeads | None = None,
    ) -> Array:
        """The layer's result, for the arguments of equinox.nn.MultiheadAttention."""
        if deterministic is not None:
            inference = deterministic
            warnings.warn("deterministic is equinox's former name of inference", stacklevel=2)
        if key_.shape[0] != value.shape[0]:
            raise ValueError(f"value must be as long as key_, {key_.shape[0]}, got {value.shape[0]}")
        heads = self._project_heads(query, key_, value, process_heads)
        if any(map(jnp.iscomplexobj, heads)):  # Neither the kernels nor the composed path take these.
            return super().__call__(
                query, key_, value, mask, key=key, inference=inference, process_heads=process_heads
            )
        shape = query.shape[0], key_.shape[0]
        if mask is not None and mask.shape not in (shape, (self.num_heads, *shape)):
            raise ValueError(f"mask must have shape {shape} or {(self.num_heads, *shape)}, got {mask.shape}")
        dropout_mask, keep_prob = self._dropout_mask(shape, key, inference)
        output, _ = multi_head_attention(
            *(x[None] for x in heads),
            mask=None if mask is None else mask.astype(bool).reshape(1, -1, *shape),
            dropout_mask=dropout_mask,
            options=Options(keep_prob=keep_prob),
        )
        return jax.vmap(self.output_proj)(output.reshape(shape[0], -1))

    def _project_heads(
        self, query: Array, key_: Array, value: Array, process_heads: ProcessHeads | None
    ) -> tuple[Array, ...]:
        """The projections, each of shape (length, heads, size of a head), in one dtype."""
        project = lambda projection, x: jax.vmap(projection)(x).reshape(x.shape[0], self.num_heads, -1)
        heads = (
            project(self.query_proj, query),
            project(self.key_proj, key_),
            project(self.value_proj, value),
        )
        if process_heads is not None:
            shapes = [x.shape for x in heads]
            heads = process_heads(*heads)
            if [x.shape for x in heads] != shapes:
                raise ValueError(f"process_heads must not change the shapes {shapes}")
        return promote_to_inexact(heads)

    def _dropout_mask(
        self, shape: tuple[int, int], key: Array | None, inference: bool | None
    ) -> tuple[Array | None, float]:
        """Which weights the dropout layer keeps, and the probability of that.

        The layer itself draws them, head by head as in equinox, so that they are those of equinox.

        Args:
          shape: of the weights of one head.
          key: for dropout, as in ``__call__``.
          inference: whether there is no dropout; None: as the layer says.

        Returns:
          Boolean array of shape (1, heads, *shape), or None if all weights are kept; and the probability.
        """
        ones = jnp.ones(shape)
        if key is None:
            # The layer raises equinox's error if it needs a key.
            self.dropout(ones, inference=inference)
            return None, 1.0
        # The rate of an ensemble of layers is an array, through which equinox does not differentiate.
        rate = self.dropout.p
        rate = rate if isinstance(rate, int | float) else jax.lax.stop_gradient(rate)
        none_dropped = isinstance(rate, int | float) and rate == 0
        if none_dropped or (self.dropout.inference if inference is None else inference):
            return None, 1.0
        draw = lambda key: self.dropout(ones, key=key, inference=inference) > 0
        # Where all are dropped, the weights are 0 rather than 0 / 0.
        keep_prob = (rate < 1) * (1 - rate) + (rate >= 1)
        return jax.vmap(draw)(jax.random.split(key, self.num_heads))[None], keep_prob
