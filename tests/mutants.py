"""Mutation testing: change one operator, bound or constant; does a test fail?

    make mutants                            all, into tests/mutants.md; half an hour
    python -m tests.mutants _equations      one module, to the terminal

Each change is made in memory and tested by the tests that run its line, in a process
forked from one that has done its imports. A change that no test notices survives: it
needs a test, or a reason in tests/mutants.md.
"""

from __future__ import annotations

import ast
import copy
import importlib.abc
import importlib.util
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import coverage
import pytest
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
SECONDS = 600  # a change that makes a test hang is noticed, too
PROCESSES = os.cpu_count() or 1

STEP = ["equations", "transform", "optimizer", "validate", "faults", "interface"]
CODECS = ["quantization", "stochastic_rounding"]
STORE = ["rows", "store", "stores", "location", "run", "long"]
# The modules, and the tests that should notice.
MODULES = {
    "_arithmetic": STEP,
    "_equations": STEP,
    "_rmsprop": STEP,
    "_hyperparameters": [*STEP, "conventions"],
    "quantization._codecs": CODECS,
    "quantization._dither": CODECS,
    "quantization._quantize": CODECS,
    "quantization._round": CODECS,
    "sweeps._store": STORE,
}

# The survivors of the last run, and why each is acceptable: written here by hand.
FOUND = ROOT / "tests" / "mutants.md"

OPERATORS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Add,
    ast.Pow: ast.Mult,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
    ast.BitXor: ast.BitOr,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
NAMES = {
    "min": "max",
    "max": "min",
    "minimum": "maximum",
    "maximum": "minimum",
    "zeros_like": "ones_like",
    "any": "all",
    "all": "any",
}


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """The ways to change a single node."""

    def changed(**fields: object) -> ast.AST:
        new = copy.deepcopy(node)
        for name, value in fields.items():
            setattr(new, name, value)
        return new

    match node:
        case ast.BinOp(op=op) | ast.BoolOp(op=op) | ast.AugAssign(op=op):
            if type(op) in OPERATORS:
                yield changed(op=OPERATORS[type(op)]())
        case ast.Compare(ops=[op]) if type(op) in OPERATORS:
            yield changed(ops=[OPERATORS[type(op)]()])
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield operand
        case ast.IfExp(body=body, orelse=orelse):
            yield changed(body=orelse, orelse=body)
        case ast.Constant(value=bool(value)):
            yield changed(value=not value)
        case ast.Constant(value=int(value) | float(value)):
            yield changed(value=value + 1)
        case ast.Call(func=ast.Attribute(attr=name)) if name in NAMES:
            new = copy.deepcopy(node)
            new.func.attr = NAMES[name]
            yield new
        case ast.Call(func=ast.Name(id=name)) if name in NAMES:
            new = copy.deepcopy(node)
            new.func.id = NAMES[name]
            yield new
        case ast.Return(value=ast.Call(func=ast.Attribute(attr="min"), args=[x, _])):
            yield changed(value=x)  # a bound is dropped
        case _:
            pass


class Site(NamedTuple):
    """A node that can be changed.

    Attributes:
      parent: the node that holds it.
      field: in this field.
      index: at this index, if the field is a list.
      where: the function or class around it.
      lines: the lines of its statement; None if that has a body.
    """

    parent: ast.AST
    field: str
    index: int | None
    where: str
    lines: tuple[int, int] | None


