"""jax_softmax2p.native: introspection, the kernels on NumPy arrays, and fallbacks."""

import functools
import platform
import warnings

import cases
import jax
import numpy as np
import pytest
from processes import run_python

from jax_softmax2p import native


def test_isas():
    supported = native.supported_isas()
    assert native.active_isa() in supported
    assert supported[-1] == "portable"
    ranks = ["avx512", "avx2", "neon", "portable"]
    assert supported == [isa for isa in ranks if isa in supported]


@pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"),
    reason="needs the CPU flags of x86 in /proc/cpuinfo",
)
def test_isas_agree_with_cpuinfo():
    with open("/proc/cpuinfo") as cpuinfo:
        flags = set(cpuinfo.read().split())
    assert ("avx2" in native.supported_isas()) == ({"avx2", "fma", "f16c"} <= flags)
    wanted = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
    assert ("avx512" in native.supported_isas()) == (wanted <= flags)


def test_isas_agree_within_the_contract(isa):
    x = cases.make("normal", 10_001, np.float32)
    y, best = np.empty_like(x), np.empty_like(x)
    native.softmax_into(x, y, isa=isa)
    native.softmax_into(x, best)
    assert np.abs(y - best).max() <= 4 * np.spacing(best.max())
    assert (np.abs(y - best) <= 4 * np.spacing(best)).all()


def test_headers_are_those_of_the_oldest_supported_jaxlib():
    assert native.ffi_api_version() == (0, 1)


def test_algorithms_are_those_of_the_library():
    assert tuple(native.library.require().algorithms()) == native.ALGORITHMS


X = np.zeros((2, 3), np.float32)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"x": [1.0]}, TypeError, "x must be a NumPy array, got list"),
        ({"x": X.astype(np.int32)}, TypeError, "x must be one of float32, .*; got int32"),
        ({"axis": 2}, ValueError, "axis must be an integer from -2 to 1, got 2"),
        ({"out": X.astype(np.float64)}, ValueError, "out must have shape .* dtype float32"),
        ({"out": np.zeros((3, 2), np.float32)}, ValueError, r"out must have shape \(2, 3\)"),
        ({"x": X.T, "out": X.T.copy()}, ValueError, "x must be C-contiguous"),
        ({"x": np.float32(0) * X[0, 0].reshape(())}, TypeError, "x must be a NumPy array"),
        ({"x": np.zeros((), np.float32)}, ValueError, "x must have one dimension at least"),
        ({"algorithm": "fast"}, ValueError, "algorithm must be one of auto, .* got 'fast'"),
        ({"isa": "mmx"}, ValueError, "isa must be one of .*portable; got 'mmx'"),
        ({"threads": 0}, ValueError, "threads must be an integer from 1 to 1024, got 0"),
        ({"threads": 1.5}, ValueError, "threads must be an integer"),
    ],
)
def test_invalid_arguments(arguments, error, words):
    with pytest.raises(error, match=words):
        native.softmax_into(**{"x": X, "out": X.copy(), **arguments})


def test_partial_overlap():
    x = np.zeros(17, np.float32)
    with pytest.raises(ValueError, match="out must be x itself or share no memory with it"):
        native.softmax_into(x[:16], x[1:])


def test_stacked_outputs():
    x = cases.make("normal", 200, np.float32).reshape(2, 100)
    out = np.empty((3, *x.shape), np.float32)
    native.softmax_into(x, out, axis=0)
    assert all(cases.ulp_error(y.T, cases.exact_softmax(x.T)) <= 2 for y in out)
    with pytest.raises(ValueError, match="share no memory with x, where it is a stack"):
        native.softmax_into(out[0], out)
    with pytest.raises(ValueError, match="out must be C-contiguous"):
        native.softmax_into(x, np.empty((3, 2, 200), np.float32)[..., ::2])


def test_passes(isa):
    """Each pass covers several segments and an incomplete vector, and runs once for each output."""
    assert tuple(native.library.require().measurement.passes()) == native.PASSES
    x = cases.make("normal", 40_001, np.float32)
    maximum, wide = float(x.max()), x.astype(np.float64)
    out = np.full((2, x.size), np.nan, np.float32)
    run = functools.partial(native.pass_into, x=x, out=out, maximum=maximum, isa=isa, threads=2)
    assert run("max") == maximum
    for name in ("sum_exp", "extended_sum"):
        np.testing.assert_allclose(run(name), np.exp(wide).sum(), rtol=1e-7)
    assert np.isnan(out).all()
    expected = np.exp(wide) / 2.0 ** np.floor(maximum / np.log(2))
    for names in (["extended_write"], ["exp_store", "scale"]):
        out[:] = np.nan
        found = [run(name) for name in names]
        assert found[-1] is None
        assert max(cases.ulp_error(y, expected) for y in out) <= 2


