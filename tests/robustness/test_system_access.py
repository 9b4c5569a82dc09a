"""Importing and using the package opens no connection, writes no file, and loads no code but its library."""

import functools
import pathlib
import re
import shutil
import subprocess

import pytest
from processes import run_python

from jax_softmax2p import native

# Prints the audit events of Python from before the package is imported, those of JAX included.
AUDITED = """
import os, sys
import jax, jax.numpy as jnp, numpy as np
jax.block_until_ready(jax.jit(jnp.sin)(jnp.ones(3)))

FORBIDDEN = ("socket.", "urllib.", "ctypes.", "subprocess.", "os.", "shutil.", "tempfile.")

def hook(event, arguments):
    writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes or event.startswith(FORBIDDEN) and event not in ("os.listdir", "os.scandir"):
        print(event, arguments)

sys.addaudithook(hook)
import jax_softmax2p
x = jnp.ones((300, 4000))
jax.block_until_ready(jax.jit(jax.grad(lambda x: jax_softmax2p.softmax(x)[0, 0]))(x))
jax_softmax2p.native.softmax_into(np.asarray(x), np.empty(x.shape, np.float32), threads=2)
"""


run = functools.partial(run_python, options=("-B",))


def test_python_audit_events():
    result = run(AUDITED)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr


@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace")
def test_system_calls(tmp_path):
    """Covers XLA and the library as well: the names that XLA gives its threads are all that is written."""
    log = tmp_path / "log"
    calls = "trace=%network,/^(open|creat|rename|link|symlink|unlink|mkdir|truncate|execve)"
    result = run(AUDITED, prefix=("strace", "-f", "--seccomp-bpf", "-e", calls, "-o", str(log)))
    if "ptrace" in result.stderr:
        # Containers often lack the permission to trace.
        pytest.skip("strace may not trace here")
    assert result.returncode == 0, result.stderr
    # A call that another thread interrupts takes two lines, of which the first has the arguments.
    lines = [line for line in log.read_text().splitlines() if not re.search(r"<\.\.\. \w+ resumed>", line)]
    system_calls = [line for line in lines if "(" in line]
    assert any("_native" in line for line in system_calls)
    harmless = re.compile(r"execve\(.*python.* = 0$|O_RDONLY|/proc/self/task/\d+/comm")
    assert [line for line in system_calls if not harmless.search(line)] == []


@pytest.mark.skipif(not shutil.which("nm"), reason="needs nm")
def test_imported_symbols():
    """The library imports no function that writes files, opens sockets, loads code or starts programs."""
    command = ["nm", "--dynamic", "--undefined-only", native.library.require().__file__]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    symbols = {line.split()[-1].split("@")[0] for line in output.splitlines()}
    assert "getenv" in symbols
    forbidden = re.compile(r"f?open|open64|openat|creat|socket|connect|dl|fork|exec|system|popen|posix_s")
    assert {name for name in symbols if forbidden.match(name) or "ofstream" in name} == set()


def test_environment_variable_only_selects_an_isa():
    sources = "".join(path.read_text() for path in pathlib.Path(native.__file__).parent.parent.rglob("*.py"))
    assert "register_ffi_target" in sources
    assert not re.search(r"environ\b|getenv|import_module|__import__", sources)
    library = pathlib.Path(native.library.require().__file__)
    assert library.read_bytes().count(b"JAX_SOFTMAX2P_") == 1
    result = run(AUDITED, JAX_SOFTMAX2P_ISA=str(library))
    assert result.stdout == ""
    assert f"JAX_SOFTMAX2P_ISA='{library}'" in result.stderr
