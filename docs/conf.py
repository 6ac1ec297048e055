"""How the site is built: `make docs`, where a warning is an error."""

import importlib
import inspect
import os
import re
import shutil
import sys
import tomllib
from pathlib import Path

from docutils import nodes
from docutils.nodes import SkipNode as _SKIP
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.ext.intersphinx import InventoryAdapter

ROOT = Path(__file__).parents[1]
# The gallery's helpers, and the scripts that the examples share.
sys.path[:0] = [str(ROOT / "docs"), str(ROOT / "examples")]

import gallery  # noqa: E402
import publish  # noqa: E402

import jax_rmsprop  # noqa: E402

os.environ["TQDM_DISABLE"] = "1"  # a bar that moves is no output for a page
importlib.import_module("common")  # how pictures look

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

project = "jax_rmsprop"
author = PROJECT["authors"][0]["name"]
copyright = f"2026, {author}"
release = version = jax_rmsprop.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.linkcode",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
    "sphinxext.opengraph",
]
exclude_patterns = ["_build", "**/sg_execution_times.rst", "sg_execution_times.rst"]
default_role = "py:obj"  # a name in backticks is a link where it has a page

# Lists of what others' pages describe, kept here so that a build asks nobody; `make
# inventories` fetches them.
INVENTORIES = {
    "jax": "https://docs.jax.dev/en/latest/",
    "optax": "https://optax.readthedocs.io/en/latest/",
    "xarray": "https://docs.xarray.dev/en/stable/",
}
intersphinx_mapping = {
    name: (address, str(ROOT / "docs" / "inventories" / f"{name}.inv"))
    for name, address in INVENTORIES.items()
}

html_theme = "furo"
html_theme_options = {"source_edit_link": "docs/{filename}"}  # completed by `edit_link`
html_title = f"jax_rmsprop {version}"
html_baseurl = publish.ADDRESS
html_favicon = "_static/icon.svg"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = ["gamma.js", "versions.js"]
html_math_renderer = "mathml"
ogp_site_url = html_baseurl
ogp_social_cards = {
    "line_color": "#0072B2",
    "image_mini": "images/heatmap-light.png",
}

myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

autodoc_typehints = "signature"
python_maximum_signature_line_length = 72
autodoc_member_order = "bysource"
napoleon_use_ivar = True
napoleon_use_rtype = False
templates_path = ["_templates"]

