"""The pages are true: every block of code in them runs."""

import ast
import contextlib
import importlib
import io
import itertools
import re
import tomllib
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import pytest
import yaml

import jax_rmsprop
from tests.helpers import require

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("**/*.md"))
PAGES = [p for p in PAGES if not {"_build", "tutorials", "generated"} & set(p.parts)]
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.M | re.S)


def blocks(page, language, following=None):
    """The blocks of a language, each with the text of the block after it.

    That text is None if the next block's language is not `following`.
    """
    found = [*FENCE.findall(page.read_text()), ("", "")]
    return [
        (text, after if following in (None, its_language) else None)
        for (kind, text), (its_language, after) in itertools.pairwise(found)
        if kind == language
    ]


NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?%?(?![\w.]*\d)")


def assert_prints(printed, shown, where):
    """The same words, and the same numbers up to rounding.

    A training amplifies the rounding of its sums, whose order depends on JAX and the
    processor: decimals and percentages may differ by a tenth (5% were seen between two
    versions of JAX). Counts must be equal.
    """
    words = [re.sub(r"[\s-]+", " ", NUMBER.sub("#", x)) for x in (printed, shown)]
    assert words[0].strip() == words[1].strip(), where
    found = (NUMBER.findall(x.replace(",", "")) for x in (printed, shown))
    for got, said in zip(*found, strict=True):
        near = {"rel": 0, "abs": 0} if said.isdigit() else {"rel": 0.1, "abs": 1e-6}
        got, said = (float(x.rstrip("%")) for x in (got, said))
        assert got == pytest.approx(said, **near), where


def header(page):
    """The front matter of a page: `needs`, the packages, and `slow`."""
    found = re.match(r"---\n(.*?)---\n", page.read_text(), re.S)
    return yaml.safe_load(found.group(1)) if found else {}


def name(page):
    return page.relative_to(ROOT / "docs").with_suffix("").as_posix()


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(p, marks=[pytest.mark.slow] if header(p).get("slow") else [])
        for p in PAGES
        if blocks(p, "python") and p.stem != "errors"
    ],
    ids=name,
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:(mlflow|wandb|optuna).*")
def test_every_block_runs(page, monkeypatch, tmp_path, standard_promotion):
    """One after another, as a reader would type them."""
    for package in header(page).get("needs", []):
        require(package)
    if page.stem == "barely_fits" and jax.__version_info__ < (0, 10):
        pytest.skip("before JAX 0.10 a CPU has no pinned_host within a jit")
    # JAX has started; the number of devices is fixed for the process.
    monkeypatch.setattr(jax.config, "update", lambda *args: None)
    monkeypatch.chdir(tmp_path)
    names, everything = {"__name__": "__main__"}, ""
    for number, (block, shown) in enumerate(blocks(page, "python", "text")):
        where, printed = f"{page.name}, block {number}", io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block, where, "exec"), names)
        if shown is not None:
            assert_prints(printed.getvalue(), shown, where)
        everything += printed.getvalue()
    plt.close("all")
    # A table shows the printed values.
    for shown, _ in blocks(page, ""):
        assert shown in everything


def test_each_error_is_the_one_that_is_shown(tmp_path, standard_promotion):
    page = ROOT / "docs" / "reference" / "errors.md"
    names, seen = {}, 0
    for block, shown in blocks(page, "python"):
        with pytest.raises(Exception) as caught:  # noqa: PT011 - compared below
            exec(block, names)
        said = f"{type(caught.value).__name__}: {caught.value}\n"
        assert re.sub(r"/tmp\S*/runs", "/tmp/.../runs", said) == shown
        seen += 1
    assert seen == 7


# The lines that precede other frameworks' snippets in a real script.
BEFORE = {
    "torch": "import torch\nmodel = torch.nn.Linear(3, 2)",
    "keras": "import keras",
    "tensorflow": "import tensorflow.compat.v1 as tf\nstep = tf.Variable(0)",
    # timm as a whole requires torchvision; its optimizer does not.
    "timm": (
        "import types, torch\n"
        "from tests.frameworks import alone\n"
        "optim = types.SimpleNamespace(\n"
        "    RMSpropTF=alone('timm.optim.rmsprop_tf').RMSpropTF\n"
        ")\n"
        "timm, model = types.SimpleNamespace(optim=optim), torch.nn.Linear(3, 2)"
    ),
}


