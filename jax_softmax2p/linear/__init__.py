"""Losses of linear layers, and logsumexps of products, whose logits are never stored as a whole.

``api`` has the public functions, ``blocks`` computes losses and gradients block by block, ``derivatives``
tells JAX of that by primitives, and ``formula`` says what is computed in a block.
"""

from jax_softmax2p.linear.api import linear_softmax_cross_entropy as linear_softmax_cross_entropy
from jax_softmax2p.linear.api import logsumexp_of_products as logsumexp_of_products
