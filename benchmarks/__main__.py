"""``python -m benchmarks``: ours against jax.nn.softmax, in jit, as ratios within one run."""

import argparse
import json
import pathlib
import statistics
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_softmax2p
from benchmarks.cases import CASES, SMALL_CALL, Case
from jax_softmax2p import measure
from jax_softmax2p.__main__ import describe_environment


def main() -> None:
    """Runs the cases and prints a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", metavar="TEXT", default="", help="cases whose name contains TEXT")
    parser.add_argument("--quick", action="store_true", help="3 rounds instead of 9")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    cases = [case for case in CASES if options.only in case.name]
    if not cases:
        parser.error(f"--only {options.only!r} matches none of: {', '.join(c.name for c in CASES)}")

    environment = describe_environment()
    for key, value in environment.items():
        print(f"{key:>16}  {value}")
    headings = [f"{'case':>24}", *(f"{name:>10}" for name in ("ours", "jax.nn", "x + 1"))]
    print("", "  ".join([*headings, f"{'jax.nn / ours':>13}", f"{'ours / (x+1)':>12}"]), sep="\n")
    results = [run(case, 3 if options.quick else 9) for case in cases]
    ratios = [result["ratio"] for result in results]
    print(f"\njax.nn / ours: geometric mean {statistics.geometric_mean(ratios):.2f}, least {min(ratios):.2f}")
    for result in results:
        if result["case"] == SMALL_CALL.name:
            print(f"a small call costs {result['against_add']:.2f} × jit(x + 1)")
    if options.json:
        options.json.write_text(json.dumps({"environment": environment, "cases": results}, indent=2))


def run(case: Case, rounds: int) -> dict[str, Any]:
    """Times one case and prints its line."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal(case.shape), case.dtype)
    functions = {
        "ours": jax.jit(jax_softmax2p.softmax),
        "jax.nn": jax.jit(jax.nn.softmax),
        "x + 1": jax.jit(lambda x: x + 1),
    }
    times = measure.alternating_medians({name: partial(f, x) for name, f in functions.items()}, rounds=rounds)
    result = {
        "case": case.name,
        "seconds": times,
        "ratio": times["jax.nn"] / times["ours"],
        "against_add": times["ours"] / times["x + 1"],
    }
    columns = "  ".join(f"{times[name] * 1e6:7.1f} µs" for name in functions)
    print(
        f"{case.name:>24}  {columns}  {result['ratio']:12.2f}×  {result['against_add']:11.2f}×",
        flush=True,
    )
    return result


if __name__ == "__main__":
    main()
