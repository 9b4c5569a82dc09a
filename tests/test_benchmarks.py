"""The benchmarks without their measurements: saving, comparing, fitting, plotting, and worker processes."""

import argparse
import ast
import math
import os
import pathlib
import signal

import jax
import mpmath
import numpy as np
import pytest
from processes import ROOT

import jax_softmax2p
from benchmarks import (
    bits,
    compare,
    margins,
    memory_traffic,
    options,
    plots,
    runner,
    scaling,
    sections,
    workers,
)
from benchmarks.__main__ import make_outputs
from benchmarks.backends import Backend, Ours, Torch
from benchmarks.cases import Case
from benchmarks.claims import claims
from benchmarks.markdown import markdown
from benchmarks.progress import Progress
from benchmarks.results import Figure, Result, Results, Row
from jax_softmax2p import native

CACHES = {"L1": 2**15, "L2": 2**20, "L3": 2**25}


def result(rows, name="jit", quantity="seconds", isa=""):
    figure = Figure("jax.nn / ours", "minimum", 1.5, 1.2, True)
    return Result("A table", name, quantity, isa, rows, [figure, Figure("ours", "slope", 1.0)], 0.25)


def row(case, ratio, **medians):
    return Row(case, {name: [m / 2, m, m * 2] for name, m in medians.items()}, {"jax.nn / ours": ratio})


def results(*tables, **environment):
    names = {"CPU": "a CPU", **environment}
    return Results(names, CACHES, {"n": [2**22], "batch": [2**22]}, {"a section": list(tables)})


def test_save_and_load(tmp_path):
    case = Case((2, 1024), axis=0, dtype="bfloat16", operation="logsumexp", data="ramp")
    saved = results(result([row(case, 2.0, ours=1e-3, torch=1.25e-6)]))
    saved = saved._replace(training={"ours": {"losses": [0.123456789]}})
    saved.save(tmp_path / "folder" / "a.json")
    assert Results.load(tmp_path / "folder" / "a.json") == saved
    table = markdown(saved).splitlines()
    assert "| logsumexp (2,1024) axis 0 bfloat16 ramp | 1.00 ms | 1.2 µs | 2.00× |" in table
    assert "- jax.nn / ours: minimum 1.50 (target 1.2)" in table
    (tmp_path / "b.json").write_text('{"sections": 3}')
    with pytest.raises(ValueError, match=r"b\.json does not hold results of benchmarks"):
        Results.load(tmp_path / "b.json")


def test_report_lists_ratios_that_differ():
    one, other = Case((1, 1024)), Case((64, 64))
    before = results(result([row(one, 2.0, ours=1), row(other, 3.0, ours=1)]), commit="before")
    now = results(result([row(one, 2.3, ours=1), row(other, 2.5, ours=1)]), commit="now")
    assert list(compare.report(before, now)) == [
        "commit: before before, now now",
        "1 of 2 ratios differ by more than 15%",
        "  3.00 → 2.50  jax.nn / ours, (64,64) float32  [A table]",
    ]
    renamed = now._replace(sections={"a section": [result([row(one, 2.3, ours=1)])._replace(title="Other")]})
    assert "0 of 0 ratios differ by more than 15%" in compare.report(before, renamed)


def test_compare_with_a_revision():
    table = runner.Table("softmax", (Case((1, 8)),), (Ours, Torch))
    other = table._replace(backends=(Torch,))
    folder = pathlib.Path("folder")
    (raced,) = compare.against_revision({"jit": [table, other]}, folder, "v1")["jit"]
    assert raced.backends[0] is Ours
    assert raced.backends[1].folder == folder
    assert raced.backends[1].factory().name == "v1"
    with pytest.raises(ValueError, match="no-such-revision"), compare.installed("no-such-revision"):
        pass


class Named(Backend):
    """A backend that does nothing, named after an environment variable of its process."""

    computes = False

    def __init__(self):
        self.name = os.environ.get("MALLOC_ARENA_MAX", "as it comes")

    def _bind(self, case, x, out):
        return lambda: None


class Missing(Named):
    def __init__(self):
        raise ImportError("a library is missing")


