"""The tables of each section, and their targets."""

from collections.abc import Callable, Sequence
from functools import partial

from benchmarks import memory
from benchmarks.backends import (
    AddOne,
    Backend,
    EmptyCall,
    JaxNN,
    Kernel,
    MemoryLoop,
    MultiplyAdds,
    OnnxRuntime,
    OpenVino,
    Ours,
    OursPlain,
    Pass,
    ReadAndCopy,
    SciPy,
    Torch,
    cores,
)
from benchmarks.cases import CASES, SHORT_ROWS, SMALL_CALL, Case
from benchmarks.drop_in import programs, small
from benchmarks.memory_traffic import PAPER_BEST_OVER_TWO_PASS
from benchmarks.ratios import (
    AUTO_OVER_COPY,
    AUTO_OVER_READ_AND_COPY,
    BEST_OVER_TWO_PASS,
    JAX_OVER_OURS,
    MULTIPLY_ADDS_OVER_OURS,
    ORT_OVER_OURS,
    OURS_OVER_ADD,
    OURS_OVER_PLAIN,
    OURS_OVER_READ,
    OVER_OURS,
    RELOAD_OVER_AUTO,
    SPEED_UP,
    TORCH_OVER_OURS,
)
from benchmarks.results import Figure, Row
from benchmarks.runner import STATISTICS, Goal, Ratio, Summary, Table
from benchmarks.scaling import slopes
from jax_softmax2p import native

THREADS = 2
"""The number of threads in targets for several threads. XLA and torch use as many as there are cores."""

LONG_ROW = 2**24
"""The length of a row for each thread that is out of cache."""

CACHED_ROWS = (8, 16384)
"""The number of rows for each thread, and their length, that stay in the second-level cache."""

KERNEL_PROTOCOL = "softmax_into, warm, preallocated, aligned to 64 bytes"


def jit(isas: Sequence[str]) -> list[Table]:
    """Calls in jit along the last axis, with the active instruction set."""
    summaries = [
        summary
        for dtype, mean in (("float32", 3.5), ("bfloat16", 4.0))
        for summary in (
            Summary(
                JAX_OVER_OURS,
                (Goal("geometric mean", mean), Goal("minimum", 1.2)),
                f", {dtype}",
                partial(_is_of, dtype),
            ),
            Summary(
                TORCH_OVER_OURS,
                (Goal("geometric mean", 3.0), Goal("minimum", 1.0)),
                f", {dtype} from 128 KiB up",
                partial(_is_of, dtype, min_bytes=128 * 1024),
            ),
        )
    ]
    small = Summary(
        OURS_OVER_ADD, (Goal("maximum", 1.3),), f", {SMALL_CALL.name}", lambda case: case == SMALL_CALL
    )
    return [
        Table(
            "In jit, last axis",
            CASES["jit"],
            (Ours, JaxNN, AddOne, Torch),
            (JAX_OVER_OURS, TORCH_OVER_OURS, OURS_OVER_ADD),
            (*summaries, small),
            name="jit",
        ),
        Table(
            "In jit, results wherever the C library puts them, mostly into fresh memory",
            CASES["fresh memory"],
            (Ours, JaxNN, AddOne, Torch),
            (JAX_OVER_OURS, TORCH_OVER_OURS),
            keeps_memory=False,
        ),
    ]


def layouts(isas: Sequence[str]) -> list[Table]:
    """Calls in jit along axes that are not the last, and of short rows."""
    return [
        Table(
            "In jit, other layouts",
            CASES["layouts"],
            (Ours, JaxNN, Torch),
            (JAX_OVER_OURS, TORCH_OVER_OURS),
            (
                Summary(JAX_OVER_OURS, (Goal("minimum", 1.5),), ", axis not last", _has_inner_axis),
                Summary(TORCH_OVER_OURS, (Goal("minimum", 1.0),), ", axis not last", _has_inner_axis),
                Summary(
                    JAX_OVER_OURS,
                    (Goal("minimum", 2.0),),
                    f", {SHORT_ROWS.name}",
                    lambda case: case == SHORT_ROWS,
                ),
            ),
        )
    ]