sphinx_gallery_conf = {
    "examples_dirs": str(ROOT / "examples"),
    "gallery_dirs": "tutorials",
    "filename_pattern": gallery.to_run(),
    "within_subsection_order": "gallery.in_order",
    "reset_modules": (),  # matplotlib's style stays that of `common`
    "download_all_examples": False,
    "ignore_pattern": gallery.not_shown(),
    "image_srcset": ["2x"],
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


def edit_link(app, page, template, context, doctree):
    """Where a page is edited: a tutorial is an example, a docstring is not a page."""
    edit = f"{PROJECT['urls']['Source']}/edit/main/"
    folder, _, name = page.rpartition("/")
    if folder == "tutorials" and name != "index":
        context["theme_source_edit_link"] = f"{edit}examples/{name}.py"
    elif (ROOT / "docs" / f"{page}.md").exists():
        context["theme_source_edit_link"] = f"{edit}docs/{page}.md"
    else:
        context["theme_source_edit_link"] = None


COLAB = "https://colab.research.google.com/github"
MODULES = "conventions", "migrate", "plotting", "quantization"
# What a text calls each public name: `rmsprop`, `conventions.pytorch`, `heatmap`. Of a
# convention only the table of them says less, since a library is called `keras`, too.
PAGE_OF = {name: f"jax_rmsprop.{name}" for name in jax_rmsprop.__all__}
for _module in MODULES:
    for _name in importlib.import_module(f"jax_rmsprop.{_module}").__all__:
        PAGE_OF[f"{_module}.{_name}"] = f"jax_rmsprop.{_module}.{_name}"
        if _module != "conventions":
            PAGE_OF[_name] = f"jax_rmsprop.{_module}.{_name}"


def link_names(app, doctree, page):
    """Make a link of each public name in backticks."""
    for node in list(doctree.findall(nodes.literal)):
        inside = nodes.reference, nodes.title
        if isinstance(node.parent, inside) or isinstance(node.parent.parent, inside):
            continue
        name = node.astext().split("(")[0]
        address = described_here(app, page, name) or described_elsewhere(app, name)
        if address:
            own = "://" not in address
            link = nodes.reference("", "", internal=own, refuri=address)
            node.replace_self(link)
            link += node


def described_here(app, page, name):
    """The address of a public name, from another page than its own; else None."""
    name = name.removeprefix("jax_rmsprop.")
    if page == "reference/conventions":
        name = f"conventions.{name}" if f"conventions.{name}" in PAGE_OF else name
    target = f"reference/generated/{PAGE_OF.get(name)}"
    if target not in app.env.found_docs or target == page:
        return None
    return app.builder.get_relative_uri(page, target)


def described_elsewhere(app, name):
    """The address of a name of JAX, Optax or xarray; None if it has no page."""
    known = InventoryAdapter(app.env).main_inventory
    kinds = [kind for kind in known if kind.startswith("py:") and name in known[kind]]
    return known[kinds[0]][name].uri if kinds else None


def open_in_colab(app, doctree):
    """Below a tutorial's title, where it opens as a notebook."""
    folder, _, name = app.env.docname.rpartition("/")
    if folder != "tutorials" or gallery.TUTORIALS.get(name) is None:
        return
    repository = PROJECT["urls"]["Source"].removeprefix("https://github.com/")
    address = f"{COLAB}/{repository}/blob/gh-pages/notebooks/{name}.ipynb"
    link = nodes.reference("", "Open in Colab", refuri=address, classes=["colab"])
    title = next(iter(doctree.findall(nodes.title)))
    title.parent.insert(title.parent.index(title) + 1, nodes.paragraph("", "", link))


# What the textbook's RMSProp has, and what of its options `rmsprop` takes by default.
USUAL = {"0.9"}, {"inside"}, {"0"}, {"before", "no momentum"}, {"decoupled", "none"}


def mark_differences(app, doctree, page):
    """In the table of conventions, mark what is not as usual."""
    if page != "reference/conventions":
        return
    for row in list(doctree.findall(nodes.row))[1:]:
        for cell, usual in zip(list(row)[2:], USUAL, strict=True):
            # Of gamma its value, of eps its side of the root.
            said = re.sub(r"^[^,]*, |^\w+ (?=[\d.]+$)", "", cell.astext())
            if said.partition(" (")[0] not in usual:
                cell["classes"].append("differs")


def write_for_machines(app, exception):
    """Each page as Markdown beside it, and their list in llms.txt."""
    if exception or app.builder.name != "html":
        return
    lines = [f"# jax_rmsprop\n\n> {PROJECT['description']}\n"]
    for page in sorted(app.env.found_docs):
        source = ROOT / "docs" / f"{page}.md"
        if not source.exists():
            continue
        target = Path(app.outdir, f"{page}.md")
        target.write_text(re.sub(r"(?s)^---\n.*?---\n", "", source.read_text()))
        title = app.env.titles[page].astext()
        lines.append(f"- [{title}]({html_baseurl}{page}.md)")
    Path(app.outdir, "llms.txt").write_text("\n".join(lines) + "\n")
    notebooks = Path(app.outdir, "notebooks")  # each at an address that stays
    notebooks.mkdir(exist_ok=True)
    for path in Path(app.srcdir, "tutorials").glob("*.ipynb"):
        shutil.copy(path, notebooks)
    publish.list_versions(Path(app.outdir), version, "", [version])


def setup(app):
    """Equations, links, notebooks, and pages for machines."""
    app.add_html_math_renderer("mathml", (math, None), (display_math, None))
    app.connect("autodoc-process-docstring", as_rst, priority=400)
    app.connect("builder-inited", gallery.complete_notebooks, priority=900)
    app.connect("builder-inited", gallery.group_cards, priority=900)
    app.connect("doctree-read", open_in_colab)
    app.connect("doctree-resolved", mark_differences)
    app.connect("doctree-resolved", link_names)
    app.connect("html-page-context", edit_link)
    app.connect("build-finished", write_for_machines)