def sites(node: ast.AST, where: str = "", lines=None) -> Iterator[Site]:
    """Every node that can be changed."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        where = f"{where}.{node.name}".lstrip(".")
    for field, value in ast.iter_fields(node):
        # `strict=True` only asserts that zipped iterables have equal lengths.
        strict = isinstance(node, ast.keyword) and node.arg == "strict"
        if (
            strict
            or field in ("annotation", "returns", "decorator_list")
            or (isinstance(node, ast.Raise | ast.Assert | ast.Import | ast.ImportFrom))
        ):
            continue
        for index, child in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(child, ast.AST):
                its = lines
                if its is None and hasattr(child, "lineno"):
                    whole = child.lineno, child.end_lineno
                    its = None if hasattr(child, "body") else whole
                yield Site(
                    node, field, index if isinstance(value, list) else None, where, its
                )
                yield from sites(child, where, its)


class Mutant(NamedTuple):
    """A change, in words, the lines around it, and the changed source."""

    words: str
    lines: tuple[int, int] | None
    source: str


def mutants(source: str) -> Iterator[Mutant]:
    """Every change of a module."""
    tree = ast.parse(source)
    for parent, field, index, where, lines in list(sites(tree)):
        value = getattr(parent, field)
        node = value if index is None else value[index]
        for new in changes(node):
            words = f"{where or 'module'}: `{_text(node)}` -> `{_text(new)}`"

            def put(child: ast.AST, *, parent=parent, field=field, index=index) -> None:
                if index is None:
                    setattr(parent, field, child)
                else:
                    getattr(parent, field)[index] = child

            put(ast.copy_location(new, node))
            changed = ast.unparse(ast.fix_missing_locations(tree))
            yield Mutant(words, lines, changed)
            put(node)


def _text(node: ast.AST) -> str:
    text = " ".join(ast.unparse(node).split())
    return text if len(text) < 70 else f"{text[:67]}..."


class Loader(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Import hook that replaces the source of one module."""

    def __init__(self, name: str, path: Path, source: str):
        """Store the module's name, path and new source."""
        self.name, self.path, self.source = name, path, source

    def find_spec(self, name, path=None, target=None):
        """Find only this module."""
        if name == self.name:
            return importlib.util.spec_from_file_location(name, self.path, loader=self)
        return None

    def create_module(self, spec):
        """Use the default module."""
        return None

    def exec_module(self, module):
        """Execute the new source."""
        exec(compile(self.source, str(self.path), "exec"), module.__dict__)


class Observe:
    """Plugin that records, for each test, its seconds and the lines that it runs.

    What a fixture runs counts for every test that uses it, and a test that starts other
    processes might run any line.
    """

    def __init__(self, path: Path, file: Path):
        """Watch the module at `path`, and write to `file`."""
        self.coverage = coverage.Coverage(
            data_file=None, config_file=False, include=[str(path)]
        )
        self.path, self.file, self.now = str(path), file, ""
        self.seconds, self.fixtures = dict[str, float](), dict[str, list[str]]()
        self.coverage.start()  # before conftest, which may import the module

    def pytest_collection_finish(self, session):
        """Know which tests use which fixtures."""
        for item in session.items:
            self.fixtures[item.nodeid] = list(getattr(item, "fixturenames", []))

    def pytest_runtest_logstart(self, nodeid):
        """Lines are this test's now, also of functions that another one has traced."""
        sys.modules["jax"].clear_caches()
        self.now = nodeid
        self.coverage.switch_context(nodeid)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef):
        """Lines are this fixture's until it is there."""
        before, self.now = self.now, fixturedef.argname
        self.coverage.switch_context(self.now)
        try:
            return (yield)
        finally:
            self.now = before
            self.coverage.switch_context(before)

    def pytest_runtest_logreport(self, report):
        """Record the time of setup and call."""
        seconds = self.seconds.get(report.nodeid, 0)
        self.seconds[report.nodeid] = seconds + report.duration

    def pytest_sessionfinish(self):
        """Write what was seen."""
        self.coverage.stop()
        by_line = self.coverage.get_data().contexts_by_lineno(self.path)
        tests = {}
        for test, fixtures in self.fixtures.items():
            own = {"", test, *fixtures}  # "" is the module's import
            lines = [line for line, contexts in by_line.items() if own & {*contexts}]
            everything = "start" in fixtures
            tests[test] = self.seconds[test], None if everything else lines
        self.file.write_text(json.dumps(tests))