def family(isas: Sequence[str]) -> list[Table]:
    """Calls in jit of logsumexp, cross-entropy, masked softmax, and gradients."""
    return [
        _family_table(
            "logsumexp",
            (Ours, JaxNN, Torch, partial(MemoryLoop, "read", threads=THREADS)),
            (8.0, 2.0),
            (0.0, 0.0),
            OURS_OVER_READ,
        ),
        _family_table("cross-entropy", (Ours, JaxNN, Torch), (4.0, 4.0, 1.0), (4.0, 4.0, 1.0)),
        _family_table("gradient", (Ours, JaxNN, Torch), (2.0, 2.0, 2.0), (0.0, 1.5, 1.5))._replace(
            name="peers"
        ),
        _family_table("masked", (Ours, JaxNN, Torch, OursPlain), (1.5,), (0.0,), OURS_OVER_PLAIN),
    ]


def attention(isas: Sequence[str]) -> list[Table]:
    """Attention, its gradient and a step of decoding in jit."""
    products = (partial(MultiplyAdds, THREADS),)
    return [
        _attention_table("attention", 1.8, 1.2, products, MULTIPLY_ADDS_OVER_OURS),
        _attention_table(
            "gradient of attention", 1.3, 1.2, products, MULTIPLY_ADDS_OVER_OURS, large_over_jax=1.5
        ),
        # The key is half of what is read.
        _attention_table("decode", 1.0, 1.0, (partial(MemoryLoop, "read", threads=THREADS),), OURS_OVER_READ),
    ]


def kernels(isas: Sequence[str]) -> list[Table]:
    """The kernels without JAX, for each instruction set."""
    return [
        make(isa)
        for isa in isas
        for make in (
            _out_of_cache,
            _in_cache,
            _against_copy,
            _thread_scaling_in_cache,
            _thread_scaling_out_of_cache,
        )
    ]


def peers(isas: Sequence[str]) -> list[Table]:
    """The same operations in other libraries, on as many threads."""
    other_libraries = (partial(OnnxRuntime, cores()), partial(OpenVino, cores()), SciPy)
    softmax = Table(
        f"Peers: softmax, {cores()} threads; ours is {KERNEL_PROTOCOL}, and so are onnxruntime and openvino",
        CASES["peers"],
        (partial(Kernel, "ours", threads=cores()), Torch, *other_libraries),
        OVER_OURS,
        (Summary(ORT_OVER_OURS, (Goal("minimum", 1.2),)),),
        name="peers",
    )
    return [
        softmax,
        *(
            Table(
                f"Peers: {operation}, {cores()} threads; ours, jax.nn and optax in jit",
                CASES[f"peers, {operation}"],
                (Ours, JaxNN, Torch, *other_libraries),
                OVER_OURS,
                name="peers",
            )
            for operation in ("log_softmax", "logsumexp", "cross-entropy", "attention")
        ),
    ]


def accuracy(isas: Sequence[str]) -> list[Table]:
    """The largest error of every library over the length of a row."""
    return [
        Table(
            "Error of softmax against float64, normal data and a ramp from -90 to 90",
            CASES["accuracy"],
            (Ours, JaxNN, Torch, partial(OnnxRuntime, cores()), partial(OpenVino, cores()), SciPy),
            quantity="ULP",
            name="accuracy",
        )
    ]


def scaling(isas: Sequence[str]) -> list[Table]:
    """Time and memory of a call in jit against the length of a row and against the number of rows."""
    return [
        Table(
            f"Scaling: {quantity} against {along}, in jit",
            CASES[f"scaling in {along}"],
            (Ours, JaxNN),
            quantity=quantity,
            name=f"scaling of {quantity} in {along}",
            # Below 10^6 elements, the overhead of a call dominates, and memory that the process already has
            # suffices.
            derive=partial(slopes, what=f"{quantity} against {along}", min_elements=10**6),
        )
        for along in ("n", "batch")
        for quantity in ("seconds", "bytes")
    ]


def paper(isas: Sequence[str]) -> list[Table]:
    """The experiments of arXiv 2001.04438: algorithms over length, their passes, and threads."""
    return [
        *(make(isa) for isa in isas for make in (_algorithms, _passes)),
        *(_long_row(isa, threads) for isa in isas for threads in _thread_counts()),
        _weak_scaling(),
    ]


SECTIONS: dict[str, Callable[[Sequence[str]], list[Table]]] = {
    "jit": jit,
    "layouts": layouts,
    "family": family,
    "attention": attention,
    "small": small,
    "programs": programs,
    "kernels": kernels,
    "paper": paper,
    "peers": peers,
    "accuracy": accuracy,
    "scaling": scaling,
}
"""Functions that make the tables of each section, from the instruction sets for `kernels` and `paper`."""

