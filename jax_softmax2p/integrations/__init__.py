"""This package's functions in other libraries: flax, equinox, and JAX itself.

    flax.nnx.MultiHeadAttention(..., attention_fn=integrations.flax_attention)
    flax.linen.MultiHeadDotProductAttention(..., attention_fn=integrations.flax_attention)
    integrations.EquinoxMultiheadAttention(...)  # with the constructor of equinox.nn.MultiheadAttention
    integrations.replace_equinox_attention(model)  # the same model with such layers, for an existing model
    with integrations.patch_jax_nn(): ...

Neither flax nor equinox is required: each is imported when something that needs it is used.
"""

from typing import TYPE_CHECKING, Any

from jax_softmax2p.integrations.equinox_models import replace_equinox_attention as replace_equinox_attention
from jax_softmax2p.integrations.flax_hook import flax_attention as flax_attention
from jax_softmax2p.integrations.jax_patch import patch_jax_nn as patch_jax_nn
from jax_softmax2p.integrations.patched_calls import HeldFunction as HeldFunction
from jax_softmax2p.integrations.patched_calls import PatchedCalls as PatchedCalls

if TYPE_CHECKING:
    from jax_softmax2p.integrations.equinox_layer import (
        EquinoxMultiheadAttention as EquinoxMultiheadAttention,
    )


def __getattr__(name: str) -> Any:
    # The class is a subclass of one of equinox's, so that its module imports equinox.
    if name == "EquinoxMultiheadAttention":
        from jax_softmax2p.integrations import equinox_layer

        return equinox_layer.EquinoxMultiheadAttention
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
