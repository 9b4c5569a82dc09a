"""The Python blocks of the README and of docs/, run as they stand there; and what these pages refer to."""

import doctest
import importlib.util
import inspect
import re

import flax
import jax
import pytest
import versions
from processes import ROOT

import jax_softmax2p

DOCS = ROOT / "docs"
PAGES = {str(path.relative_to(ROOT)): path for path in [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]}
BLOCKS = {
    name: re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    for name, path in PAGES.items()
}
OPTIONAL = ("equinox", "flax", "numpyro", "optax", "ott")
"""What pages import that users need not have."""


# Of a library that ott imports.
@pytest.mark.filterwarnings("ignore:JAXopt is no longer maintained:DeprecationWarning")
@pytest.mark.parametrize("name", [name for name, blocks in BLOCKS.items() if blocks])
def test_blocks(name):
    """The blocks of a page share their names, in JAX's default of 32 bits."""
    for library in OPTIONAL:
        imported = re.search(
            rf"^(>>> )?(import|from) [\w., ]*\b{library}\b", "\n".join(BLOCKS[name]), re.MULTILINE
        )
        if imported and importlib.util.find_spec(library) is None:
            pytest.skip(f"{library} is missing: pip install '.[docs]'")
    if name == "docs/integrations/flax.md" and not versions.has(flax, "0.12.2"):
        pytest.skip("flax has is_causal in layers of nnx since 0.12.2")
    names, report = {}, []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    with jax.enable_x64(False):
        for block in BLOCKS[name]:
            if ">>>" not in block:
                exec(block, names)
                continue
            test = doctest.DocTestParser().get_doctest(block, names, name, name, 0)
            failed, _ = runner.run(test, out=report.append, clear_globs=False)
            assert not failed, "".join(report)
            names = test.globs


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_links(name):
    """Those of pages in docs/ are sphinx-build's to check."""
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / name).read_text(encoding="utf-8"))
    missing = [link for link in links if not link.startswith("http") and not (ROOT / link).exists()]
    assert missing == []


def test_pages_that_the_code_names_exist():
    sources = [
        path for folder in ("jax_softmax2p", "benchmarks", "ffi") for path in (ROOT / folder).rglob("*.*")
    ]
    texts = [
        path.read_text(encoding="utf-8") for path in sources if path.suffix in (".py", ".h", ".cc", ".md")
    ]
    named = {page for text in texts for page in re.findall(r"docs/[\w/]+\.md", text)}
    assert "docs/sharding.md" in named
    assert [page for page in sorted(named) if not (ROOT / page).exists()] == []


def test_reference_is_complete():
    """Every public name stands in the API reference."""
    text = "".join(path.read_text(encoding="utf-8") for path in sorted((DOCS / "api").glob("*.rst")))
    documented = set(re.findall(r"^\.\. auto(?:function|class|data):: (\w+)$", text, re.MULTILINE))
    public = {name for name in jax_softmax2p.__all__ if not inspect.ismodule(getattr(jax_softmax2p, name))}
    assert public - {"__version__"} <= documented


def test_citation_is_of_this_version():
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {jax_softmax2p.__version__}\n" in text
