"""How the examples become tutorials: their order, their pictures, their notebooks."""

import ast
import importlib.util
import json
import re
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"
WRITTEN = EXAMPLES / "gallery.png"  # not tracked

# In the order of the site, with what each needs beside the package.
TUTORIALS = {
    "textbook": (),
    "flax_network": ("flax",),
    "equinox_network": ("equinox",),
    "port_from_pytorch": ("torch",),
    "eps_and_the_loss": (),
    "what_goes_wrong": (),
    "does_it_converge": (),
    "reading_a_sweep": (),
    "gamma_sweep": (),
    "successive_halving": (),
    "population_based_training": (),
    "low_precision_state": (),
    "dqn": ("gymnax",),
    "sweep_on_a_cluster": ("distributed",),
    "sweep_many_hosts": None,  # two commands, each of which waits for the other
    "common": None,
}


def to_run():
    """A pattern of the scripts that are run: those whose packages are here."""
    names = [
        name
        for name, needs in TUTORIALS.items()
        if needs is not None and all(map(importlib.util.find_spec, needs))
    ]
    return rf"/({'|'.join(names)})\.py$"


def in_order(path):
    """Where a tutorial stands."""
    return list(TUTORIALS).index(Path(path).stem)


def arguments(conf, script):
    """With what a script is run: one that is cells takes none."""
    path = Path(script["src_file"])
    return ["--output", WRITTEN.name] if "arguments(" in path.read_text() else []


def picture(block, variables, conf):
    """What a script wrote where `--output` says, described by the script's title."""
    from sphinx_gallery.scrapers import figure_rst

    if not WRITTEN.exists():
        return ""
    path = next(variables["image_path_iterator"])
    WRITTEN.rename(path)
    doc = ast.get_docstring(ast.parse(Path(variables["src_file"]).read_text()))
    return figure_rst([path], conf["src_dir"], doc.splitlines()[0])


def complete_notebooks(app):
    """Give notebooks what a fresh machine lacks: the package, and their neighbours."""
    for path in Path(app.srcdir, "tutorials").glob("*.ipynb"):
        notebook = json.loads(path.read_text())
        first = '%pip install -q "jax-rmsprop[cluster,examples]"'
        if first in str(notebook["cells"][0]["source"]):
            continue
        cells = [first, *_neighbours((EXAMPLES / f"{path.stem}.py").read_text())]
        notebook["cells"][:0] = [
            {
                "cell_type": "code",
                "execution_count": None,
                "metadata": {},
                "outputs": [],
                "source": [source],
            }
            for source in cells
        ]
        path.write_text(json.dumps(notebook, indent=1))


def _neighbours(text):
    """A cell for each script of the examples that one imports, which writes it."""
    for name in re.findall(r"^from (\w+) import", text, re.M):
        neighbour = EXAMPLES / f"{name}.py"
        if neighbour.exists():
            yield f"%%writefile {neighbour.name}\n{neighbour.read_text()}"
            yield from _neighbours(neighbour.read_text())


def draw_explanations():
    """Draw the pictures that the explanations share with their tutorial."""
    import runpy
    import sys

    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    sys.path.insert(0, str(EXAMPLES))
    runpy.run_path(str(EXAMPLES / "what_goes_wrong.py"))
    for number, name in enumerate(("variance", "rounding", "bounded", "eps"), 1):
        path = Path(__file__).parent / "images" / f"{name}.png"
        plt.figure(number).savefig(path, dpi=100)
        print(f"picture: {path}")


if __name__ == "__main__":
    draw_explanations()
