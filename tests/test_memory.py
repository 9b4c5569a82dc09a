"""keep_memory: its answers and errors; in processes of their own, page faults and what is left of memory."""

import json
import shutil
import subprocess

import numpy as np
import pytest
from processes import run_python

import jax_softmax2p
from jax_softmax2p import memory

# Each page of 4 KiB of a fresh result of 41 MB is a fault, unless the system uses huge pages for everything.
FAULTS = """
import json, resource, sys
import jax_softmax2p
keeps = eval(sys.argv[1])
import jax, jax.numpy as jnp, numpy as np

x = jnp.asarray(np.random.default_rng(0).standard_normal((20_000, 512), np.float32))
f = jax.jit(lambda x: x + 1)
for _ in range(100):
    y = f(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    y = f(x).block_until_ready()
faults = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 20
right = bool((np.asarray(y) == np.asarray(x) + 1).all())
softmax = np.asarray(jax.jit(jax_softmax2p.softmax)(x[:100]))
print(json.dumps({"keeps": keeps, "faults": faults, "right": right, "softmax": softmax.tobytes().hex()}))
"""

RELEASE = """
import gc, json, sys
import jax_softmax2p
keeps = eval(sys.argv[1])
import jax, jax.numpy as jnp

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4 // 1024

x = jax.block_until_ready(jnp.ones((20_000, 512)))
f = jax.jit(lambda x: x + 1)
f(x).block_until_ready()
start = resident()
results = [f(x).block_until_ready() for _ in range(10)]
held = resident() - start
del results
gc.collect()
print(json.dumps({"keeps": keeps, "held": held, "left": resident() - start}))
"""


def run(program, call):
    """What a program prints in a process that evaluates a call first."""
    result = run_python(f"import sys\nsys.argv[1:] = [{call!r}]\n{program}", options=())
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def by_default():
    return run(FAULTS, "False")


needs_glibc = pytest.mark.skipif(
    memory._glibc_that_allocates() is None, reason="this process does not allocate by glibc"
)


class Mallopt:
    """In the place of glibc: it takes notes, and refuses some options."""

    def __init__(self, refused=()):
        self.options, self._refused = {}, refused

    def mallopt(self, option, value):
        if option in self._refused:
            return 0
        self.options[option] = value
        return 1


@needs_glibc
class TestProcesses:
    @pytest.mark.long(call="jax_softmax2p.keep_memory()")
    @pytest.mark.parametrize(
        "call", ["jax_softmax2p.keep_memory()", "jax_softmax2p.keep_memory(max_bytes=2**28)"]
    )
    def test_page_faults(self, call, by_default):
        """A result takes the memory of an earlier one, and is the same to the bit."""
        kept = run(FAULTS, call)
        assert kept["keeps"] is True
        assert kept["right"]
        assert by_default["right"]
        assert kept["softmax"] == by_default["softmax"]
        if by_default["faults"] < 5000:
            pytest.skip(f"{by_default['faults']} page faults a call by default: pages are huge")
        assert kept["faults"] < 0.3 * by_default["faults"]

    @pytest.mark.long(call="jax_softmax2p.keep_memory(2**24)")
    @pytest.mark.parametrize(
        ("call", "keeps"),
        [
            ("False", False),
            ("jax_softmax2p.keep_memory()", True),
            ("jax_softmax2p.keep_memory(2**24)", False),
            ("jax_softmax2p.keep_memory(0)", False),
            ("jax_softmax2p.keep_memory() and jax_softmax2p.keep_memory(2**24)", False),
            ("jax_softmax2p.keep_memory(2**24) and jax_softmax2p.keep_memory()", True),
        ],
    )
    def test_what_is_left_when_results_are_freed(self, call, keeps):
        """Ten results of 41 MB: they are kept, or returned if they exceed the bound. The last call counts."""
        report = run(RELEASE, call)
        assert report["held"] > 350
        assert report["keeps"] is (call != "False")
        assert report["left"] > 0.9 * report["held"] if keeps else report["left"] < 0.3 * report["held"]

    def test_importing_does_not_keep(self):
        assert run(RELEASE, "False")["left"] < 100

    def test_another_allocator(self, tmp_path):
        """A malloc that is not glibc's, as if jemalloc were preloaded."""
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            pytest.skip("needs a C compiler")
        source, library = tmp_path / "malloc.c", tmp_path / "malloc.so"
        source.write_text(
            "#include <stddef.h>\nvoid* __libc_malloc(size_t);\n"
            "void* malloc(size_t bytes) { return __libc_malloc(bytes); }\n"
        )
        subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
        code = "import jax_softmax2p; print(jax_softmax2p.keep_memory())"
        result = run_python(code, options=(), LD_PRELOAD=str(library))
        assert result.stdout == "False\n", result.stderr


class TestOptions:
    def test_everything_is_kept(self, monkeypatch):
        libc = Mallopt()
        monkeypatch.setattr(memory, "_glibc_that_allocates", lambda: libc)
        assert memory.keep_memory() is True
        assert libc.options == {-4: 0, -1: -1, -2: 128 << 10, -8: 1}

    @pytest.mark.parametrize(
        ("max_bytes", "kept"), [(2**24, 2**24), (0, 128 << 10), (np.int64(2**31 - 1), 2**31 - 1)]
    )
    def test_bound(self, max_bytes, kept, monkeypatch):
        libc = Mallopt()
        monkeypatch.setattr(memory, "_glibc_that_allocates", lambda: libc)
        assert memory.keep_memory(max_bytes) is True
        assert libc.options == {-4: 65_536, -3: kept, -1: kept, -2: kept, -8: 1}

    def test_an_older_glibc(self, monkeypatch):
        """It refuses high thresholds of mapped blocks: then none is mapped."""
        libc = Mallopt(refused=[-3])
        monkeypatch.setattr(memory, "_glibc_that_allocates", lambda: libc)
        assert memory.keep_memory(2**28) is True
        assert libc.options == {-4: 0, -1: 2**28, -2: 2**28, -8: 1}

    def test_what_glibc_refuses(self, monkeypatch):
        monkeypatch.setattr(memory, "_glibc_that_allocates", lambda: Mallopt(refused=[-8]))
        assert memory.keep_memory() is False

    @pytest.mark.parametrize("platform", ["darwin", "win32"])
    def test_other_systems(self, platform, monkeypatch):
        monkeypatch.setattr(memory.sys, "platform", platform)
        assert memory.keep_memory() is False

    def test_musl(self, monkeypatch):
        """Its library has no name by which glibc tells its version."""
        monkeypatch.setattr(memory.sys, "platform", "linux")
        monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
        assert memory.keep_memory() is False


class TestErrors:
    @pytest.mark.parametrize("max_bytes", [1.5, 2.0, "1 GiB", True, False, [1], np.float32(3)])
    def test_types(self, max_bytes):
        with pytest.raises(TypeError, match="max_bytes must be an integer or None, got") as error:
            jax_softmax2p.keep_memory(max_bytes)
        assert repr(max_bytes) in str(error.value)

    @pytest.mark.parametrize("max_bytes", [-1, 2**31, np.int64(-5)])
    def test_values(self, max_bytes):
        with pytest.raises(ValueError, match=f"max_bytes must be from 0 to 2147483647, got {max_bytes}"):
            jax_softmax2p.keep_memory(max_bytes)

    def test_they_come_first(self, monkeypatch):
        """Also where memory cannot be kept."""
        monkeypatch.setattr(memory, "_glibc_that_allocates", lambda: None)
        with pytest.raises(ValueError, match="got -1"):
            jax_softmax2p.keep_memory(-1)
