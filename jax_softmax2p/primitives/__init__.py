"""The JAX primitives, one module each: evaluation, differentiation, batching and lowering."""