@pytest.mark.long(quantity="seconds", keeps_memory=True)
@pytest.mark.parametrize(
    ("quantity", "keeps_memory", "name", "samples"),
    [("seconds", True, "1", 6), ("seconds", False, "as it comes", 6), ("ULP", True, "as it comes", 1)],
)
def test_sweeps_are_merged(capsys, monkeypatch, quantity, keeps_memory, name, samples):
    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    monkeypatch.setitem(runner.MEASURES, "ULP", lambda backends, *_: {each: [1.0] for each in backends})
    cases = (Case((1, 8)), Case((2, 8)))
    table = runner.Table("T", cases, (Named, Missing), quantity=quantity, keeps_memory=keeps_memory)
    measured = runner.run_table(table, runner.Effort(2, 3, 1, 1e-4), Progress(0))
    assert [row.case for row in measured.rows] == list(cases)
    for row in measured.rows:
        assert {each: len(values) for each, values in row.samples.items()} == {name: samples}
    assert capsys.readouterr().out.count("left out: a library is missing") == 1
    assert "MALLOC_ARENA_MAX" not in os.environ


class Compiling(Named):
    """A backend that compiles a program, named after how many programs processes had compiled before it."""

    def __init__(self):
        self.name = str(len(list(pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"]).glob("*-cache"))))

    def _bind(self, case, x, out):
        return jax.jit(lambda: jax.numpy.cos(x))


def test_processes_share_compiled_programs(monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    with workers.compiling_once():
        folder = pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
        for expected in ("0", "1"):
            with workers.Worker(Compiling) as worker:
                assert worker.introduce() == (expected, False)
                worker.prepare(Case((1, 8)))
        assert len(list(folder.glob("*-cache"))) == 1
    assert not folder.exists()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ


class Killed(Named):
    def _bind(self, case, x, out):
        os.kill(os.getpid(), signal.SIGKILL)


def test_killed_worker_raises():
    table = runner.Table("T", (Case((1, 8)),), (Killed,))
    with pytest.raises(RuntimeError, match="killed it for want of memory"):
        runner.run_table(table, runner.Effort(1, 1, 1, 1e-4), Progress(0))


def test_slopes():
    x = np.geomspace(10, 1e6, 7)
    assert math.isclose(scaling.slope(x, 3 * x**1.5), 1.5)
    with pytest.raises(ValueError, match="at least two different x"):
        scaling.slope([2.0, 2.0], [1.0, 3.0])
    rows = [row(Case((1, n)), 1.0, ours=n**2 if n >= 100 else 7.0) for n in (10, 100, 1000, 10000)]
    (figure,) = scaling.slopes(rows, "time", min_elements=100)
    assert figure.of == "time of ours"
    assert math.isclose(figure.value, 2)


def test_crossovers_are_where_auto_changes():
    for elements in scaling.crossovers(lambda n: (1, n, 1)):
        plans = [native.softmax_plan((1, n, 1)) for n in (elements - 1, elements)]
        assert plans[0] != plans[1]
    last = native.cache_bytes()[1]
    assert last // 8 + 1 in scaling.crossovers(lambda n: (1, n, 1))  # x and y together exceed the cache.


def test_memory_traffic():
    """The counts are those of arXiv 2001.04438."""
    assert set(memory_traffic.TRAFFIC) == set(native.PASSES)
    assert set(memory_traffic.PASSES_OF) == set(native.ALGORITHMS) - {"auto"}
    paper = memory_traffic.PAPER_ELEMENTS_MOVED
    assert paper == {name: memory_traffic.ELEMENTS_MOVED[name] for name in paper}
    assert memory_traffic.ELEMENTS_MOVED["two_pass_reload"] == 4
    assert memory_traffic.gigabytes_per_second("two_pass", Case((1, 10**9)), seconds=2) == 6
    assert memory_traffic.gigabytes_per_second("memory: copy", Case((1, 10**9)), seconds=2) == 4
    assert memory_traffic.gigabytes_per_second("auto", Case((1, 10**9)), seconds=2) is None


def test_tables_are_consistent():
    """Every quantity can be measured, and every summary is of one of the table's ratios."""
    for make in sections.SECTIONS.values():
        for table in make(native.supported_isas()[:1]):
            assert table.quantity in runner.MEASURES
            assert {summary.ratio for summary in table.summaries} <= set(table.ratios)
            assert table.select(runner.Effort(1, 1, 1, 0.1, max_elements=0), "").cases == ()


@pytest.fixture
def stored(tmp_path):
    """A JSON file with results for every plot."""
    long, longer = Case((1, 2**20)), Case((1, 2**24))
    both = [row(long, 2.0, ours=1e-3, **{"jax.nn": 2e-3}), row(longer, 3.0, ours=1e-2, **{"jax.nn": 3e-2})]
    sizes = [row(case, 1.0, ours=case.bytes) for case in (long, longer)]
    algorithms = [row(case, 1.0, **dict.fromkeys(native.ALGORITHMS, 1e-3)) for case in (long, longer)]
    passes = [row(longer, 1.0, **dict.fromkeys((*native.PASSES, "memory: read"), 1e-2))]
    ulp = [
        row(case._replace(data=data), 1.0, ours=1.5) for case in (long, longer) for data in ("normal", "ramp")
    ]
    tables = [
        result(both),
        result(both, "peers"),
        result(algorithms, "algorithms", isa="avx2"),
        result(passes, "passes", isa="avx2"),
        result(algorithms[:1], "threads", isa="avx2"),
        result(ulp, "accuracy", "ULP"),
        *(
            result(rows, f"scaling of {quantity} in {along}", quantity)
            for quantity, rows in (("seconds", both), ("bytes", sizes))
            for along in ("n", "batch")
        ),
    ]
    figures = {name: {"losses": [2.0, 1.0], "tokens_per_second": 9.0} for name in ("jax.nn", "jax_softmax2p")}
    results(*tables)._replace(training=figures).save(tmp_path / "all.json")
    return tmp_path / "all.json"


def test_claims():
    slow, far = Case((1, 2**10)), Case((1, 2**26))
    times = {"two_pass": 1.0, "three_pass_reload": 0.5, "three_pass_recompute": 0.8}
    algorithms = [row(slow, 1.0, **times), row(far, 1.0, **{**times, "two_pass": 0.25})]
    passes = [row(far, 1.0, **{"max": 2.0, "exp_store": 2.5, "memory: read": 1.0, "memory: copy": 2.5})]
    tables = [
        result(algorithms, "algorithms", isa="avx512"),
        result(passes, "passes", isa="avx512"),
        *(result([each], "threads", isa="avx512") for each in reversed(algorithms)),
    ]
    assert [(claim.measured, claim.holds) for claim in claims(results(*tables))] == [
        ("2.00×", True),
        ("0.50×", True),
        ("max 50%, exp_store 100%", False),
        ("0.50×", False),
    ]
    text = markdown(results(*tables))
    assert "| avx512: in the first caches, they are not | 0.50× | yes |" in text
    assert "| (1,67108864) float32 | 3.2, 0.27 | 2.7, 0.13 | 1.3, 0.08 |" in text


def test_plots(stored, tmp_path):
    pytest.importorskip("matplotlib")
    files = plots.draw(Results.load(stored), tmp_path / "figures")
    assert {file.stem for file in files} == set(plots.PLOTS)
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
    assert plots.draw(results(), tmp_path) == []


@pytest.mark.long
def test_grokking(tmp_path):
    pytest.importorskip("tqdm")
    from benchmarks import grokking

    logits, labels = np.array([[-2.0, 0.0, 3.0], [1.0, 0.5, -0.5]]), np.array([2, 1])
    s = np.where(logits >= 0, logits + 1, 1 / (1 - np.minimum(logits, 0)))
    exact = -np.log(s[np.arange(2), labels] / s.sum(-1))
    np.testing.assert_allclose(grokking.stablemax(logits, labels), exact, rtol=1e-6)

    # One hidden unit, which is on, and whose weight raises the right class of two pairs by 25.
    weights = {"a": np.ones((113, 1)), "b": np.zeros((113, 1)), "hidden": np.ones((1, 1))}
    weights = {name: array.astype(np.float32) for name, array in weights.items()}
    weights["out"] = np.eye(1, 113, 3, dtype=np.float32) * 25
    pairs = np.array([[1, 2], [113 - 5, 8]], np.int32)
    zeros = {
        name: float(grokking.statistics(grokking.LOSSES[name], weights, pairs, pairs)["gradients of 0"])
        for name in ("optax", "ours", "StableMax")
    }
    assert zeros == {"optax": 1, "ours": 0, "StableMax": 0}

    setting = grokking.Setting(steps=4, interval=2, seeds=1, width=4, learning_rate=1e-3)
    record = grokking.train(grokking.LOSSES["ours"], setting, 0, lambda: None)
    assert record["step"] == [2, 4]
    assert record["loss"][1] < record["loss"][0]
    pytest.importorskip("matplotlib")
    plots.draw_grokking({name: [record] for name in grokking.LOSSES}, tmp_path / "grokking.png")


def test_margins():
    logits, labels = margins.rows_with_margin(20, (3, 5))
    others = np.delete(logits[0].astype(float), labels[0])
    assert logits[0, labels[0]] - others.max() >= 20
    losses, gradient = margins.exact(logits, labels)
    ratios = [mpmath.exp(float(other) - float(logits[0, labels[0]])) for other in others]
    assert float(losses[0]) == pytest.approx(float(mpmath.log1p(sum(ratios))), rel=1e-14)
    assert float(gradient[0, labels[0]]) == pytest.approx(float(-sum(ratios) / (1 + sum(ratios))), rel=1e-14)
    errors = {
        name: margins.worst_relative_error(compute(logits, labels)[1], gradient)
        for name, compute in margins.formulations().items()
    }
    assert errors["ours"] < 5e-7
    assert errors["ours, reference"] < 5e-7
    assert errors["optax"] > 0.01
    assert errors["optax, float64"] < 1e-6


def test_bits_that_differ():
    old = {"avx2: softmax (3)": "1", "avx2: softmax (5)": "2", "avx2: logsumexp (3)": "3"}
    new = {"avx2: softmax (3)": "1", "avx2: softmax (5)": "4", "avx2: sum_exp (3)": "3"}
    assert bits.differences(old, old) == []
    assert bits.differences(old, new) == [
        "only in the old file: avx2: logsumexp (3)",
        "differs: avx2: softmax (5)",
        "only in the new file: avx2: sum_exp (3)",
    ]


def test_bits_of_results():
    """Hashes distinguish bits, shapes and dtypes, but not the sign and payload of a NaN."""
    results = [np.float32([0.0, 1]), np.float32([-0.0, 1]), np.float32([[0.0, 1]]), np.float64([0.0, 1])]
    assert len({bits.hash_of(result) for result in results}) == len(results)
    assert bits.hash_of((results[0], results[1])) != bits.hash_of((results[1], results[0]))
    assert bits.hash_of(np.float32([np.nan])) == bits.hash_of(np.float32([-np.nan]))


def imported_names(statement):
    """The modules, or members of the packages of this project, that a statement imports."""
    if isinstance(statement, ast.Import):
        return [alias.name for alias in statement.names]
    if not isinstance(statement, ast.ImportFrom):
        return []
    if statement.module in ("benchmarks", "jax_softmax2p"):
        return [f"{statement.module}.{alias.name}" for alias in statement.names]
    if statement.module == "benchmarks.programs":
        return [statement.module, *(f"{statement.module}.{alias.name}" for alias in statement.names)]
    return [statement.module]


def source_file(module):
    """The file of a module or package; None if it is another member of a package."""
    path = ROOT / module.replace(".", "/")
    return next(filter(pathlib.Path.is_file, (path.with_suffix(".py"), path / "__init__.py")), None)


def test_worker_processes_import_public_names_only():
    """A worker may run an older revision of the package, whose private modules have other names."""
    public = {"jax_softmax2p", *(f"jax_softmax2p.{name}" for name in jax_softmax2p.__all__)}
    modules, imported = ["benchmarks.worker_process"], set()
    for module in modules:
        tree = ast.parse(source_file(module).read_text(encoding="utf-8"))
        names = {name for statement in tree.body for name in imported_names(statement)}
        own = (name for name in names if name.startswith("benchmarks.") and source_file(name))
        modules += sorted(name for name in own if name not in modules)
        imported |= {name for name in names if name.startswith("jax_softmax2p")}
    assert {"benchmarks.operations", "benchmarks.programs.sequences"} <= set(modules)
    assert imported <= public


def test_options():
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--rounds", type=options.positive_integer)
    parser.add_argument("--compare", type=options.existing_file)
    assert parser.parse_args(["--rounds", "12", "--compare", __file__]).rounds == 12
    message = "rounds: must be an integer from 1 on, got"
    for wrong in ("0", "-3", "1.5", "²", ""):
        with pytest.raises(argparse.ArgumentError, match=f"{message} '{wrong}'"):
            parser.parse_args([f"--rounds={wrong}"])
    with pytest.raises(argparse.ArgumentError, match=r"compare: there is no file 'nofile\.json'"):
        parser.parse_args(["--compare", "nofile.json"])


def test_outputs_are_made_before_anything_is_measured(tmp_path):
    file, figures = tmp_path / "new" / "run.json", tmp_path / "figures"
    make_outputs([file], figures)
    assert file.is_file()
    assert figures.is_dir()
    with pytest.raises(OSError, match=r"run\.json"):
        make_outputs([file / "other.json"], figures)
