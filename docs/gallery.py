"""How the examples become tutorials: their order, their pictures, their notebooks."""

import ast
import importlib.util
import json
import re
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"

# The groups of the site and their order, each tutorial with what it needs beside the
# package; None for a script that waits for another process.
GROUPS = {
    "Start here": {"textbook": (), "what_goes_wrong": (), "does_it_converge": ()},
    "Train": {
        "flax_network": ("flax",),
        "equinox_network": ("equinox",),
        "port_from_pytorch": ("torch",),
        "eps_and_the_loss": (),
        "low_precision_state": (),
        "dqn": ("gymnax",),
    },
    "Sweep": {
        "gamma_sweep": (),
        "reading_a_sweep": (),
        "successive_halving": (),
        "population_based_training": (),
    },
    "Sweep on many machines": {
        "sweep_on_a_cluster": ("distributed",),
        "sweep_many_hosts": None,
    },
}
TUTORIALS = {name: needs for group in GROUPS.values() for name, needs in group.items()}


def not_shown():
    """A pattern of the files that are no tutorials."""
    names = {path.stem for path in EXAMPLES.glob("*.py")} - set(TUTORIALS)
    return rf"(^|/)({'|'.join(sorted(names))})\.py$"


def to_run():
    """A pattern of the scripts that are run: those whose packages are here."""
    names = [
        name
        for name, needs in TUTORIALS.items()
        if needs is not None and all(map(importlib.util.find_spec, needs))
    ]
    return rf"/({'|'.join(names)})\.py$"


def in_order(path):
    """Where a tutorial stands; a file that is none comes last."""
    return [*TUTORIALS, Path(path).stem].index(Path(path).stem)


def group_cards(app):
    """Write the tutorials' start page: a card for each, in groups."""
    folder = Path(app.srcdir, "tutorials")
    if not folder.exists():
        return
    lines = [(EXAMPLES / "GALLERY_HEADER.rst").read_text()]
    lines += [
        ".. toctree::",
        "   :hidden:",
        "",
        *(f"   {name}" for name in TUTORIALS),
        "",
    ]
    for title, names in GROUPS.items():
        lines += [title, "-" * len(title), ""]
        lines += [".. grid:: 1 2 3 3", "   :gutter: 2", ""]
        for name in names:
            text = ast.get_docstring(ast.parse((EXAMPLES / f"{name}.py").read_text()))
            card = f".. grid-item-card:: {text.splitlines()[0]}"
            picture = f"images/thumb/sphx_glr_{name}_thumb.png"
            lines += [f"   {card}", f"      :link: {name}", "      :link-type: doc"]
            if re.search(to_run(), f"/{name}.py"):
                alt = f"Picture of the tutorial {text.splitlines()[0]}"
                lines += [f"      :img-bottom: {picture}", f"      :img-alt: {alt}"]
            lines += [""]
    (folder / "index.rst").write_text("\n".join(lines) + "\n")


def complete_notebooks(app):
    """Give notebooks what a fresh machine lacks: the package."""
    for path in Path(app.srcdir, "tutorials").glob("*.ipynb"):
        notebook = json.loads(path.read_text())
        install = '%pip install -q "jax-rmsprop[cluster,examples]"'
        if any(install in str(cell["source"]) for cell in notebook["cells"]):
            continue
        cell = {
            "cell_type": "code",
            "execution_count": None,
            # Folded where a notebook is shown.
            "metadata": {"jupyter": {"source_hidden": True}, "cellView": "form"},
            "outputs": [],
            "source": [install],
        }
        notebook["cells"].insert(1, cell)  # after the title
        path.write_text(json.dumps(notebook, indent=1))


