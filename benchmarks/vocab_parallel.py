"""``python -m benchmarks.vocab_parallel``: a classifier whose classes are sharded over devices or processes.

A training step with 1,000,003 classes, of which every device has a shard of the weights: the loss and its
gradient with ``softmax_cross_entropy_with_integer_labels(..., axis_name=...)``, and the same written with
jax.nn and jax.lax's pmax and psum, as in Megatron-LM (Shoeybi et al., arXiv 1909.08053, section 3). Both are
compared with float64 and timed in turn; collectives are counted in the compiled program.

The program starts the processes itself, on the loopback address, with XLA's collectives for CPUs (gloo).
"""

import argparse
import json
import math
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.options import natural_number, positive_integer

ROOT = Path(__file__).parent.parent
AXIS = "classes"
HEARTBEAT_TIMEOUT = 10  # Seconds after which the others learn that a process is dead.
COLLECTIVES = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"


class Problem(NamedTuple):
    """The sizes of the classifier and of a batch."""

    classes: int = 1_000_003
    features: int = 32
    batch: int = 64

    def arrays(self, shards: int) -> tuple[np.ndarray, ...]:
        """Weights (features, classes padded to a multiple of shards), inputs (batch, features) and labels."""
        rng = np.random.default_rng(0)
        padded = -(-self.classes // shards) * shards
        weights = np.zeros((self.features, padded), np.float32)
        weights[:, : self.classes] = rng.standard_normal((self.features, self.classes), np.float32)
        inputs = rng.standard_normal((self.batch, self.features), np.float32)
        return weights, inputs, rng.integers(self.classes, size=self.batch).astype(np.int32)

    def exact(self) -> tuple[float, np.ndarray, np.ndarray]:
        """The mean loss and its gradients for weights and inputs, in float64."""
        weights, inputs, labels = (np.asarray(x, np.float64) for x in self.arrays(1))
        at = labels.astype(np.int64)
        logits = inputs @ weights
        logits -= logits.max(1, keepdims=True)
        rows = np.arange(self.batch)
        label_logits = logits[rows, at]
        p = np.exp(logits, out=logits)
        total = p.sum(1, keepdims=True)
        p /= total
        p[rows, at] -= 1
        p /= self.batch
        return float(np.mean(np.log(total[:, 0]) - label_logits)), inputs.T @ p, p @ weights.T


def losses_by_all_gather(logits: Any, labels: Any, where: Any) -> Any:
    """Cross-entropies by this package, with one all-gather."""
    from jax_softmax2p import softmax_cross_entropy_with_integer_labels

    return softmax_cross_entropy_with_integer_labels(logits, labels, where=where, axis_name=AXIS)


def losses_by_all_reduces(logits: Any, labels: Any, where: Any) -> Any:
    """Cross-entropies with all-reduces of the maximum, then of the sum and the label's logit."""
    import jax
    import jax.numpy as jnp

    logits = jnp.where(where, logits, -jnp.inf)
    largest = jax.lax.pmax(jax.lax.stop_gradient(jnp.max(logits, -1)), AXIS)
    total = jax.lax.psum(jnp.sum(jnp.exp(logits - largest[:, None]), -1), AXIS)
    local_labels = labels - jax.lax.axis_index(AXIS) * logits.shape[-1]
    is_label = jax.nn.one_hot(local_labels, logits.shape[-1], dtype=bool)
    label_logits = jnp.sum(jnp.where(is_label, logits, 0), -1)
    return jnp.log(total) + largest - jax.lax.psum(label_logits, AXIS)


FORMULATIONS = {"ours": losses_by_all_gather, "jax.nn": losses_by_all_reduces}


def make_step(mesh: Any, classes: int, losses: Callable[..., Any]) -> Any:
    """The jitted step(weights, inputs, labels) -> loss, gradients for weights and inputs."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec as P

    def mean_loss(weights, inputs, labels):
        logits = inputs @ weights
        class_ids = jax.lax.axis_index(AXIS) * logits.shape[-1] + jnp.arange(logits.shape[-1])
        return jnp.mean(losses(logits, labels, (class_ids < classes)[None]))

    specs = P(None, AXIS), P(), P()
    sharded_loss = jax.shard_map(mean_loss, mesh=mesh, in_specs=specs, out_specs=P())
    return jax.jit(jax.value_and_grad(sharded_loss, (0, 1)))


def run(problem: Problem, rounds: int, started: Callable[[], object]) -> dict[str, Any]:
    """Measures the time, the collectives and the errors of each formulation on all devices.

    Args:
      problem: the sizes.
      rounds: how many steps of each formulation are timed.
      started: is called before the first timed step.
    """
    import jax
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    devices = jax.device_count()
    mesh = jax.make_mesh((devices,), (AXIS,), axis_types=(AxisType.Auto,))
    specs = P(None, AXIS), P(), P()
    place = lambda x, spec: jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda i: x[i])
    arguments = [place(x, spec) for x, spec in zip(problem.arrays(devices), specs, strict=True)]
    steps = {
        name: make_step(mesh, problem.classes, FORMULATIONS[name]).lower(*arguments).compile()
        for name in FORMULATIONS
    }
    exact = problem.exact()
    figures: dict[str, Any] = {"devices": devices, "processes": jax.process_count()}
    for name, step in steps.items():
        loss, gradients = step(*arguments)
        figures[name] = {
            "collectives": collectives(step.as_text()),
            "loss": float(loss),
            "error of the loss": abs(float(loss) - exact[0]),
            "errors of gradients": [_error(g, e) for g, e in zip(gradients, exact[1:], strict=True)],
            "seconds": [],
        }
    started()
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            jax.block_until_ready(step(*arguments))
            figures[name]["seconds"].append(time.perf_counter() - start)
    return figures


def collectives(hlo: str) -> list[tuple[str, int]]:
    """The collectives of a compiled program, and the bytes of the results of each on one device."""
    found = re.findall(rf"= (\([^)]*\)|\S+) ({COLLECTIVES})(?:-start)?\(", hlo)
    return [(kind, _size_of(shapes)) for shapes, kind in found]


def _size_of(shapes: str) -> int:
    sizes = re.findall(r"[a-z]+(\d*)\[([\d,]*)\]", shapes)  # Such as f32[8,1024]; pred[8] has one byte each.
    return sum(int(bits or 8) // 8 * math.prod(int(n) for n in dims.split(",") if n) for bits, dims in sizes)


def _error(gradient: Any, exact: np.ndarray) -> float:
    """The largest error of the shards of this process, in units of eps times the largest entry."""
    eps = np.finfo(np.float32).eps
    largest = np.abs(exact).max()
    errors = []
    for shard in gradient.addressable_shards:
        expected = exact[shard.index]  # It has no padding.
        actual = np.asarray(shard.data, np.float64)[:, : expected.shape[1]]
        errors.append(np.abs(actual - expected).max(initial=0) / (eps * largest))
    return float(max(errors))


def start_processes(count: int, problem: Problem, rounds: int, folder: str) -> list[subprocess.Popen]:
    """Starts that many processes, which write their logs and figures.json into the folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*_command(problem, rounds, folder), "--port", str(port), "--of", str(count)]
    processes = []
    for rank in range(count):
        with Path(folder, f"{rank}.log").open("wb") as log:
            arguments = [*command, "--rank", str(rank)]
            environment = _environment(1)
            processes.append(
                subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
            )
    return processes


