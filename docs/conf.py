"""How the site is built: `make docs`, where a warning is an error."""

import inspect
import os
import re
import sys
import tomllib
from pathlib import Path

from docutils.nodes import SkipNode as _SKIP
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml

ROOT = Path(__file__).parents[1]
# The gallery's helpers, and the scripts that the examples share.
sys.path[:0] = [str(ROOT / "docs"), str(ROOT / "examples")]

import gallery  # noqa: E402

import jax_rmsprop  # noqa: E402

os.environ["TQDM_DISABLE"] = "1"  # a bar that moves is no output for a page

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

project = "jax_rmsprop"
author = PROJECT["authors"][0]["name"]
copyright = f"2026, {author}"
release = version = jax_rmsprop.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.linkcode",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "**/sg_execution_times.rst", "sg_execution_times.rst"]
default_role = "py:obj"  # a name in backticks is a link where it has a page

html_theme = "furo"
html_title = f"jax_rmsprop {version}"
html_baseurl = PROJECT["urls"]["Documentation"]
html_favicon = "_static/icon.svg"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"

myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
napoleon_use_ivar = True
napoleon_use_rtype = False
templates_path = ["_templates"]

sphinx_gallery_conf = {
    "examples_dirs": str(ROOT / "examples"),
    "gallery_dirs": "tutorials",
    "filename_pattern": gallery.to_run(),
    "within_subsection_order": "gallery.in_order",
    "image_scrapers": ("matplotlib", "gallery.picture"),
    "reset_argv": "gallery.arguments",
    "reset_modules": (),  # matplotlib's style is `common`'s, which is imported once
    "download_all_examples": False,
    "remove_config_comments": True,
    "show_signature": False,
}


def linkcode_resolve(domain, info):
    """Where an object stands in the repository."""
    found = sys.modules[info["module"]]
    try:
        for part in info["fullname"].split("."):
            found = getattr(found, part)
        found = inspect.unwrap(found)
        path = Path(inspect.getsourcefile(found)).relative_to(ROOT)
        lines, start = inspect.getsourcelines(found)
    except (AttributeError, TypeError, ValueError, OSError):
        return None
    version = f"v{jax_rmsprop.__version__}"
    end = start + len(lines) - 1
    return f"{PROJECT['urls']['Source']}/blob/{version}/{path}#L{start}-L{end}"


def as_rst(app, what, name, obj, options, lines):
    """Docstrings are for a terminal first: Markdown's links, indented equations."""
    text = re.sub(
        r"\[([^\[\]]+)\]\((https?://[^)\s]+)\)", r"`\1 <\2>`__", "\n".join(lines)
    )
    text = re.sub(r"`(\w[^`\n]*)`s\b", r"`\1`\\ s", text)  # a plural
    # What stands indented after a paragraph is an equation, line by line.
    lines[:] = re.sub(
        r"(?m)^(?!\.\. )(\S.*)\n\n(?= {4}\S)", r"\1\n\n::\n\n", text
    ).split("\n")


def math(self, node):
    """Equations as MathML, which browsers draw without a script or a font to fetch."""
    self.body.append(_mathml(node, inline=True))
    raise _SKIP


def display_math(self, node):
    """The same on a line of its own."""
    self.body.append(f'<div class="math">{_mathml(node, inline=False)}</div>')
    raise _SKIP


def _mathml(node, inline):
    text = node.astext().replace(r"\dots", r"\ldots")  # which docutils knows
    if not inline and r"\\" in text and r"\begin" not in text:
        text = rf"\begin{{aligned}}{text}\end{{aligned}}"
    try:
        drawn = tex2mathml(text, as_block=not inline)
    except MathError as error:
        raise ValueError(f"cannot draw {text}: {error}") from error
    return drawn.replace("<mtable", '<mtable displaystyle="true"')


def setup(app):
    """Equations, links and notebooks."""
    app.add_html_math_renderer("mathml", (math, None), (display_math, None))
    app.connect("autodoc-process-docstring", as_rst, priority=400)
    app.connect("builder-inited", gallery.complete_notebooks, priority=900)