def draw_pictures():
    """Draw what the pages show beside their text, into docs/images."""
    import os
    import runpy
    import sys

    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    images = Path(__file__).parent / "images"
    sys.path.insert(0, str(EXAMPLES))
    importlib.import_module("common")  # how pictures look
    os.chdir(images)
    runpy.run_path(str(EXAMPLES / "what_goes_wrong.py"))
    for number, name in enumerate(("variance", "rounding", "bounded", "eps"), 1):
        plt.figure(number).savefig(f"{name}.png", dpi=200)
    # A page that saves a picture draws it itself.
    for page in images.parent.glob("*/*.md"):
        blocks = re.findall(r"(?ms)^```python\n(.*?)^```$", page.read_text())
        if any(".savefig(" in block for block in blocks):
            exec("\n".join(blocks), {"__name__": "__main__"})
    plt.close("all")
    curves = runpy.run_path(str(EXAMPLES / "gamma_sweep.py"))["curves"]
    from jax_rmsprop import plotting

    for shade, style in (("light", "default"), ("dark", "dark_background")):
        with plt.style.context(style):
            figure, ax = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
            plotting.heatmap(curves, ax=ax)
            figure.savefig(f"heatmap-{shade}.png", dpi=200, transparent=True)
    draw_benchmarks(plt).savefig("benchmarks.png", dpi=200)


def draw_benchmarks(plt):
    """Bars of the figures that the page about speed names, out of the journal."""
    journal = (EXAMPLES.parent / "benchmarks" / "README.md").read_text()

    def figures(row, after="## GPU, NVIDIA"):
        lines = re.findall(r"(?m)^\| (.*) \|$", journal[journal.index(after) :])
        cells = next(line for line in lines if row in line)
        return [float(x) for x in re.findall(r"[\d.]+", cells.split(" | ")[1])]

    outside = figures("times faster, one update in turn with", "## CPU")[0]
    times = {
        "outside a jit": 1 / outside,
        "inside a jit": figures("`optax.rmsprop`'s, median of 5 processes", "## CPU")[
            0
        ],
        "H100": figures("full | 1.005")[0],
        "H100, uint8": sum(figures("`uint8` | 0.76")) / 2,
        "H100, momentum,\nuint8 and int8": figures(
            "momentum, `uint8` and `int8` | 0.6"
        )[0],
    }
    figure, (time, memory, members) = plt.subplots(
        1, 3, figsize=(12.5, 3.6), layout="constrained", width_ratios=(1.2, 0.8, 1.2)
    )
    bars = time.barh(list(times), list(times.values()), color="#0072B2")
    time.bar_label(bars, fmt="{:.2f}", padding=3)
    time.axvline(1, color="#D55E00", linewidth=1)
    time.set(title="time of an update / Optax's", xlim=(0, 1.25))
    time.invert_yaxis()
    sizes = {"Adam": 8, "RMSProp": 4, "bfloat16 nu": 2, "uint8 nu": 1}
    bars = memory.barh(list(sizes), list(sizes.values()), color="#009E73")
    memory.bar_label(bars, padding=3)
    memory.set(title="bytes of state a parameter", xlim=(0, 9))
    memory.invert_yaxis()
    rows = [
        [float(x) for x in cells.split(", ")]
        for cells in re.findall(
            r"(?m)^\| members a second: sweep.* \| (.*) \|  \|$", journal
        )
    ][:3]
    names = ["regression", "network", "convolutions"]
    for i, (label, colour) in enumerate(
        {"sweep": "#0072B2", "loop": "#BBBBBB", "vmap": "#E69F00"}.items()
    ):
        heights = [row[i] / row[0] for row in rows]
        places = [place + 0.27 * (i - 1) for place in range(3)]
        members.bar(places, heights, 0.25, label=label, color=colour)
    members.set_xticks(range(3), names)
    members.set(title="a sweep's speed, 128 at once")
    members.set_ylim(0, 1.35)
    members.legend(ncols=3, loc="upper center", frameon=False, columnspacing=1)
    for ax in (time, memory, members):
        ax.grid(visible=False)
        ax.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    draw_pictures()
