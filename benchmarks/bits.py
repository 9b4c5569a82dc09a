"""``python -m benchmarks.bits OUT.json [--compare OLD.json]``: hashes of results, to prove that bits stay.

Hashes the results of the public operations over a grid of shapes, dtypes and instruction sets. Two equal
files say that a change kept every bit. The inputs come from a seeded NumPy generator, and only public names
are used, so that the same program also runs against an older checkout: ``jax_softmax2p`` is taken from
PYTHONPATH where that has it, and from this checkout otherwise.

NaNs are hashed as one NaN: their sign and payload are not part of any result.
"""

import argparse
import functools
import hashlib
import json
import math
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_softmax2p as s2p
from benchmarks.options import existing_file
from jax_softmax2p import native

ROOT = pathlib.Path(__file__).parent.parent

DTYPES = (np.float32, np.float64, jnp.bfloat16, np.float16)

KERNEL_LENGTHS = (*range(1, 301, 3), 512, 1000, 4096, 70_000)
"""Lengths of rows for the kernels on NumPy arrays. They need no compilation, so there are many."""

LENGTHS = (1, 2, 7, 16, 33, 100, 129, 300, 512, 1000, 4096, 70_000)
"""The lengths of rows on which the basic operations run inside jit."""

OPERAND_LENGTHS = (7, 129, 4096)
"""The lengths on which every combination of operands runs, with derivatives, along each axis."""

VERY_LONG = 2**20 + 3
"""The length of a row that threads share."""

Results = Iterator[tuple[str, Any]]
Function = Callable[..., Any]


def main() -> None:
    """Hashes, writes the file, and compares it with an older one."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bits", description=__doc__.split("\n\n")[0])
    parser.add_argument("output", type=pathlib.Path, metavar="OUT.json", nargs="?", help="file to write")
    parser.add_argument(
        "--compare",
        type=existing_file,
        metavar="OLD.json",
        help="list what differs from this earlier file; the exit status is 1 if anything does",
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        json.dump(hashes_of_active_isa(), sys.stdout)
        return
    if options.output is None:
        parser.error("OUT.json is missing")
    old = json.loads(options.compare.read_text(encoding="utf-8")) if options.compare else None
    new = hashes_of_all_isas()
    options.output.write_text(json.dumps(new, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"{len(new)} hashes are in {options.output}")
    if old is not None:
        lines = differences(old, new)
        print("\n".join(lines) or "no difference")
        sys.exit(1 if lines else 0)


def differences(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """One line for each result that has other bits, or that only one of the files has."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        if key not in new:
            lines.append(f"only in the old file: {key}")
        elif key not in old:
            lines.append(f"only in the new file: {key}")
        elif old[key] != new[key]:
            lines.append(f"differs: {key}")
    return lines


def hashes_of_all_isas() -> dict[str, str]:
    """Hashes by name, each name beginning with the instruction set; one process runs for each of these."""
    code = "from jax_softmax2p import native; print(native.__file__, *native.supported_isas())"
    location, *isas = _run_python("-c", code).split()
    print(f"hashing the results of {pathlib.Path(location).parent}", flush=True)
    run = lambda isa: json.loads(_run_python(__file__, "--worker", JAX_SOFTMAX2P_ISA=isa))
    with ThreadPoolExecutor() as threads:
        by_isa = dict(zip(isas, threads.map(run, isas), strict=True))
    return {f"{isa}: {name}": value for isa, hashes in by_isa.items() for name, value in hashes.items()}


