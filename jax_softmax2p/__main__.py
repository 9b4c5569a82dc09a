"""``python -m jax_softmax2p``: what runs here, and a demonstration on real text.

Trains a small causal attention model on the text of Python's own documentation, character by character,
twice from one seed: with this package's softmax and with ``jax.nn.softmax``. Then a table of speed and
error for a few shapes, and what ``keep_memory()`` would change.
"""

import argparse
import json
import sys
from typing import Any

from jax_softmax2p.demo.environment import describe_environment, format_environment
from jax_softmax2p.demo.memory import measure_keep_memory
from jax_softmax2p.demo.report import measure_shapes, train_both


def main() -> int:
    """Prints the report; the exit status says whether both trainings agreed."""
    parser = argparse.ArgumentParser(prog="python -m jax_softmax2p", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--steps", type=int, default=120, help="training steps (%(default)s)")
    options = parser.parse_args()
    if options.steps < 2:
        parser.error(f"--steps must be at least 2, got {options.steps}")

    show = _discard if options.json else _show
    report: dict[str, Any] = {"environment": describe_environment()}
    show(format_environment(report["environment"]))
    report["training"] = train_both(options.steps, show)
    report["shapes"] = measure_shapes(show)
    report["keep_memory"] = measure_keep_memory(show)
    if options.json:
        print(json.dumps(report, indent=2))
    return 0 if report["training"]["agree"] else 1


def _show(line: str) -> None:
    print(line, flush=True)


def _discard(line: str) -> None:
    pass


if __name__ == "__main__":
    sys.exit(main())
