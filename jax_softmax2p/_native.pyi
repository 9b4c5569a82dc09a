from collections.abc import Sequence
from typing import Any

import numpy as np

FFI_API_VERSION: tuple[int, int]

def registrations() -> dict[str, Any]: ...
def algorithms() -> Sequence[str]: ...
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

# The submodule. A folder of stubs would be found as a namespace package where the library was not built.
class _Measurement:
    GUARDED: bool
    @staticmethod
    def cache_bytes() -> tuple[int, int]: ...
    @staticmethod
    def passes() -> Sequence[str]: ...
    @staticmethod
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
    @staticmethod
    def product_into(
        a: np.ndarray,
        b: np.ndarray,
        out: np.ndarray,
        dtype: str,
        rows: int,
        depth: int,
        columns: int,
        isa: str,
    ) -> None: ...
    @staticmethod
    def attention_into(
        query: np.ndarray,
        key: np.ndarray,
        value: np.ndarray,
        cotangent: np.ndarray | None,
        results: Sequence[np.ndarray],
        dtype: str,
        sizes: Sequence[int],
        scale: float,
        before: int,
        after: int,
        soft_cap: float,
        dropout_mask: np.ndarray | None,
        sinks: np.ndarray | None,
        isa: str,
        threads: int,
    ) -> None: ...
    @staticmethod
    def softmax_plan(
        dtype: str, outer: int, n: int, inner: int, algorithm: str, isa: str
    ) -> dict[str, bool]: ...

measurement: _Measurement
