"""The demonstration ``python -m jax_softmax2p``: its text, model, training and report. It needs jax alone."""
