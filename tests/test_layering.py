"""Imports and includes point down only: see the layers below. A file of no layer fails."""

import ast
import graphlib
import re

import pytest
from processes import ROOT

PACKAGE = ROOT / "jax_softmax2p"
FFI = ROOT / "ffi"

# From the top. A module or package that is named here stands for all within.
PYTHON_LAYERS = (
    ("__main__",),
    ("demo",),
    ("__init__", "measure"),
    ("integrations",),
    ("attention", "linear"),
    ("losses", "sum_exp"),
    ("ops",),
    ("factors", "labels", "logits", "sharding"),
    ("arguments", "explain"),
    ("primitives",),
    ("eager",),
    ("jax_compat", "memory", "native", "reference"),
    ("exact_sums", "scalars"),
)

# What only measures is for the demonstration, the benchmarks and the tests.
MEASURING = {"measure": {"__main__", "demo"}}

FFI_LAYERS = (
    ("module.cc",),
    ("handlers",),
    ("ops",),
    ("runtime",),
    ("targets",),
    ("kernels",),
    ("simd",),
    ("base",),
)


def layer_of(name, layers):
    found = [level for level, names in enumerate(layers) if name in names]
    assert found, f"{name} is in no layer"
    return found[0]


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def top(module):
    """The module or package within ours, by which layers are named."""
    return module.split(".")[1]


def imported_modules(path):
    """Those of our own, wherever in the file they are imported, but for the compiled library."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {module for name in names if (module := known_module(name))}
    return found


def known_module(name):
    """The module of ours that an imported name is, or is in; None for others'."""
    parts = name.split(".")
    if parts[0] != "jax_softmax2p" or name == "jax_softmax2p._native":
        return None
    while len(parts) > 1:
        if ".".join(parts) in MODULES:
            return ".".join(parts)
        parts.pop()
    return "jax_softmax2p.__init__"


@pytest.mark.parametrize("module", MODULES)
def test_python_imports_point_down(module):
    level = layer_of(top(module), PYTHON_LAYERS)
    for imported in imported_modules(MODULES[module]):
        if top(imported) == top(module):
            continue
        assert layer_of(top(imported), PYTHON_LAYERS) > level, f"{module} imports {imported}"
        assert top(module) in MEASURING.get(top(imported), {top(module)}), f"{module} imports {imported}"


def test_python_imports_have_no_circle():
    """Nor have those within a package, where layers do not apply."""
    imports = {module: imported_modules(path) - {module} for module, path in MODULES.items()}
    list(graphlib.TopologicalSorter(imports).static_order())


@pytest.mark.parametrize("module", MODULES)
def test_one_module_touches_what_jax_keeps_private(module):
    private = r"jax\._src|jax\.__version_info__|hasattr\(jax|\._apply_primitive|\.module_context"
    found = re.search(private, MODULES[module].read_text(encoding="utf-8"))
    assert module == "jax_softmax2p.jax_compat" or not found, f"{module} has {found}"


SOURCES = sorted(path for path in FFI.rglob("*") if path.is_file())


def folder(path):
    """The folder of ffi/, or the file in ffi/ itself, by which layers are named."""
    return path.relative_to(FFI).parts[0]


def included_files(path):
    """Those of our own. Quoted, and none of them ours, are XLA's alone."""
    for name in re.findall(r'^\s*#\s*include\s*"([^"]+)"', path.read_text(encoding="utf-8"), re.MULTILINE):
        if not name.startswith("xla/ffi/api/"):
            assert (ROOT / name).is_file(), f"{path} includes {name}, which is not a path from the root"
            yield ROOT / name


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(FFI)))
def test_includes_point_down(path):
    level = layer_of(folder(path), FFI_LAYERS)
    for included in included_files(path):
        if folder(included) != folder(path):
            assert layer_of(folder(included), FFI_LAYERS) > level, f"{path.name} includes {included}"


def test_includes_have_no_circle():
    includes = {path: set(included_files(path)) for path in SOURCES}
    list(graphlib.TopologicalSorter(includes).static_order())
