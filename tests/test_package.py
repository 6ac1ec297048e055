"""The package's names, version and pages."""

import importlib
import importlib.metadata
import inspect
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import pytest
import yaml

import jax_rmsprop
from jax_rmsprop import _versions, conventions, migrate, plotting

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
    wanted = ["Args:", "Returns:", "Raises:", "Example:", ">>> "]
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


@pytest.mark.parametrize("name", plotting.__all__)
def test_pictures_have_the_same_headings(name):
    doc = inspect.getdoc(getattr(plotting, name))
    for heading in ("Args:", "Returns:", "Raises:", "Example:", ">>> "):
        assert heading in doc


@pytest.mark.parametrize("module", [conventions, migrate])
def test_namespaces_name_what_is_public(module):
    public = {n for n in vars(module) if not n.startswith("_")}
    assert set(module.__all__) == public


EXTRAS = {
    *("bokeh", "dask", "distributed", "fsspec", "matplotlib", "pandas", "psutil"),
    *("scipy", "tqdm", "xarray", "zarr"),
}


def test_every_module_imports_no_extra_and_nothing_deprecated():
    code = (
        "import importlib, pkgutil, sys, jax_rmsprop as package\n"
        "for module in pkgutil.walk_packages(package.__path__, 'jax_rmsprop.'):\n"
        "    if not module.name.endswith('__main__'):\n"
        "        importlib.import_module(module.name)\n"
        "print(*sys.modules)"
    )
    warnings = ["-W", "error::DeprecationWarning", "-W", "error::FutureWarning"]
    loaded = subprocess.run(
        [sys.executable, *warnings, "-c", code],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    assert not EXTRAS & set(loaded)


# JAX may remove experimental or private names in any version. Each use, and why.
UNSTABLE = {
    ("jax_rmsprop/_versions.py", "from jax.experimental import multihost_utils"): (
        "nothing public gathers what processes hold on their hosts"
    ),
    (
        "tests/test_compiled.py",
        "from jax.experimental import topologies  # noqa: E402",
    ): ("nothing public describes an accelerator that is not here"),
    ("tests/test_training.py", "from jax.experimental import pallas as pl"): (
        "Pallas has no other name, and people train with it"
    ),
}


def test_nothing_unstable_of_jax_is_used_without_a_reason():
    found = {
        (path.relative_to(ROOT).as_posix(), line.strip())
        for folder in ("jax_rmsprop", "tests", "examples", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        for line in path.read_text().splitlines()
        if re.search(r"jax\.(_src|experimental|interpreters)\b", line)
        and path != Path(__file__)
    }
    assert found == set(UNSTABLE)


def test_an_older_jax_is_told_in_one_line(monkeypatch):
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "dependencies"
    ]
    bound = ".".join(map(str, _versions.OLDEST))
    assert f"jax>={bound}" in dependencies
    assert f"jaxlib>={bound}" in dependencies
    monkeypatch.setattr(jax, "__version_info__", (0, 7, 2))
    monkeypatch.setattr(jax, "__version__", "0.7.2")
    with pytest.raises(ImportError) as caught:
        importlib.reload(_versions)
    assert str(caught.value) == (
        "jax_rmsprop needs jax 0.8.0 or newer, but 0.7.2 is installed"
    )


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


def test_what_a_release_says_of_itself_agrees():
    """Version, addresses and requirements agree between several files."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    recipe = yaml.safe_load((ROOT / "conda" / "recipe.yaml").read_text())
    assert citation["version"] == jax_rmsprop.__version__
    assert recipe["context"]["version"] == jax_rmsprop.__version__
    assert citation["repository-code"] == project["urls"]["Source"]
    assert recipe["about"]["repository"] == project["urls"]["Source"]
    assert citation["url"] == project["urls"]["Documentation"]
    assert recipe["about"]["homepage"] == project["urls"]["Documentation"]
    assert project["urls"]["Documentation"] in README
    assert citation["license"] == recipe["about"]["license"] == project["license"]
    wanted = [r.replace(" ", "") for r in recipe["requirements"]["run"][1:]]
    assert wanted == project["dependencies"]
    least = recipe["context"]["python_min"]
    assert project["requires-python"] == f">={least}"
    lower = [c for c in project["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert lower[0].endswith(least)
    minors = [int(c.rpartition(".")[2]) for c in lower]
    assert minors == list(range(minors[0], minors[-1] + 1))


def test_the_table_of_versions_is_pyprojects():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    page = (ROOT / "docs" / "reference" / "versions.md").read_text()
    assert f"| Python | {project['requires-python'].lstrip('>=')} |" in page
    for name, row in (("jax", "JAX, jaxlib"), ("optax", "Optax")):
        (bound,) = (d for d in project["dependencies"] if d.startswith(f"{name}>="))
        assert f"| {row} | {bound.partition('>=')[2]} |" in page