def _run_python(*arguments: str, **environment: str) -> str:
    """The output of a process whose jax_softmax2p is PYTHONPATH's, or else this checkout's."""
    path = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)])
    devices = "--xla_force_host_platform_device_count=2"
    settings = {
        "PYTHONPATH": path,
        "JAX_ENABLE_X64": "1",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": devices,
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    # -P: neither this file's folder nor the current one comes before PYTHONPATH.
    return subprocess.run(
        [sys.executable, "-P", *arguments],
        env={**os.environ, **settings, **environment},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout


def hashes_of_active_isa() -> dict[str, str]:
    """Hashes by name, computed with the instruction set that JAX_SOFTMAX2P_ISA names."""
    parts = (kernel_results, basic_results, operand_results, axis_results, attention_results, sharded_results)
    return {name: hash_of(result) for part in parts for name, result in part()}


def hash_of(result: Any) -> str:
    """The hash of an array, or of the arrays of a pytree: of their shapes, dtypes and bits."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(result):
        array = np.array(leaf)
        array[np.isnan(array)] = np.nan
        digest.update(f"{array.shape} {array.dtype}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def normal(*shape: int, dtype: Any = np.float32, seed: int = 0) -> np.ndarray:
    """Normal numbers with a standard deviation of 3, which depend on shape and seed alone."""
    rng = np.random.default_rng([seed, *shape])
    return (3 * rng.standard_normal(shape)).astype(dtype)


def edge_rows(n: int, dtype: Any) -> np.ndarray:
    """Rows of shape (14, n) with every kind of special value, and with none."""
    x = normal(14, n).astype(np.float64)
    lowest = float(jnp.finfo(dtype).min)
    middle, third = n // 2, np.arange(n) % 3 == 1
    x[0, middle] = np.nan
    x[1, middle] = np.inf
    x[2, third] = -np.inf
    x[3] = -np.inf
    x[4, third] = lowest
    x[5] = lowest
    x[6, third] = -1e30
    x[7] = 1.5
    x[8] += 1e6
    x[9] += 5e7
    x[10] -= 5e7
    x[11, 0] = 60
    x[12] *= 100
    with np.errstate(over="ignore"):  # The largest of these are infinities of float16.
        return x.astype(dtype)


def inputs_of(n: int, dtype: Any) -> dict[str, np.ndarray]:
    """Two arrays of the same shape: ordinary numbers, and rows with special values."""
    edges = edge_rows(n, dtype)
    return {"normal": normal(*edges.shape, dtype=dtype), "edges": edges}


def kernel_results() -> Results:
    """The kernels on NumPy arrays: each algorithm, along each axis, and the product with the Jacobian."""
    for dtype in DTYPES:
        label = np.dtype(dtype).name
        arrays = {f"({n}) {kind}": (x, -1) for n in KERNEL_LENGTHS for kind, x in inputs_of(n, dtype).items()}
        arrays[f"({VERY_LONG})"] = normal(1, VERY_LONG, dtype=dtype), -1
        for n in (2, 9, 40, 129, 300, 1000, 4097):
            arrays[f"({n}, 7) axis 0"] = np.ascontiguousarray(edge_rows(n, dtype)[7:].T), 0
            arrays[f"(3, {n}, 20) axis 1"] = normal(3, n, 20, dtype=dtype), 1
        for name, (x, axis) in arrays.items():
            y = np.empty_like(x)
            for algorithm in native.ALGORITHMS:
                native.softmax_into(x, y, axis=axis, algorithm=algorithm, threads=2)
                yield f"softmax_into {algorithm} {label} {name}", y
            out, t = np.empty_like(x), normal(*x.shape, dtype=dtype, seed=1)
            native.softmax_jacobian_into(y, t, out, axis=axis, threads=2)
            yield f"softmax_jacobian_into {label} {name}", out


def basic_results() -> Results:
    """Every operation on logits alone, inside jit, with its VJP, over many lengths."""
    for dtype in DTYPES:
        for n in LENGTHS:
            for kind, x in inputs_of(n, dtype).items():
                yield from _named(jax.jit(_all_basic)(x, _labels(x)), f"{np.dtype(dtype).name} ({n}) {kind}")
        x = normal(1, VERY_LONG, dtype=dtype)
        yield from _named(jax.jit(_all_basic)(x, _labels(x)), f"{np.dtype(dtype).name} ({VERY_LONG})")


def operand_results() -> Results:
    """Every operation with scale, bias and masks, inside jit, with its VJP and JVP."""
    for dtype in DTYPES:
        for n in OPERAND_LENGTHS:
            for kind, x in inputs_of(n, dtype).items():
                yield from _named(_run_with_operands(x, -1), f"{np.dtype(dtype).name} ({n}) {kind}")


def axis_results() -> Results:
    """The same along axes that are not the last."""
    for dtype in DTYPES:
        for n in OPERAND_LENGTHS:
            for shape, axis in (((n, 5), 0), ((2, n, 3), 1)):
                results = _run_with_operands(normal(*shape, dtype=dtype), axis)
                yield from _named(results, f"{np.dtype(dtype).name} {shape} axis {axis}")


def attention_results() -> Results:
    """Attention and its gradient, with masks and in blocks of queries."""
    variants: dict[str, dict[str, Any]] = {
        "plain": {},
        "causal": {"is_causal": True},
        "window, blocks": {"local_window_size": (9, 2), "query_block_size": 16},
        "lengths": {"key_value_seq_lengths": np.array([5, 40], np.int32)},
        "bias, mask": {"bias": normal(1, 4, 33, 40), "mask": normal(2, 1, 33, 40, seed=1) < 3},
    }
    attend = functools.partial(s2p.dot_product_attention, implementation="native")
    for dtype in DTYPES:
        query = normal(2, 33, 4, 16, dtype=dtype)
        key, value = (normal(2, 40, 2, 16, dtype=dtype, seed=seed) for seed in (1, 2))
        for name, options in variants.items():
            cast = {key: value.astype(dtype) for key, value in options.items() if key == "bias"}
            run = jax.jit(functools.partial(_with_vjp, functools.partial(attend, **(options | cast))))
            yield f"attention {name} {np.dtype(dtype).name}", run(query, key, value)


def sharded_results() -> Results:
    """The operations inside shard_map along an axis that two devices share."""
    mesh = jax.make_mesh((2,), ("v",), axis_types=(jax.sharding.AxisType.Auto,))
    spec, rows = jax.sharding.PartitionSpec(None, "v"), jax.sharding.PartitionSpec()
    functions: dict[str, tuple[Function, jax.sharding.PartitionSpec]] = {
        "softmax": (functools.partial(s2p.softmax, axis_name="v"), spec),
        "log_softmax": (functools.partial(s2p.log_softmax, axis_name="v"), spec),
        "logsumexp": (functools.partial(s2p.logsumexp, axis=-1, axis_name="v"), rows),
        "cross-entropy": (
            lambda x: s2p.softmax_cross_entropy_with_integer_labels(x, jnp.arange(14), axis_name="v"),
            rows,
        ),
    }
    for name, (function, out) in functions.items():
        sharded = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=out)
        run = jax.jit(functools.partial(_with_vjp, sharded))
        for kind, x in inputs_of(258, np.float32).items():
            yield f"sharded {name} {kind}", run(x)


def _all_basic(x: jax.Array, labels: jax.Array) -> dict[str, Any]:
    """By name: the result of each operation along the last axis, and its VJP."""
    functions: dict[str, Function] = {
        "softmax": s2p.softmax,
        "log_softmax": s2p.log_softmax,
        "logsumexp": functools.partial(s2p.logsumexp, axis=-1),
        "integer cross-entropy": lambda x, **options: s2p.softmax_cross_entropy_with_integer_labels(
            x, labels, **options
        ),
    }
    return {
        name: _with_vjp(functools.partial(function, implementation="native"), x)
        for name, function in functions.items()
    }


def _run_with_operands(x: np.ndarray, axis: int) -> dict[str, Any]:
    """The results of _all_with_operands inside jit, for operands that depend on x's shape and dtype alone."""
    per_row = tuple(1 if i == axis % x.ndim else size for i, size in enumerate(x.shape))
    scale = (1 + np.abs(normal(*per_row, seed=2)) / 8).astype(x.dtype)
    bias = normal(*x.shape[1:], dtype=x.dtype, seed=3)
    mask = normal(*x.shape, seed=4) < 2
    probabilities = np.abs(normal(*x.shape, seed=5)).astype(x.dtype)
    rows = [size for i, size in enumerate(x.shape) if i != axis % x.ndim]
    labels = (np.arange(math.prod(rows)) % x.shape[axis]).astype(np.int32).reshape(rows)
    run = jax.jit(_all_with_operands, static_argnames="axis")
    return run(x, scale, bias, mask, probabilities, labels, axis=axis)


def _all_with_operands(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    mask: jax.Array,
    probabilities: jax.Array,
    labels: jax.Array,
    axis: int,
) -> dict[str, Any]:
    """By name: each operation with each kind of operands, its VJP in all of these, and its JVP in x."""
    wheres: dict[str, Any] = {"where": mask}
    if axis == -1:
        wheres["band"] = s2p.Band(before=x.shape[-1] // 2, after=3)
    results: dict[str, Any] = {}
    functions: dict[str, Function] = {
        "softmax": s2p.softmax,
        "log_softmax": s2p.log_softmax,
        "logsumexp": s2p.logsumexp,
    }
    for name, function in functions.items():
        call = functools.partial(function, axis=axis, implementation="native")
        results[f"{name} jvp"] = jax.jvp(call, (x,), (jnp.cos(x),))
        results[f"{name} scale, bias"] = _with_vjp(
            lambda x, scale, bias, call=call: call(x, scale=scale, bias=bias), x, scale, bias
        )
        for kind, where in wheres.items():
            results[f"{name} {kind}"] = _with_vjp(functools.partial(call, where=where), x)
            results[f"{name} scale, bias, {kind}"] = call(x, scale=scale, bias=bias, where=where)
    sum_exp = functools.partial(s2p.sum_exp, axis=axis, implementation="native")
    results["sum_exp"] = sum_exp(x)
    results["sum_exp log, where"] = _with_vjp(lambda x: sum_exp(x, where=mask).log(), x)
    soft = functools.partial(s2p.softmax_cross_entropy, axis=axis, implementation="native")
    results["soft cross-entropy"] = _with_vjp(soft, x, probabilities)
    results["soft cross-entropy where"] = soft(x, probabilities, where=mask)
    hard = functools.partial(
        s2p.softmax_cross_entropy_with_integer_labels, axis=axis, implementation="native"
    )
    results["integer cross-entropy where"] = _with_vjp(lambda x: hard(x, labels, where=mask), x)
    return results


def _labels(x: np.ndarray) -> np.ndarray:
    return (np.arange(len(x)) % x.shape[-1]).astype(np.int32)


def _with_vjp(function: Function, *operands: jax.Array) -> tuple[Any, Any]:
    """The result, and the VJP at it of a cotangent that is no constant."""
    y, vjp = jax.vjp(function, *operands)
    cotangent = jnp.cos(jnp.arange(y.size, dtype=np.float32)).reshape(y.shape).astype(y.dtype)
    return y, vjp(cotangent)


def _named(results: Mapping[str, Any], suffix: str) -> Results:
    for name, result in results.items():
        yield f"{name} {suffix}", result


if __name__ == "__main__":
    main()