class Choose:
    """Plugin that runs the tests that run some lines, the fastest first."""

    def __init__(self, file: Path, lines: tuple[int, int] | None):
        """Read what was observed."""
        self.seen, self.lines = json.loads(file.read_text()), lines

    def pytest_collection_modifyitems(self, items):
        """Leave the others out; the files stay together, but for slow tests."""
        files = list(dict.fromkeys(item.path for item in items))

        def concerns(item):
            _, lines = self.seen.get(item.nodeid, (0, None))
            if lines is None or self.lines is None:
                return True
            first, last = self.lines
            return any(first <= line <= last for line in lines)

        def cost(item):
            seconds, _ = self.seen.get(item.nodeid, (0, None))
            return seconds > 6, files.index(item.path), seconds

        items[:] = sorted(filter(concerns, items), key=cost)


def run_tests(loader: Loader, tests: list[str], plugin: Observe | Choose) -> None:
    """Run the tests in this process, and exit with 0 if none fails."""
    signal.alarm(SECONDS)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    sys.meta_path.insert(0, loader)
    os.environ.update({"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1e9"})
    files = [f"tests/test_{name}.py" for name in tests]
    options = ["-x", "-q", "-p", "no:cacheprovider"]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    code = int(pytest.main([*options, *files], [plugin]))
    nothing_to_run = code == pytest.ExitCode.NO_TESTS_COLLECTED
    os._exit(0 if nothing_to_run else code)


def survivors(module: str) -> tuple[int, list[str]]:
    """The number of changes of a module, and the survivors."""
    path = ROOT / "jax_rmsprop" / f"{module.replace('.', '/')}.py"
    source = path.read_text()
    every = list(mutants(source))
    seen = Path(tempfile.mkdtemp()) / "seen.json"

    def start(changed: str, plugin: type, *arguments: object) -> int:
        child = os.fork()
        if child == 0:
            loader = Loader(f"jax_rmsprop.{module}", path, changed)
            run_tests(loader, MODULES[module], plugin(*arguments))
        return child

    start(source, Observe, path, seen)
    if os.wait()[1]:
        raise SystemExit(f"the tests of {module} fail as it is")
    waiting, running, alive = list(every), dict[int, str](), list[str]()
    with tqdm(total=len(every), desc=module) as bar:
        while waiting or running:
            while waiting and len(running) < PROCESSES:
                words, lines, changed = waiting.pop(0)
                running[start(changed, Choose, seen, lines)] = words
            child, status = os.wait()
            words = running.pop(child)
            if status == 0:
                alive.append(words)
                bar.write(f"not noticed: {words}")
            bar.update()
    return len(every), sorted(alive, key=[each.words for each in every].index)


def main() -> None:
    """Mutate the modules of the command line, or all."""
    os.chdir(ROOT)
    # Import the tests' dependencies before forking; none of them starts JAX.
    for name in (
        "jax.numpy",
        "optax",
        "chex",
        "hypothesis.extra.numpy",
        "equinox",
        "flax",
        "xarray",
        "zarr.storage",
        "pandas",
        "scipy.stats.qmc",
    ):
        importlib.import_module(name)
    began, rows, listed = time.time(), list[str](), list[str]()
    reasons = dict(re.findall(r"(?m)^- (`.*`): ([^`\n]*)$", FOUND.read_text()))
    chosen = sys.argv[1:] or list(MODULES)
    for module in chosen:
        count, alive = survivors(module)
        rows.append(f"| `{module}` | {count} | {count - len(alive)} | {len(alive)} |")
        for words in alive:
            change = f"`{module}`, {words}"
            listed.append(f"- {change}: {reasons.get(change, 'NO REASON')}")
    text = "\n".join(
        [
            "# Mutants",
            "",
            "What `make mutants` found: changes of an operator, bound or constant, and",
            "those that the module's tests do not notice.",
            "",
            "| module | changes | noticed | not |",
            "|---|---|---|---|",
            *rows,
            "",
            *listed,
            "",
        ]
    )
    print(text, f"\n{time.time() - began:.0f} s")
    if not sys.argv[1:]:
        FOUND.write_text(text)


if __name__ == "__main__":
    main()
