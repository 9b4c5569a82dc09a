"""Sphinx's configuration. CONTRIBUTING.md says how to build the pages."""

from importlib.metadata import version as _version

project = "jax_softmax2p"
author = "The jax_softmax2p authors"
copyright = author
version = release = _version("jax_softmax2p")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# Every name of this package that a docstring refers to must be documented. Those of others need no inventory,
# so that the build needs no network.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(jax|jnp|flax|optax|equinox|numpy|collections|typing)\b.*")]

# Types are said in the text of each argument.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
toc_object_entries_show_parents = "hide"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False
napoleon_custom_sections = [
    "Gradients",
    "Several biases",
    "Sharded rows",
    "Source",
    "Sources",
]

html_theme = "sphinx_book_theme"
html_title = "jax_softmax2p"
html_theme_options = {"show_navbar_depth": 1, "show_toc_level": 2, "use_download_button": False}
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = html_show_sourcelink = False
copybutton_prompt_text = ">>> |\\.\\.\\. "
copybutton_prompt_is_regexp = True
