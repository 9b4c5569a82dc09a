"""Equinox models whose attention layers are replaced by this package's."""

import dataclasses
from typing import Any, TypeVar

import jax

Model = TypeVar("Model")


def replace_equinox_attention(model: Model) -> Model:
    """The model with an EquinoxMultiheadAttention in place of every equinox.nn.MultiheadAttention.

    Args:
      model: a pytree, such as an equinox.Module. It is not changed.

    Returns:
      A pytree of the same leaves in the same order, which shares the weights. Its layers are of another
      class, so that what was made for the old structure, as an optimiser's state, does not fit.

    Example:
      >>> import equinox
      >>> from jax_softmax2p.integrations import replace_equinox_attention
      >>> layer = equinox.nn.MultiheadAttention(2, 8, key=jax.random.key(0))
      >>> type(replace_equinox_attention([layer])[0]).__name__
      'EquinoxMultiheadAttention'
    """
    import equinox

    from jax_softmax2p.integrations.equinox_layer import EquinoxMultiheadAttention

    original = equinox.nn.MultiheadAttention

    def replace(x: Any) -> Any:
        # A subclass of equinox's layer may compute something else, and stays.
        if type(x) is not original:
            return x
        layer: Any = object.__new__(EquinoxMultiheadAttention)
        for field in dataclasses.fields(x):
            object.__setattr__(layer, field.name, getattr(x, field.name))
        return layer

    return jax.tree.map(replace, model, is_leaf=lambda x: isinstance(x, original))
