from collections.abc import Sequence
from typing import Any

import numpy as np

FFI_API_VERSION: tuple[int, int]
GUARDED: bool

def registrations() -> dict[str, Any]: ...
def algorithms() -> Sequence[str]: ...
def passes() -> Sequence[str]: ...
def cache_bytes() -> tuple[int, int]: ...
def supported_isas() -> Sequence[str]: ...
def active_isa() -> str: ...
def softmax_into(
    x: np.ndarray,
    out: np.ndarray,
    dtype: str,
    copies: int,
    outer: int,
    n: int,
    inner: int,
    algorithm: str,
    isa: str,
    threads: int,
) -> None: ...
def pass_into(
    name: str,
    x: np.ndarray,
    out: np.ndarray,
    copies: int,
    n: int,
    maximum: float,
    isa: str,
    threads: int,
) -> float | None: ...
def softmax_plan(dtype: str, outer: int, n: int, inner: int, algorithm: str, isa: str) -> dict[str, bool]: ...
def softmax_jacobian_into(
    y: np.ndarray,
    t: np.ndarray,
    out: np.ndarray,
    dtype: str,
    outer: int,
    n: int,
    inner: int,
    isa: str,
    threads: int,
) -> None: ...
