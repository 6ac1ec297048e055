"""What every test shares: four CPU devices, strict types, tolerances, data."""

import atexit
import contextlib
import os
import shutil
import signal
import socket
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

os.environ.setdefault("MPLBACKEND", "Agg")
# What one process of a run has compiled, the others need not compile again, nor those
# that a test starts.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled-")
    atexit.register(
        shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True
    )
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_num_cpu_devices", 4)
# A leak of one type or shape into another is an error, not a promotion.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def tolerance(dtype, roundings=1.0):
    """What so many roundings of a dtype may amount to, relative to the result.

    One rounding is half the spacing eps of the dtype's numbers; a complex number has
    the precision of its parts.
    """
    return float(roundings * jnp.finfo(dtype).eps / 2)


@pytest.fixture
def x64():
    """Make float64 the default, for one test."""
    with flag("jax_enable_x64", True):
        yield


@pytest.fixture(params=["float16", "bfloat16", "float32", "float64", "complex64"])
def dtype(request):
    """Each dtype a parameter may have; x64 is on for float64 alone."""
    if request.param == "float64":
        request.getfixturevalue("x64")
    return jnp.dtype(request.param)


@pytest.fixture
def rng():
    """Random numbers, the same in every run."""
    return np.random.default_rng(0)


@pytest.fixture
def standard_promotion():
    """JAX's default promotion, for code that does not promise the strict one."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@contextlib.contextmanager
def flag(name, value):
    """Within it, one of JAX's options is set."""
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        yield
    finally:
        jax.config.update(name, before)


def mesh_of_four(kind=AxisType.Auto):
    """Four devices along an axis "d": CPUs, or as many GPUs if the machine has them."""
    if jax.device_count() < 4:
        pytest.skip(f"four devices are needed, there are {jax.device_count()}")
    return jax.make_mesh((4,), ("d",), (kind,))


def _mesh(kind):
    return jax.set_mesh(mesh_of_four(kind))


# JAX's own, which people throw over whole programs.
SWITCHES = {
    "disable_jit": jax.disable_jit,
    "debug_nans": lambda: jax.debug_nans(True),
    "debug_infs": lambda: jax.debug_infs(True),
    "check_tracer_leaks": jax.checking_leaks,
    "strict promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "matmul precision": lambda: jax.default_matmul_precision("float32"),
    "enable_x64": lambda: flag("jax_enable_x64", True),
    "an automatic mesh": lambda: _mesh(AxisType.Auto),
    "an explicit mesh": lambda: _mesh(AxisType.Explicit),
}


def pytest_addoption(parser):
    """Run all that is collected under each of JAX's switches."""
    parser.addoption("--switches", action="store_true", help="under each of JAX's own")


def pytest_generate_tests(metafunc):
    """Every test once for each switch, if the run was started so."""
    if metafunc.config.getoption("--switches"):
        metafunc.parametrize("switched", SWITCHES, indirect=True)


def not_under(*switches, because):
    """Mark a test that is about what these switches change."""
    return pytest.mark.not_under(switches, because)


def pytest_configure(config):
    """Declare the mark of `not_under`."""
    config.addinivalue_line("markers", "not_under(switches, because): see conftest.py")


@pytest.fixture(autouse=True)
def switched(request):
    """One of JAX's switches, in a run with `--switches`."""
    name = getattr(request, "param", None)
    for mark in request.node.iter_markers("not_under"):
        switches, because = mark.args
        if name in switches:
            pytest.skip(because)
    with SWITCHES[name]() if name else contextlib.nullcontext():
        yield


def require(module):
    """Import a library that is optional but where `.ci/run` compares with them all."""
    if os.environ.get("REQUIRE_FRAMEWORKS"):
        __import__(module)
    return pytest.importorskip(module)


def airfoil_or_skip():
    """Skip a test of the airfoil data where they can't be had; CI has them."""
    from common import airfoil

    try:
        airfoil()
    except SystemExit as missing:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(missing))


def free_port():
    """A port of this machine that nobody listens at."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# Of sweeps.


@pytest.fixture(scope="session")
def alone():
    """The results at batch size 1, of which every row is a training as it is."""
    from tests.sweeps import GRID, network, quiet

    return quiet(network, GRID, batch_size=1)


@pytest.fixture(scope="session")
def together():
    """The results at batch size 8."""
    from tests.sweeps import GRID, network, quiet

    return quiet(network, GRID, batch_size=8)


@pytest.fixture
def programs(monkeypatch):
    """The batches that are run, as (batch size, members a call)."""
    from jax_rmsprop._sweep import _program

    calls = []
    call = _program.CompiledBatch.__call__

    def counted(self, numbers):
        calls.append((self.size, len(numbers[0]) if numbers else None))
        return call(self, numbers)

    monkeypatch.setattr(_program.CompiledBatch, "__call__", counted)
    return calls


@pytest.fixture
def compiled(monkeypatch):
    """The batch sizes that are compiled."""
    from jax_rmsprop._sweep import _program

    sizes = []
    build = _program.CompiledBatch.__init__

    def counted(self, traced, mesh, size):
        sizes.append(size)
        build(self, traced, mesh, size)

    monkeypatch.setattr(_program.CompiledBatch, "__init__", counted)
    return sizes


@pytest.fixture
def start():
    """Start processes that sweep; those that still run in the end are killed."""
    from tests.sweeps import forks, run

    running = []

    def start(*arguments, target=run, **options):
        answer, theirs = forks().Pipe(duplex=False)
        process = forks().Process(
            target=target, args=(theirs, *arguments), kwargs=options, daemon=True
        )
        process.start()
        theirs.close()
        running.append(process)
        return process, answer

    yield start
    for process in running:
        process.kill()
        process.join()


@pytest.fixture
def ctrl_c():
    """A way to set what Ctrl-C does, whatever it does where the tests were started."""
    found = signal.getsignal(signal.SIGINT)

    def does(handler):
        signal.signal(signal.SIGINT, handler)

    does(signal.default_int_handler)
    yield does
    signal.signal(signal.SIGINT, found)