@pytest.mark.parametrize(
    ("package", "number"), [(p, i) for i, p in enumerate(BEFORE)], ids=list(BEFORE)
)
def test_the_lines_of_other_frameworks_run(package, number):
    require("torch" if package == "timm" else package)
    page = ROOT / "docs" / "how-to" / "other_frameworks.md"
    block, ours = blocks(page, "py")[number]
    exec(f"{BEFORE[package]}\n{block}", {})
    assert "conventions." in ours


def test_a_convention_is_added_by_the_lines_that_are_shown():
    page = (ROOT / "docs" / "reference" / "add_a_convention.md").read_text()
    parts = re.split(r"(?m)^ +In `(\S+)`:$", page)[1:]
    seen = 0
    for file, text in zip(parts[::2], parts[1::2], strict=True):
        for diff in re.findall(r"(?ms)^   ```diff\n(.*?)^   ```$", text):
            assert re.sub(r"(?m)^   \+", "", diff) in (ROOT / file).read_text(), file
            seen += 1
    assert seen == 5


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_what_is_not_run_is_at_least_python(page):
    """Blocks that need a cluster, for example."""
    for block, _ in blocks(page, "py"):
        ast.parse(block)


@pytest.mark.parametrize(
    "module",
    ["", ".conventions", ".migrate", ".plotting", ".quantization"],
)
def test_every_public_name_has_its_place_in_the_reference(module):
    page = (ROOT / "docs" / "reference" / "api.md").read_text()
    parts = re.split(r"currentmodule:: (\S+)\n", page)
    listed = {
        name
        for owner, text in zip(parts[1::2], parts[2::2], strict=True)
        if owner == f"jax_rmsprop{module}"
        for name in re.findall(r"^(?:   |\.\. py:data:: )(\w+)$", text, re.M)
    }
    public = importlib.import_module(f"jax_rmsprop{module}").__all__
    assert listed == set(public) - {"__version__"}


def test_the_sites_own_tables_are_printed_by_the_code(capsys):
    from jax_rmsprop import conventions

    conventions.explain()
    page = ROOT / "docs" / "reference" / "conventions.md"
    assert capsys.readouterr().out in page.read_text()


def test_the_page_about_speed_has_the_journals_figures():
    page = (ROOT / "docs" / "reference" / "benchmarks.md").read_text()
    journal = (ROOT / "benchmarks" / "README.md").read_text()
    page = re.sub(r"(?m)^:alt:.*$", "", page)  # which rounds what is drawn
    figures = re.findall(r"\d+\.\d+|\d{2,}(?= times)", page)
    assert len(figures) > 10
    for figure in figures:
        assert re.search(rf"(?<![\d.]){re.escape(figure)}(?![\d.]*\d)", journal), figure


def test_the_start_page_counts_right():
    from jax_rmsprop import conventions
    from jax_rmsprop.quantization import memory_report, quantize_state, uint8

    page = (ROOT / "docs" / "index.md").read_text()
    found = dict(re.findall(r"(?m)^\| (\d+)(?: times?| bytes?)? \| (.*) \|$", page))
    many, fast, byte, none = found
    assert int(many) == len(conventions.CONVENTIONS) + len(conventions.RECIPES)
    measured = (ROOT / "benchmarks" / "README.md").read_text()
    assert f"one update is {fast} times faster" in re.sub(r"\s+", " ", measured)
    optimizer = quantize_state(jax_rmsprop.rmsprop(0.1), {"nu": uint8()})
    report = memory_report(optimizer, jax.ShapeDtypeStruct((10_000,), "float32"))
    assert report.total["nu"] == int(byte) * 10_000
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {re.split("[<>=]", name)[0] for name in project["dependencies"]}
    assert len(needed - {"jax", "jaxlib", "optax"}) == int(none)