@pytest.mark.parametrize(
    ("name", "x", "error", "words"),
    [
        ("pass", X[0], ValueError, "name must be one of max, .* got 'pass'"),
        ("max", X, TypeError, "x must be float32 of one dimension, got float32 of 2"),
        ("max", X[0].astype(np.float64), TypeError, "x must be float32 .* got float64"),
    ],
)
def test_invalid_pass_arguments(name, x, error, words):
    with pytest.raises(error, match=words):
        native.pass_into(name, x, np.empty_like(x), maximum=0.0)


Q = np.ones((1, 2, 2, 3), np.float32)
INVALID_MEASUREMENTS = [
    (native.product, ([[1.0]], X), {}, TypeError, "a must be a NumPy array, got list"),
    (native.product, (X, X.T), {}, ValueError, r"b must be C-contiguous, .* got shape \(3, 2\)"),
    (native.product, (X, X), {}, ValueError, "b must have 3 rows, got 2"),
    (native.product, (X, X.astype(np.float16)), {}, TypeError, "b must be .* as a, got float16"),
    (native.attention, (Q, Q, Q[0]), {}, ValueError, "value must be C-contiguous, with 4 dimensions"),
    (native.attention, (Q, Q, None), {}, TypeError, "value must be a NumPy array, got NoneType"),
    (native.attention, (Q, Q, Q, Q[:, :1]), {}, ValueError, "cotangent must have shape"),
    (native.attention, (Q, Q, Q), {"before": -1}, ValueError, "before must be an integer from 0 on, got -1"),
    (native.attention, (Q, Q, Q), {"after": 0.5}, ValueError, "after must be an integer from 0 on, got 0.5"),
    (native.attention, (Q, Q, Q), {"before": 10**30}, ValueError, f"before must be at most {2**56}, got 10"),
    (native.pass_into, ("max", X[0], X[0]), {"maximum": "a"}, ValueError, "maximum must be a finite number"),
    (native.attention, (Q, Q, Q), {"soft_cap": -1.0}, ValueError, "soft_cap must be .* positive finite"),
    (native.attention, (Q, Q, Q), {"sinks": [0.0]}, TypeError, "sinks must be a NumPy array, got list"),
    (native.attention, (Q, Q, Q), {"sinks": np.ones(2)}, ValueError, "sinks must be float32 .* got float64"),
    (native.softmax_plan, ((1, 0, 1),), {}, ValueError, r"shape\[1\] must be an integer from 1 on, got 0"),
    (native.softmax_plan, ((1, 8, -2),), {}, ValueError, r"shape\[2\] must be an integer from 1 on, got -2"),
    (native.softmax_plan, ((1, 8),), {}, ValueError, "shorter"),
    (native.softmax_plan, ((2**40, 2**40, 1),), {}, ValueError, r"shape must have at most .* elements, got"),
]


@pytest.mark.parametrize(("function", "args", "options", "error", "words"), INVALID_MEASUREMENTS)
def test_invalid_arguments_of_what_measures(function, args, options, error, words):
    with pytest.raises(error, match=words):
        function(*args, **options)


