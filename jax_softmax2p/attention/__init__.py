"""Scaled dot-product attention with the signature and the results of ``jax.nn.dot_product_attention``.

The modules, from the top:

- ``api``: the public function and the checks of its arguments.
- ``multi_head``: attention of (B, T, N, H) arrays: fused or composed, and their shardings.
- ``fused``: attention by one native kernel, which stores no logits.
- ``composed``: attention of matrix products and softmax: the layout by heads, queries without keys.
- ``blocks``: how batch, heads and queries are cut into blocks that are computed one after another.
- ``core``: attention of one block: two matrix products and the softmax between them.
- ``operands``: the records that these share.
"""

from jax_softmax2p.attention.api import dot_product_attention as dot_product_attention
