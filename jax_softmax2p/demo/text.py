"""The text of Python's own documentation, as tokens and in batches for training."""

import numpy as np


def documentation_text() -> str:
    """The text of CPython's ``pydoc_data.topics``, which comes with Python."""
    from pydoc_data.topics import topics

    return "\n".join(topics.values())


def character_tokens() -> tuple[np.ndarray, int]:
    """The documentation as indices of characters, an int32 vector, and how many different ones there are."""
    code_points = np.frombuffer(documentation_text().encode("utf-32-le"), np.uint32)
    vocabulary, tokens = np.unique(code_points, return_inverse=True)
    return tokens.astype(np.int32), len(vocabulary)


def sample_batch(rng: np.random.Generator, tokens: np.ndarray, batch: int, context: int) -> np.ndarray:
    """Excerpts from random places of a vector of tokens.

    Returns:
      Array of shape (batch, context + 1): each token but a row's last is followed by the one to predict.
    """
    starts = rng.integers(len(tokens) - context - 1, size=(batch, 1))
    return tokens[starts + np.arange(context + 1)]