BOUNDS = {OURS_OVER_READ: 1.5, OURS_OVER_PLAIN: 1.15}
"""The upper bounds of ratios."""


def _family_table(
    name: str,
    backends: tuple[Callable[[], Backend], ...],
    over_jax: tuple[float, ...],
    over_torch: tuple[float, ...],
    bounded: Ratio | None = None,
) -> Table:
    """A table with a target for each of its shapes in float32, where 0 means none, and none for bfloat16."""
    summaries = []
    for case, jax_target, torch_target in zip(CASES[name], over_jax, over_torch, strict=False):
        for ratio, target in ((JAX_OVER_OURS, jax_target), (TORCH_OVER_OURS, torch_target)):
            if target:
                summaries.append(Summary(ratio, (Goal("minimum", target),), f", {case.name}", case.__eq__))
    if bounded is not None:
        of_float32 = Summary(
            bounded, (Goal("maximum", BOUNDS[bounded]),), ", float32", partial(_is_of, "float32")
        )
        summaries.append(of_float32)
    ratios = (JAX_OVER_OURS, TORCH_OVER_OURS, *([bounded] if bounded else []))
    return Table(f"In jit: {CASES[name][0].operation}", CASES[name], backends, ratios, tuple(summaries))


def _attention_table(
    name: str,
    over_jax: float,
    over_torch: float,
    baselines: tuple[Callable[[], Backend], ...],
    bound: Ratio,
    large_over_jax: float | None = None,
) -> Table:
    """A table with what the machine allows beside our time, and as the ratio ``bound``.

    ``large_over_jax`` is a target over JAX for the cases of a million elements or more, beside that of all.
    """
    goals = [(JAX_OVER_OURS, over_jax), (TORCH_OVER_OURS, over_torch)]
    summaries = [Summary(ratio, (Goal("minimum", target),)) for ratio, target in goals]
    if large_over_jax is not None:
        is_large = lambda case: case.elements >= 10**6
        goal = Goal("minimum", large_over_jax)
        summaries.append(Summary(JAX_OVER_OURS, (goal,), ", from a million elements on", is_large))
    return Table(
        f"In jit: {name}",
        CASES[name],
        (Ours, JaxNN, Torch, *baselines),
        (JAX_OVER_OURS, TORCH_OVER_OURS, bound),
        tuple(summaries),
    )


def _out_of_cache(isa: str) -> Table:
    summaries = [Summary(AUTO_OVER_READ_AND_COPY, (Goal("maximum", 1.2),), f", {isa}")]
    if isa in PAPER_BEST_OVER_TWO_PASS:
        goal = Goal("minimum", PAPER_BEST_OVER_TWO_PASS[isa])
        summaries.insert(0, Summary(BEST_OVER_TWO_PASS, (goal,), f", {isa}"))
    return Table(
        f"Kernels out of cache, {isa}, 1 thread: {KERNEL_PROTOCOL}",
        CASES["kernels, out of cache"],
        (*(partial(Kernel, name, algorithm=name, isa=isa) for name in native.ALGORITHMS), ReadAndCopy),
        (BEST_OVER_TWO_PASS, AUTO_OVER_READ_AND_COPY),
        tuple(summaries),
    )


PAPER_PROTOCOL = "uniform data; outputs take turns and are out of the caches, x is where it was left"


def _algorithms(isa: str) -> Table:
    return Table(
        f"The paper's algorithms and auto over length, {isa}, 1 thread: {PAPER_PROTOCOL}",
        CASES["paper"],
        tuple(partial(Kernel, name, algorithm=name, isa=isa, rotates=True) for name in native.ALGORITHMS),
        (BEST_OVER_TWO_PASS,),
        name="algorithms",
        isa=isa,
        derive=partial(_best_out_of_cache, isa),
    )


def _best_out_of_cache(isa: str, rows: Sequence[Row]) -> list[Figure]:
    ratios = [row.ratios[BEST_OVER_TWO_PASS.name] for row in rows if row.case.bytes > native.cache_bytes()[1]]
    if not ratios:
        return []
    paper = PAPER_BEST_OVER_TWO_PASS.get(isa)
    reported = f" (the paper, on Skylake-X: up to {paper})" if paper else ""
    label = f"{BEST_OVER_TWO_PASS.name}, {isa}, x larger than the last cache{reported}"
    return [Figure(label, statistic, of(ratios)) for statistic, of in STATISTICS.items()]