def in_processes(count: int, problem: Problem, rounds: int, timeout: float = 600) -> dict[str, Any]:
    """The figures of that many processes, all of which have ended when it returns or raises.

    Raises:
      RuntimeError: a process failed; the message is its log.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = start_processes(count, problem, rounds, folder)
        try:
            for rank, process in enumerate(processes):
                if process.wait(timeout):
                    raise RuntimeError(Path(folder, f"{rank}.log").read_text(errors="replace")[-4000:])
            return json.loads(Path(folder, "figures.json").read_text(encoding="utf-8"))
        finally:
            for process in processes:
                process.kill()
                process.wait()


def on_devices(count: int, problem: Problem, rounds: int) -> dict[str, Any]:
    """The figures of one process with that many host devices."""
    with tempfile.TemporaryDirectory() as folder:
        command = _command(problem, rounds, folder)
        subprocess.run(command, cwd=ROOT, env=_environment(count), check=True)
        return json.loads(Path(folder, "figures.json").read_text(encoding="utf-8"))


def _command(problem: Problem, rounds: int, folder: str) -> list[str]:
    sizes = [word for name, size in problem._asdict().items() for word in (f"--{name}", str(size))]
    command = [sys.executable, "-m", "benchmarks.vocab_parallel", *sizes]
    return [*command, "--rounds", str(rounds), "--folder", folder]


def _environment(devices: int) -> dict[str, str]:
    flags = f"--xla_force_host_platform_device_count={devices}"
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def report(figures: dict[str, Any]) -> None:
    """Prints one line for each formulation."""
    where = f"{figures['processes']} processes, {figures['devices']} devices"
    medians = {name: statistics.median(figures[name]["seconds"]) for name in FORMULATIONS}
    for name in FORMULATIONS:
        measured = figures[name]
        exchanged = ", ".join(f"{kind} {size} B" for kind, size in measured["collectives"])
        errors = f"loss off by {measured['error of the loss']:.1e}, "
        errors += f"gradients by {max(measured['errors of gradients']):.1f} eps"
        print(f"{where}  {name:>6}  {1e3 * medians[name]:8.1f} ms  {errors}; {exchanged}")
    print(f"{where}  jax.nn / ours {medians['jax.nn'] / medians['ours']:.2f}")


def main() -> None:
    """Starts the processes and reports, or runs as one of these processes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vocab_parallel", description=__doc__)
    parser.add_argument(
        "--processes", type=positive_integer, nargs="*", default=[2, 4], help="how many, each with a device"
    )
    parser.add_argument(
        "--devices", type=positive_integer, nargs="*", default=[2, 4, 8], help="of one process"
    )
    parser.add_argument(
        "--rounds", type=natural_number, default=7, help="steps of each formulation that are timed"
    )
    for name, size in Problem()._asdict().items():
        parser.add_argument(f"--{name}", type=positive_integer, default=size)
    for name, kind in {"folder": str, "port": int, "rank": int, "of": int}.items():
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    problem = Problem(options.classes, options.features, options.batch)
    if options.folder is None:
        for count in options.processes:
            report(in_processes(count, problem, options.rounds))
        for count in options.devices:
            report(on_devices(count, problem, options.rounds))
        return
    import jax

    if options.port is not None:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        address = f"127.0.0.1:{options.port}"
        jax.distributed.initialize(
            address, options.of, options.rank, heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT
        )
    folder = Path(options.folder)
    figures = run(problem, options.rounds, (folder / "started").touch)
    if jax.process_index() == 0:
        (folder / "figures.json").write_text(json.dumps(figures), encoding="utf-8")


if __name__ == "__main__":
    main()
