"""The package's names, version and pages."""

import ast
import importlib.metadata
import inspect
import re
import runpy
import sys
from pathlib import Path

import pytest

import jax_rmsprop
from jax_rmsprop import conventions, migrate

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_all_names_what_is_public():
    public = {n for n in vars(jax_rmsprop) if not n.startswith("_")}
    modules = {n for n in public if inspect.ismodule(getattr(jax_rmsprop, n))}
    assert set(jax_rmsprop.__all__) == (public - modules) | {"__version__"}


def test_version():
    assert jax_rmsprop.__version__ == importlib.metadata.version("jax-rmsprop")
    assert f"## [{jax_rmsprop.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize(
    "name", [n for n in jax_rmsprop.__all__ if callable(getattr(jax_rmsprop, n))]
)
def test_docstrings(name):
    doc = inspect.getdoc(getattr(jax_rmsprop, name))
    wanted = ["Args:", "Returns:", "Raises:", "Example:", ">>> ", "References:"]
    if inspect.isclass(getattr(jax_rmsprop, name)):
        wanted = ["Attributes:"]
    for heading in wanted:
        assert heading in doc


def test_conventions_have_equations_examples_and_sources():
    for name in conventions.__all__:
        function = getattr(conventions, name)
        if inspect.isfunction(function) and name != "explain":
            doc = inspect.getdoc(function)
            for part in ("Example:", ">>> ", "References:"):
                assert part in doc, name
            assert name in conventions.RECIPES or "x = x - " in doc, name


def test_readme_shows_the_memory_report(capsys):
    block = next(b for b in BLOCKS if "memory_report" in b)
    exec(block, {})
    assert capsys.readouterr().out in README


@pytest.mark.parametrize("module", [conventions, migrate])
def test_namespaces_name_what_is_public(module):
    public = {n for n in vars(module) if not n.startswith("_")}
    assert set(module.__all__) == public


def test_readme_shows_the_table_of_conventions(capsys):
    conventions.explain()
    assert capsys.readouterr().out in README


def test_the_core_imports_only_jax_numpy_and_optax():
    allowed = {"jax", "numpy", "optax", "jax_rmsprop"} | sys.stdlib_module_names
    for path in (ROOT / "jax_rmsprop").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module]
            for name in names:
                assert name.split(".")[0] in allowed, path


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_readme_blocks_run(number, tmp_path, standard_promotion):
    script = tmp_path / "block.py"
    script.write_text(BLOCKS[number])
    runpy.run_path(str(script))


def test_readme_shows_every_option():
    for parameter in inspect.signature(jax_rmsprop.rmsprop).parameters:
        assert f"| `{parameter}` |" in README


def test_readme_links_and_pictures_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