def _passes(isa: str) -> Table:
    return Table(
        f"The passes by themselves and the loops of memory.cc, {isa}, 1 thread: {PAPER_PROTOCOL}",
        CASES["passes"],
        (
            *(partial(Pass, name, isa) for name in native.PASSES),
            *(partial(MemoryLoop, name, label=f"memory: {name}", rotates=True) for name in memory.LOOPS),
        ),
        name="passes",
        isa=isa,
    )


def _long_row(isa: str, threads: int) -> Table:
    return Table(
        f"Weak scaling out of cache: one row of {LONG_ROW:,} elements a thread, {isa}, "
        f"{_threads(threads)}: {KERNEL_PROTOCOL}",
        (Case((1, LONG_ROW * threads)),),
        tuple(partial(Kernel, name, algorithm=name, isa=isa, threads=threads) for name in native.ALGORITHMS),
        (BEST_OVER_TWO_PASS,),
        name="threads",
        isa=isa,
    )


def _weak_scaling() -> Table:
    counts = _thread_counts()
    rows, n = CACHED_ROWS
    return Table(
        f"Weak scaling in cache: {rows} rows of {n} a thread, {KERNEL_PROTOCOL}; all thread counts on all",
        tuple(Case((rows * count, n)) for count in counts),
        tuple(partial(Kernel, _threads(count), threads=count) for count in counts),
        derive=_weak_efficiency,
    )


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def _thread_counts() -> list[int]:
    """The powers of two up to the number of cores, and that number."""
    return sorted({*(2**k for k in range(cores().bit_length())), cores()})


def _weak_efficiency(rows: Sequence[Row]) -> list[Figure]:
    """The time of one thread for its rows over the time of several for theirs; 1 is perfect weak scaling."""
    rows_per_thread = CACHED_ROWS[0]
    medians = {row.case.shape[0] // rows_per_thread: row.medians for row in rows}
    if 1 not in medians:
        return []
    one_thread = medians[1][_threads(1)]
    return [
        Figure(
            f"weak scaling in cache, {_threads(count)}", "efficiency", one_thread / of_all[_threads(count)]
        )
        for count, of_all in medians.items()
        if count > 1
    ]


def _in_cache(isa: str) -> Table:
    l1, l2 = CASES["kernels, in cache"]
    return Table(
        f"Kernels in L1 and L2, {isa}, 1 thread: {KERNEL_PROTOCOL}",
        (l1, l2),
        (
            *(partial(Kernel, name, algorithm=name, isa=isa) for name in ("auto", "three_pass_reload")),
            partial(EmptyCall, isa),
        ),
        (RELOAD_OVER_AUTO,),
        (
            Summary(RELOAD_OVER_AUTO, (Goal("minimum", 1.0),), f", {isa}, in L1", lambda case: case == l1),
            Summary(RELOAD_OVER_AUTO, (Goal("minimum", 1.15),), f", {isa}, in L2", lambda case: case == l2),
        ),
    )


def _against_copy(isa: str) -> Table:
    return Table(
        f"Rows in cache, together out of it, {isa}, {THREADS} threads: {KERNEL_PROTOCOL}",
        CASES["kernels, against a copy"],
        (
            partial(Kernel, "auto", isa=isa, threads=THREADS),
            partial(MemoryLoop, "non-temporal copy", threads=THREADS),
        ),
        (AUTO_OVER_COPY,),
        (Summary(AUTO_OVER_COPY, (Goal("maximum", 1.3),), f", {isa}"),),
    )


def _thread_scaling_in_cache(isa: str) -> Table:
    return _speed_up(isa, "in cache", 1.7)


def _thread_scaling_out_of_cache(isa: str) -> Table:
    return _speed_up(isa, "out of cache", 1.0)


def _speed_up(isa: str, where: str, target: float) -> Table:
    return Table(
        f"{THREADS} threads against 1, {where}, {isa}: {KERNEL_PROTOCOL}; each call starts its threads",
        CASES[f"kernels, {THREADS} threads {where}"],
        (partial(Kernel, "1 thread", isa=isa), partial(Kernel, "2 threads", isa=isa, threads=THREADS)),
        (SPEED_UP,),
        (Summary(SPEED_UP, (Goal("minimum", target),), f", {isa}, {where}"),),
    )


def _is_of(dtype: str, case: Case, min_bytes: int = 0) -> bool:
    return case.dtype == dtype and case.bytes >= min_bytes


def _has_inner_axis(case: Case) -> bool:
    return case.axis != -1