def test_softmax_plan():
    """A row that is larger than the caches is recomputed in pass 2 and stored past them."""
    second, last = native.cache_bytes()
    assert 2**16 <= second <= last
    assert native.softmax_plan((1, second // 16, 1))["reload"]
    far = native.softmax_plan((1, last, 1))
    assert far == {"maximum_first": False, "reload": False, "stream": True}
    # Panels of columns are not; small matrices are.
    assert not native.softmax_plan((1, last // 1024, 1024))["stream"]
    assert native.softmax_plan((last, 4, 4))["stream"]
    assert native.softmax_plan((1, 1000, 1), algorithm="three_pass_reload")["maximum_first"]
    with pytest.raises(TypeError, match=r"dtype must be one of float32, .* got int32"):
        native.softmax_plan((1, 8, 1), dtype=np.int32)


def test_more_threads_than_cores():
    x = np.ones((2, 2**22), np.float32)
    native.softmax_into(x, x, threads=1024)
    np.testing.assert_allclose(x, 2.0**-22)


def test_read_only_out():
    out = X.copy()
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out must be writable"):
        native.softmax_into(X, out)


@pytest.mark.parametrize("name", ["quantum", "avx512" if "avx512" not in native.supported_isas() else "neon"])
def test_forcing_an_unsupported_isa_lists_the_supported(name):
    code = "import jax.numpy as jnp, jax_softmax2p as s; s.softmax(jnp.zeros(3))"
    result = run_python(code, JAX_SOFTMAX2P_ISA=name)
    assert result.returncode != 0
    assert f"JAX_SOFTMAX2P_ISA='{name}'" in result.stderr
    assert f"supported here: {', '.join(native.supported_isas())}" in result.stderr


def test_forcing_an_isa(isa):
    code = "from jax_softmax2p import native; print(native.active_isa())"
    result = run_python(code, JAX_SOFTMAX2P_ISA=isa)
    assert result.stdout.strip() == isa, result.stderr


FIRST_CALL_AT_THE_END = """
import atexit, threading
import jax.numpy as jnp, jax_softmax2p as s

def call():
    {wait}
    print(s.softmax(jnp.zeros(2)), s.native.unavailable_reason())

{start}
"""


@pytest.mark.parametrize(
    ("start", "wait"),
    [
        ("threading.Thread(target=call).start()", "threading.main_thread().join()"),
        ("atexit.register(call)", "pass"),
    ],
)
def test_first_call_when_the_main_thread_has_ended(start, wait):
    """Executors refuse work then."""
    result = run_python(FIRST_CALL_AT_THE_END.format(start=start, wait=wait))
    assert (result.stdout, result.returncode) == ("[0.5 0.5] None\n", 0), result.stderr


REFUSING_RUNTIME = """
import warnings
import jax, jax.numpy as jnp
{refusal}
import jax_softmax2p as s
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        y = jax.jit(s.softmax)(jnp.zeros(4))
        s.softmax(jnp.zeros((2, 5)))
assert y.tolist() == [0.25] * 4
print([str(w.message) for w in caught])
try:
    s.softmax(jnp.zeros(4), implementation="native")
except ValueError as error:
    print(error)
"""

# A runtime with older headers, one that has started and refuses registrations, and one that accepts them but
# has no handler.
OLDER_HEADERS = """
import pathlib, tempfile
folder = tempfile.TemporaryDirectory()
header = pathlib.Path(folder.name, "xla/ffi/api/c_api.h")
header.parent.mkdir(parents=True)
header.write_text("#define XLA_FFI_API_MAJOR 0\\n#define XLA_FFI_API_MINOR 0\\n")
jax.ffi.include_dir = lambda: folder.name
"""
REFUSES = """
def refuse(*args, **kwargs):
    raise RuntimeError("incompatible")
jax.ffi.register_ffi_target = refuse
"""
FORGETS = "jax.ffi.register_ffi_target = lambda *args, **kwargs: None"


@pytest.mark.parametrize(
    ("refusal", "reason"),
    [
        (OLDER_HEADERS, "it was built with a newer jaxlib than this one (FFI API versions 0.1 and 0.0)"),
        (REFUSES, "its registration failed: incompatible"),
        (FORGETS, "a trial call failed"),
    ],
)
def test_incompatible_runtime_falls_back_with_one_warning(refusal, reason):
    result = run_python(REFUSING_RUNTIME.format(refusal=refusal))
    assert result.returncode == 0, result.stderr
    warned, refused = result.stdout.strip().split("\n", 1)
    assert warned.count("jax_softmax2p runs its jax.numpy reference") == 1
    assert reason in warned
    assert f"implementation='native' cannot run: {reason}" in refused


MISSING_LIBRARY = """
import sys
sys.modules["jax_softmax2p._native"] = None
import warnings
warnings.simplefilter("ignore")
import jax.numpy as jnp, jax_softmax2p as s
assert s.softmax(jnp.zeros(4)).tolist() == [0.25] * 4
try:
    s.native.supported_isas()
except ImportError as error:
    print(error)
"""


def test_missing_library_falls_back():
    result = run_python(MISSING_LIBRARY)
    assert result.returncode == 0, result.stderr
    assert "the compiled library cannot be loaded" in result.stdout


def test_probe_does_not_warn_on_success():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.unavailable_reason() is None
    assert jax.devices()[0].platform == "cpu"
