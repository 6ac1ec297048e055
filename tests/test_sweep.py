"""Sweeps: every row is its own training, wherever and however often it is begun."""

import functools
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_rmsprop import load_sweep, log_one_minus, rmsprop, sweep
from jax_rmsprop._sweep import _grid, _keep, _location, _program, _run, _sweep, _trace
from tests.conftest import SWITCHES, flag, free_port, require, tolerance
from tests.sweeps import GRID, bits, forks, network, quiet, run, square

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def alone():
    """The results at batch size 1, of which every row is a training as it is."""
    return quiet(network, GRID, batch_size=1)


@pytest.fixture(scope="module")
def together():
    """The results at batch size 8."""
    return quiet(network, GRID, batch_size=8)


@pytest.fixture
def programs(monkeypatch):
    """The batches that are run, as (batch size, members a call)."""
    calls = []
    call = _program.Program.__call__

    def counted(self, numbers):
        calls.append((self.size, len(numbers[0]) if numbers else None))
        return call(self, numbers)

    monkeypatch.setattr(_program.Program, "__call__", counted)
    return calls


@pytest.fixture
def compiled(monkeypatch):
    """The batch sizes that are compiled."""
    sizes = []
    build = _program.Program.__init__

    def counted(self, traced, mesh, size):
        sizes.append(size)
        build(self, traced, mesh, size)

    monkeypatch.setattr(_program.Program, "__init__", counted)
    return sizes


@pytest.fixture
def ctrl_c():
    """A way to set what Ctrl-C does, whatever it does where the tests were started."""
    found = signal.getsignal(signal.SIGINT)

    def does(handler):
        signal.signal(signal.SIGINT, handler)

    does(signal.default_int_handler)
    yield does
    signal.signal(signal.SIGINT, found)


# What the result is


def test_a_row_at_batch_size_1_is_the_jitted_training(alone):
    train = jax.jit(network)
    for i, gamma in enumerate(GRID["gamma"]):
        for j, rate in enumerate(GRID["learning_rate"]):
            for seed in GRID["seed"]:
                expected = train(
                    gamma=np.float32(gamma), learning_rate=np.float32(rate), seed=seed
                )
                row = alone.isel(gamma=i, learning_rate=j, seed=seed)
                np.testing.assert_array_equal(row.loss, expected["loss"])
                np.testing.assert_array_equal(row["end.v"], expected["end"]["v"])
                assert row["end.seed"] == seed


@pytest.mark.parametrize("size", [3, 8])
def test_a_row_is_the_single_run_at_that_batch_size(size, rng):
    curves = quiet(network, GRID, batch_size=size)
    for _ in range(5):
        place = {name: rng.integers(len(values)) for name, values in GRID.items()}
        point = {name: [GRID[name][i]] for name, i in place.items()}
        single = quiet(network, point, batch_size=size, devices=jax.devices()[:1])
        row = curves.isel({name: [i] for name, i in place.items()})
        assert bits(single) == bits(row)


# Whole batches, short last ones, one batch for all, more than there are.
@pytest.mark.parametrize("size", [2, 3, 7, 16, 60, 100])
def test_any_batch_size(size, alone):
    curves = quiet(network, GRID, batch_size=size)
    for name in ("loss", "end.v"):
        # 15 steps, in each of which a few sums are added in another order.
        good = ~alone.diverged
        np.testing.assert_allclose(
            curves[name].where(good),
            alone[name].where(good),
            rtol=tolerance("float32", 128),
            atol=tolerance("float32", 16),
        )
    for name in ("end.seed", "diverged", "diverged_at", "finished"):
        np.testing.assert_array_equal(curves[name], alone[name])


@pytest.mark.parametrize("devices", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [1, 7, 8])
def test_any_number_of_devices_gives_the_same_bits(devices, size, alone, together):
    curves = quiet(network, GRID, batch_size=size, devices=jax.devices()[-devices:])
    expected = {1: alone, 8: together}.get(size)
    if expected is None:
        expected = quiet(network, GRID, batch_size=size)
    assert bits(curves) == bits(expected)
    assert curves.devices == devices


def test_the_dataset(together):
    assert together.loss.dims == ("gamma", "learning_rate", "seed", "loss_dim_0")
    assert together["end.v"].dims[-1] == "end.v_dim_0"
    assert together["end.seed"].dims == ("gamma", "learning_rate", "seed")
    assert together["end.seed"].dtype == "int32"
    np.testing.assert_array_equal(together.gamma, GRID["gamma"])  # float64, as given
    np.testing.assert_array_equal(together.seed, range(4))
    assert list(together.output.values) == ["end.seed", "end.v", "loss"]
    assert together.batch_size == 8
    assert together.compile_seconds > 0
    assert together.run_seconds > 0
    assert together.finished.all()


def test_what_diverged_is_kept_and_flagged(together):
    flagged = together.diverged
    np.testing.assert_array_equal(
        flagged, np.broadcast_to([[False], [False], [True]], flagged.shape)
    )
    lost = together.isel(learning_rate=2)
    assert np.isnan(lost.loss[..., -1]).all()
    assert np.isfinite(lost.loss[..., 0]).all()
    first = lost.diverged_at.sel(output="loss").values
    np.testing.assert_array_equal(
        first, np.argmax(~np.isfinite(lost.loss.values), axis=-1)
    )
    assert (first > 0).all()
    assert (together.diverged_at.sel(output="end.seed") == -1).all()
    assert (together.diverged_at.isel(learning_rate=0) == -1).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "complex64", "int8", "bool"])
def test_outputs_of_any_dtype_are_kept_as_they_are(dtype, tmp_path):
    """Also in a folder, also zeros with a sign, infinities and NaN."""
    values = jnp.array([-0.0, 1, 2, 0, 0], "float32")
    if dtype not in ("int8", "bool"):
        values = values.at[3:].set(jnp.array([jnp.inf, jnp.nan]))

    def train(x):
        return {"result": values.astype(dtype) * x.astype(dtype)}

    expected = np.asarray(jax.vmap(train)(jnp.arange(3))["result"])
    if dtype == "bfloat16":  # which files do not know
        expected = expected.astype("float32")
    for store in (None, tmp_path / "store"):
        curves = quiet(train, {"x": range(3)}, store=store)
        found = curves["result"].values
        assert found.dtype == expected.dtype
        assert found.tobytes() == expected.tobytes()


def test_zipped_points():
    points = {"gamma": [0.9, 0.5, 0.9], "learning_rate": [0.01, 0.02, 0.03]}
    curves = quiet(network, points | {"seed": [3, 1, 2]}, zipped=True, batch_size=1)
    assert curves.loss.dims == ("member", "loss_dim_0")
    assert curves.learning_rate.dims == ("member",)
    expected = jax.jit(network)(
        gamma=np.float32(0.5), learning_rate=np.float32(0.02), seed=1
    )
    np.testing.assert_array_equal(curves.loss[1], expected["loss"])


def test_python_values_are_a_group_each(compiled):
    def train(gamma, centered, power):
        assert isinstance(centered, bool)
        assert callable(power)
        return {"loss": power(gamma) + (10 if centered else 0)}

    def cube(x):
        return x**3

    grid = {
        "gamma": [0.25, 0.5],
        "centered": [True, False],
        "power": [jnp.square, cube],
    }
    curves = quiet(train, grid, batch_size=2)
    assert len(compiled) == 4
    assert curves.loss.dims == tuple(grid)
    assert curves.loss.sel(gamma=0.5, centered=True, power="cube") == 10.125
    assert curves.loss.sel(gamma=0.25, centered=False, power="square") == 0.0625


def test_python_values_between_numbers_keep_their_place():
    def train(a, kind, b):
        return {"loss": a + {"x": 10, "y": 20, None: 30}[kind] + b}

    grid = {"a": [1.0, 2.0], "kind": ["x", None, "y"], "b": [100.0, 200.0, 300.0]}
    curves = quiet(train, grid, batch_size=4)
    expected = (
        np.array([1, 2])[:, None, None]
        + np.array([10, 30, 20])[:, None]
        + np.array([100, 200, 300])
    )
    np.testing.assert_array_equal(curves.loss, expected)
    assert list(curves.kind.values) == ["x", "None", "y"]
    # Paired, equal values share a program wherever they stand.
    paired = {"a": [1.0, 2.0, 3.0], "kind": ["y", "x", "y"], "b": [1.0, 2.0, 3.0]}
    curves = quiet(train, paired, zipped=True)
    np.testing.assert_array_equal(curves.loss, [22, 14, 26])


def test_only_python_values():
    curves = quiet(
        lambda kind: {"loss": jnp.zeros(2) + len(kind)}, {"kind": ["a", "bc"]}
    )
    np.testing.assert_array_equal(curves.loss, [[1, 1], [2, 2]])


def test_a_static_number_is_an_array_of_objects():
    def train(width):
        return {"loss": jnp.ones(width).sum()}

    curves = quiet(train, {"width": np.array([2, 3], dtype=object)})
    np.testing.assert_array_equal(curves.loss, [2, 3])
    assert list(curves.width.values) == ["2", "3"]


def test_values_that_look_alike_are_told_apart():
    functions = [lambda x: x, lambda x: 2 * x, functools.partial(jnp.multiply, 3.0)]
    curves = quiet(lambda f: {"loss": f(jnp.ones(()))}, {"f": functions})
    assert list(curves.f.values) == ["<lambda>[0]", "<lambda>[1]", "multiply"]
    np.testing.assert_array_equal(curves.loss, [1, 2, 3])
    both = quiet(lambda f: {"loss": jnp.float32(f is True)}, {"f": [True, "True"]})
    np.testing.assert_array_equal(both.loss, [1, 0])


def test_64_bits(x64):
    seed = 2**40
    curves = quiet(
        lambda gamma, seed: {"loss": gamma * 1, "end": seed},
        {"gamma": [1 - 1e-12], "seed": [seed]},
    )
    assert curves.loss.item() == 1 - 1e-12
    assert curves.loss.dtype == "float64"
    assert curves.end.item() == seed


@hypothesis.settings(deadline=None, max_examples=20)
@hypothesis.given(
    st.lists(st.integers(1, 4), min_size=1, max_size=3),
    st.integers(1, 9),
    st.integers(1, 4),
)
def test_every_member_is_where_it_belongs(lengths, size, devices):
    grid = {name: range(n) for name, n in zip("abc", lengths, strict=False)}
    weights = {"a": 100, "b": 10, "c": 1}

    def train(**point):
        return {"value": sum(weights[name] * x for name, x in point.items())}

    curves = quiet(train, grid, batch_size=size, devices=jax.devices()[:devices])
    for i in np.ndindex(*lengths):
        expected = sum(weights[n] * j for n, j in zip("abc", i, strict=False))
        assert curves["value"].values[i] == expected


# How it runs


def test_one_compilation_for_each_shape(compiled, programs):
    quiet(network, GRID, batch_size=7, devices=jax.devices()[:2])
    assert compiled == [7]
    assert programs == [(7, 14)] * 5  # 60 members, the last batch filled up


def test_train_is_traced_once():
    calls = []

    def train(x):
        calls.append(x)
        return {"loss": x}

    quiet(train, {"x": range(50)}, batch_size=3)
    assert len(calls) == 1


def test_what_the_training_closes_over_is_an_argument_of_the_program():
    """Data as constants would be compiled into the program of every batch size."""
    data = jnp.asarray(np.random.default_rng(0).standard_normal(100_000), "float32")
    traced = _trace.trace(lambda x: data.sum() * x, {}, {"x": np.dtype("float32")})
    mesh = _program.mesh_of(jax.devices()[:1])
    program = _program.Program(_program.placed(traced, mesh), mesh, 4)
    assert program.bytes > 400_000
    assert len(program._call.as_text()) < 100_000


def test_auto_begins_with_nearly_full_batches():
    assert _run.first(64, 1, 400_000) == 8  # as many as the cache holds
    assert _run.first(64, 1, 30_000) == 64
    assert _run.first(64, 1, 10**9) == 1
    assert _run.first(9, 1, 400_000) == 5  # 5 and 4, not 8 and 1
    assert _run.first(3, 4, 400_000) == 1
    assert _run.first(64, 1, 0) == 64
    assert _run.first(100_000, 8, 0) == 962  # 13 rounds of 8 x 962


def test_only_arrays_of_a_members_own_count_for_the_cache():
    data = jnp.ones((1000, 10))

    def footprint(train):
        return _trace.footprint(_trace.trace(train, {}, {"x": np.dtype("float32")}))

    def shared(x):
        shuffled = jax.random.permutation(jax.random.key(0), data)
        return jax.lax.fori_loop(0, 3, lambda i, y: y + (shuffled[i] * y).sum(), x)

    def own(x):
        key = jax.random.key(x.astype("int32"))
        return jax.random.permutation(key, data).sum()

    assert footprint(shared) == 40  # a row of the data, times y
    assert footprint(own) == 40_000


def test_auto_tries_other_sizes_while_that_is_cheap():
    choose = _run.choose
    # Nothing is tried for the little that is left, or where compiling takes long.
    assert choose({8: 1.0}, 20, 1, 0.1) == (8, 20)
    assert choose({8: 1.0}, 1000, 1, 51) == (8, 1000)
    assert choose({8: 1.0}, 1000, 1, 49) == (32, 32)
    # Up as long as it helps, then down.
    assert choose({8: 1.0, 32: 0.5}, 10_000, 2, 1) == (128, 256)
    assert choose({8: 1.0, 32: 2.0}, 10_000, 2, 1) == (2, 16)
    assert choose({2: 0.9, 8: 1.0}, 10_000, 2, 1) == (1, 4)
    assert choose({1: 1.0, 2: 0.9, 8: 1.0}, 10_000, 2, 1) == (2, 10_000)
    # What does not fit is not tried again.
    assert choose({256: 1.0, 1024: np.inf, 64: 2.0}, 10**6, 1, 1) == (256, 10**6)


def test_auto_keeps_what_its_trials_computed(monkeypatch, programs):
    monkeypatch.setattr(_run, "choose", lambda *_: trials.pop(0))
    monkeypatch.setattr(_run, "first", lambda *_: 8)
    trials = [(32, 32), (2, 32), (8, 10_000)]
    curves = quiet(square, {"x": range(100)}, devices=jax.devices()[:1])
    np.testing.assert_array_equal(curves.loss, np.arange(100) ** 2)
    # 8 members at first; none is computed twice.
    assert programs == [(8, 8), (32, 32)] + [(2, 2)] * 16 + [(8, 8)] * 4
    assert trials == []


def test_auto_takes_a_smaller_batch_where_memory_is_short(monkeypatch, compiled):
    def train(x):
        return {"loss": jnp.full(100_000, x).cumsum()}

    monkeypatch.setattr(_run, "available", lambda _: 2_500_000)
    curves = quiet(train, {"x": range(16)}, devices=jax.devices()[:1])
    assert compiled == [8, 4, 2]  # 8 members' arrays fit into the cache
    assert curves.batch_size == 2
    np.testing.assert_array_equal(curves.loss[:, -1], 1e5 * np.arange(16))


def test_progress_is_shown(capsys):
    sweep(network, GRID, batch_size=8, devices=jax.devices()[:2])
    shown = capsys.readouterr().err
    for part in ("compiling for 8 at once", "60/60", "member/s", "diverged=20"):
        assert part in shown
    quiet(square, {"x": [1, 2]})
    assert capsys.readouterr().err == ""


# Bad input: one line


def raises(error, message, *args, **kwargs):
    with pytest.raises(error) as caught:
        quiet(*args, **kwargs)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ([], ValueError, "`x` must have at least one value, got none"),
        ([1.0, np.nan], ValueError, "`x` must have no NaN, got one at [1]"),
        (0.9, TypeError, "`x` must be a sequence of values, got 0.9"),
        ("abc", TypeError, "`x` must be a sequence of values, got 'abc'"),
        (
            np.ones((2, 3)),
            ValueError,
            "`x` must have one dimension, got an array of shape (2, 3)",
        ),
        ([2**40], ValueError, "`x` must fit int32, got 1099511627776"),
        ([1e300], ValueError, "`x` must fit float32, got 1e+300"),
        ([1.0, 1e-50], ValueError, "`x` must fit float32, where 1e-50 is 0"),
        (
            [2.0, 1.0, 1 + 1e-12],
            ValueError,
            "`x` must have values that differ in float32, but 1.0 and 1.000000000001 "
            "are the same there",
        ),
        (
            [0.5, 1.0, 0.5],
            ValueError,
            "`x` must have each value once, but 0.5 is there 2 times",
        ),
        (
            ["a", "b", "a"],
            ValueError,
            "`x` must have each value once, but a is there 2 times",
        ),
    ],
)
def test_bad_axes(values, error, message):
    raises(error, message, square, {"x": values})


def test_random_keys_are_no_axis():
    raises(
        TypeError,
        "`x` must be numbers or Python values, got random keys; sweep over seeds, and "
        "make the key of each with jax.random.key",
        square,
        {"x": jax.random.split(jax.random.key(0), 3)},
    )


@pytest.mark.parametrize("grid", [{}, [1, 2], None])
def test_bad_grids(grid):
    raises(
        TypeError,
        f"`grid` must map the name of at least one axis to its values, got {grid!r}",
        square,
        grid,
    )


def test_names_that_a_result_needs():
    names = "checksum, diverged, diverged_at, finished, member, output"
    for name in ("member", "diverged", "no name", 3):
        raises(
            ValueError,
            "an axis' name must be an argument's name, and none of "
            f"{names}; got {name!r}",
            square,
            {name: [1]},
        )
    raises(
        ValueError,
        "`train` must not call an output 'x': it is taken",
        lambda x: {"x": x},
        {"x": [1]},
    )


def test_unequal_lengths():
    raises(
        ValueError,
        "zipped axes must be equally long, but `a` has 2, `b` has 3",
        lambda a, b: a * b,
        {"a": [1, 2], "b": [1, 2, 3]},
        zipped=True,
    )


def test_other_arguments():
    grid = {"x": [1]}
    raises(TypeError, "`zipped` must be True or False, got 1", square, grid, zipped=1)
    for size, error in ((0, ValueError), ("all", TypeError), (2.0, TypeError)):
        message = f"`batch_size` must be an integer >= 1, got {size!r}"
        raises(error, message, square, grid, batch_size=size)
    raises(
        ValueError,
        "`devices` must be at least one device, each once, got []",
        square,
        grid,
        devices=[],
    )
    raises(
        TypeError,
        "`devices` must be a sequence of jax devices, got 'cpu'",
        square,
        grid,
        devices="cpu",
    )
    raises(TypeError, "`train` must be a function of the axes, got 3", 3, grid)


def test_train_without_the_axis_name():
    raises(
        TypeError,
        "`train` must take the axes of the grid by name: got an unexpected keyword "
        "argument 'gamma'; the axes are gamma, its arguments (x)",
        square,
        {"gamma": [0.9]},
    )
    raises(
        TypeError,
        "`train` must take the axes of the grid by name: missing a required argument: "
        "'learning_rate'; the axes are gamma, its arguments (gamma, learning_rate)",
        lambda gamma, learning_rate: gamma,
        {"gamma": [0.9]},
    )


def test_train_that_returns_no_arrays():
    def returning(value):
        return lambda x: value

    grid = {"x": [1.0]}
    message = "`train` must return a tree of arrays, but {} is {}"
    raises(TypeError, message.format("loss", 0.5), returning({"loss": 0.5}), grid)
    raises(TypeError, message.format("value", None), returning(None), grid)
    raises(TypeError, message.format("a.b", None), returning({"a": {"b": None}}), grid)
    raises(
        TypeError,
        "`train` must return a tree of arrays, got {}",
        returning({}),
        grid,
    )
    raises(
        ValueError,
        "`train` must return arrays with elements, but loss has shape (0,)",
        returning({"loss": jnp.ones(0)}),
        grid,
    )
    raises(
        TypeError,
        "`train` must return numbers, but value is key<fry>; "
        "jax.random.key_data makes numbers of random keys",
        lambda x: jax.random.key(0),
        grid,
    )


def test_train_that_cannot_be_traced():
    def branches(x):
        return {"loss": x if x > 0 else -x}

    line = branches.__code__.co_firstlineno + 1
    raises(
        TypeError,
        f"`train` cannot be traced: TracerBoolConversionError at test_sweep.py:{line}; "
        "a hyperparameter that decides shapes or branches must be an axis of Python "
        "values (an array of dtype object)",
        branches,
        {"x": [1.0]},
    )


def test_train_that_raises():
    def fails(x):
        raise KeyError("no such file\nand more")

    line = fails.__code__.co_firstlineno + 1
    raises(
        RuntimeError,
        f"`train` raised KeyError at test_sweep.py:{line}: 'no such file\\nand more'",
        fails,
        {"x": [1.0]},
    )


def test_outputs_that_differ_between_groups():
    raises(
        ValueError,
        "`train` must return the same for all Python values, but loss is float32[2] "
        "with {'n': 2} and float32[3] with {'n': 3}",
        lambda n: {"loss": jnp.ones(n)},
        {"n": np.array([2, 3], object)},
    )


def test_what_the_extra_installs_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "zarr", None)
    raises(
        ModuleNotFoundError,
        "zarr is missing: pip install 'jax-rmsprop[sweep]'",
        square,
        {"x": [1]},
        store="sweep.zarr",
    )
    monkeypatch.setitem(sys.modules, "xarray", None)
    raises(
        ModuleNotFoundError,
        "xarray is missing: pip install 'jax-rmsprop[sweep]'",
        square,
        {"x": [1]},
    )


# The folder


def test_the_same_from_a_folder(tmp_path, together, compiled):
    store = tmp_path / "a" / "sweep.zarr"
    for _ in range(2):
        curves = quiet(network, GRID, batch_size=8, store=store)
        assert bits(curves) == bits(together)
        assert list(curves.data_vars) == list(together.data_vars)
    assert compiled == [8]  # the second time there is nothing to compute
    assert bits(load_sweep(store)) == bits(together)
    assert bits(load_sweep(str(store))) == bits(together)


def test_groups_and_points_from_a_folder(tmp_path):
    def train(a, kind, flag):
        return {"loss": a * len(kind) + float(flag)}

    product = {"a": [1.0, 2.0], "kind": ["xy", "x"], "flag": [False, True]}
    points = {"a": [1.0, 2.0], "kind": ["xy", "x"], "flag": [True, False]}
    for grid, zipped in ((product, False), (points, True)):
        store = tmp_path / str(zipped)
        expected = quiet(train, grid, zipped=zipped)
        curves = quiet(train, grid, zipped=zipped, store=store)
        assert bits(curves) == bits(expected) == bits(load_sweep(store))
        assert bits(quiet(train, grid, zipped=zipped, store=store)) == bits(expected)


def test_it_is_lazy_where_it_does_not_fit(tmp_path, monkeypatch, together):
    monkeypatch.setattr(_sweep, "free_memory", lambda: 1000)
    curves = quiet(network, GRID, batch_size=8, store=tmp_path / "sweep.zarr")
    assert curves.loss.chunks is not None
    assert bits(curves.compute()) == bits(together)


@pytest.mark.parametrize(
    "harm", ["cut", "emptied", "removed", "a bit", "another chunk", "checksum"]
)
def test_a_torn_write_is_noticed_and_computed_again(tmp_path, programs, harm):
    def wave(x):
        return {"loss": jnp.sin(x * jnp.arange(100.0))}

    grid = {"x": np.linspace(1, 2, 60)}
    store = tmp_path / "sweep.zarr"
    whole = quiet(wave, grid, batch_size=8, store=store, devices=jax.devices()[:1])
    chunk = store / "0" / ("checksum/c/2" if harm == "checksum" else "loss/c/2/0")
    content = chunk.read_bytes()
    if harm in ("removed", "checksum"):
        chunk.unlink()
    elif harm == "another chunk":
        chunk.write_bytes((store / "0/loss/c/3/0").read_bytes())
    else:
        harmed = {"cut": content[: len(content) // 2], "emptied": b""}
        flipped = content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]
        chunk.write_bytes(harmed.get(harm, flipped))
    programs.clear()
    curves = quiet(wave, grid, batch_size=8, store=store, devices=jax.devices()[:1])
    assert programs == [(8, 8)]  # that batch, and no other
    assert bits(curves) == bits(whole)


def test_another_number_of_devices_goes_on(ctrl_c, tmp_path, together, monkeypatch):
    store = tmp_path / "sweep.zarr"
    interrupt_after(monkeypatch, 1)
    with pytest.warns(UserWarning, match="interrupted: 24 of 60 members"):
        quiet(network, GRID, batch_size=8, store=store, devices=jax.devices()[:3])
    monkeypatch.undo()
    curves = quiet(network, GRID, batch_size=8, store=store, devices=jax.devices()[:2])
    assert bits(curves) == bits(together)


def test_auto_goes_on_with_the_sizes_in_the_folder(tmp_path, monkeypatch, programs):
    store = tmp_path / "sweep.zarr"
    trials = [(32, 32), (2, 10_000)]
    monkeypatch.setattr(_run, "first", lambda *_: 8)
    monkeypatch.setattr(_run, "choose", lambda *_: trials.pop(0))
    grid, one = {"x": np.arange(100.0)}, jax.devices()[:1]
    expected = quiet(square, grid, store=store, devices=one)
    assert [s[:3] for s in _keep.attributes(_location.locate(store))["segments"]] == [
        [0, 8, 8],
        [8, 40, 32],
        [40, 100, 2],
    ]
    # As if killed in the trial: its last blocks are not there.
    (store / "1/loss/c/0").unlink()
    (store / "2/loss/c/20").unlink()
    programs.clear()
    curves = quiet(square, grid, store=store, devices=one)
    assert programs == [(32, 32), (2, 2)]
    assert bits(curves) == bits(expected)


def test_axes_of_any_name(tmp_path):
    """Also those by which a folder calls other things, or might."""
    grid = {"order": [1.0, 2.0], "run": [3.0], "grid": [0.5], "segments": [2.0]}

    def train(order, run, grid, segments):
        return {"loss": order * run * grid * segments}

    for _ in range(2):
        curves = quiet(train, grid, store=tmp_path)
        assert curves.loss.dims == tuple(grid)
        np.testing.assert_array_equal(curves.loss.values.ravel(), [3, 6])
    assert bits(load_sweep(tmp_path)) == bits(curves)


def test_less_memory_than_before(tmp_path, monkeypatch):
    """What a folder has begun at a batch size goes on at it."""

    def train(x):
        return {"loss": jnp.full(100_000, x).cumsum()}

    one = jax.devices()[:1]
    expected = quiet(train, {"x": range(16)}, store=tmp_path, devices=one)
    (tmp_path / "0/loss/c/0/0").unlink()
    monkeypatch.setattr(_run, "available", lambda _: 1000)
    curves = quiet(train, {"x": range(16)}, store=tmp_path, devices=one)
    assert bits(curves) == bits(expected)


def refused(store, differs, *args, **kwargs):
    raises(
        ValueError,
        f"`store` {store} holds another sweep: {differs}",
        *args,
        store=store,
        **kwargs,
    )


def test_a_folder_of_another_sweep_is_refused(tmp_path, monkeypatch):
    store = tmp_path / "sweep.zarr"
    grid = {"x": [1.0, 2.0], "y": [1.0]}
    data = jnp.ones(3)

    def train(x, y):
        return {"loss": x.astype(float) * y * data}

    quiet(train, grid, store=store, batch_size=2)
    refused(
        store,
        "its axes are x, y, this one's y, x",
        train,
        {"y": [1.0], "x": [1.0, 2.0]},
        batch_size=2,
    )
    refused(
        store, "its x has 2 values, this one's 3", train, grid | {"x": [1.0, 2.0, 3.0]}
    )
    refused(store, "its x has other values", train, grid | {"x": [1.0, 2.5]})
    refused(store, "its x has other values", train, grid | {"x": [1, 2]})
    refused(
        store,
        "its output loss is float32[3], this one's float32[]",
        lambda x, y: {"loss": x * y},
        grid,
    )
    refused(
        store,
        "its output loss is float32[3], this one's missing",
        lambda x, y: {"error": x * y * data},
        grid,
    )
    another = "its `train` is another function, or closes over other data"
    refused(store, another, lambda x, y: {"loss": x + y * data}, grid)
    other = 2 * data
    refused(store, another, lambda x, y: {"loss": x.astype(float) * y * other}, grid)
    refused(
        store,
        another,
        jax.jit(lambda x, y: {"loss": x.astype(float) * y * other}),
        grid,
    )
    refused(store, "its `batch_size` is 2, this one's 4", train, grid, batch_size=4)
    now = jax.__version__
    monkeypatch.setattr(jax, "__version__", "0.0.1")
    refused(
        store,
        f"it was computed with jax {now}, this one is with 0.0.1, so the bits may "
        "differ; `load_sweep` reads it",
        train,
        grid,
        batch_size=2,
    )
    assert load_sweep(store).loss.shape == (2, 1, 3)


def test_zipped_and_product_are_not_the_same(tmp_path):
    grid = {"x": [1.0], "y": [1.0]}
    quiet(lambda x, y: x * y, grid, store=tmp_path / "a")
    refused(
        tmp_path / "a",
        "its `zipped` is False, this one's True",
        lambda x, y: x * y,
        grid,
        zipped=True,
    )


def in_shard_map(f, data):
    mesh = jax.make_mesh((1,), ("d",))
    one = jax.sharding.PartitionSpec()
    inner = jax.shard_map(
        lambda x: f(x, data), mesh=mesh, in_specs=one, out_specs=one, check_vma=False
    )
    return lambda x: inner(x)


def in_custom_vjp(f, data):
    @jax.custom_vjp
    def inner(x):
        return x

    inner.defvjp(lambda x: (x, x), lambda x, g: (f(x, data) * g,))
    return jax.grad(inner)


def in_custom_jvp(f, data):
    @jax.custom_jvp
    def inner(x):
        return x

    inner.defjvp(lambda x, t: (x[0], f(x[0], data) * t[0]))
    return jax.grad(inner)


def in_pallas(f, data):
    from jax.experimental import pallas as pl

    def kernel(data, x, out):
        out[...] = f(x[...], data[...])

    def inner(x):
        shape = jax.ShapeDtypeStruct((), jnp.float32)
        return pl.pallas_call(kernel, out_shape=shape, interpret=True)(data, x)

    return jax.jit(inner)


# Where a training may close over an array. Deeper, JAX holds it where the training's
# own jaxpr does not say so, or as the value of an operand.
PLACES = {
    "open": lambda f, data: lambda x: f(x, data),
    "jit": lambda f, data: jax.jit(lambda x: f(x, data)),
    "jit in jit": lambda f, data: jax.jit(lambda x: jax.jit(lambda y: f(y, data))(x)),
    "vmap": lambda f, data: lambda x: jax.vmap(lambda y: f(y, data))(x[None])[0],
    "scan": lambda f, data: (
        lambda x: jax.lax.scan(lambda y, _: (f(y, data), None), x, length=2)[0]
    ),
    "while": lambda f, data: (
        lambda x: jax.lax.while_loop(lambda y: y < f(y, data), lambda y: y + 1, x)
    ),
    "jit in a loop": lambda f, data: (
        lambda x: jax.lax.fori_loop(0, 3, lambda _, y: jax.jit(f)(y, data), x)
    ),
    "cond": lambda f, data: (
        lambda x: jax.lax.cond(x > 0, lambda y: f(y, data), lambda y: y, x)
    ),
    "checkpoint": lambda f, data: jax.grad(jax.checkpoint(lambda x: f(x, data))),
    "custom_vjp": in_custom_vjp,
    "custom_jvp": in_custom_jvp,
    "shard_map": in_shard_map,
    "pallas": in_pallas,
}


KINDS = {
    "jax": lambda scale: scale * jnp.arange(1000.0),
    "numpy": lambda scale: np.float32(scale) * np.arange(1000, dtype="float32"),
    "scalar": lambda scale: jnp.float32(scale),
    "key": lambda scale: jax.random.key(int(scale)),
}


def fingerprint(train):
    return _trace.fingerprint(_trace.trace(train, {}, {"x": np.dtype("float32")}))


def product(x, data):
    return (x * jnp.sum(data * data)).astype(jnp.float32)


@pytest.mark.parametrize(
    ("place", "kind"),
    # Pallas takes no random keys.
    [(p, k) for p in PLACES for k in KINDS if (p, k) != ("pallas", "key")],
)
def test_the_fingerprint_is_of_what_a_training_closes_over(place, kind):
    def of(scale):
        f = product
        data = KINDS[kind](scale)
        if kind == "key":
            f = lambda x, key: product(x, jax.random.normal(key))  # noqa: E731
        inner = PLACES[place](f, data)
        return fingerprint(lambda x: {"loss": inner(x)})

    assert of(1.0) == of(1.0)
    assert of(1.0) != of(2.0)


def test_the_fingerprint_where_jax_makes_arguments_of_constants():
    name = "jax_use_simplified_jaxpr_constants"
    if not hasattr(jax.config, name):
        pytest.skip("JAX 0.8 has no such option")

    def of(scale):
        data = scale * jnp.arange(1000.0)
        inner = jax.jit(lambda x: product(x, data))
        return fingerprint(lambda x: {"loss": inner(x)})

    with flag(name, True):
        assert of(1.0) == of(1.0)
        assert of(1.0) != of(2.0)


def test_the_fingerprint_is_the_same_in_every_process():
    code = (
        "import numpy as np;"
        "from tests.sweeps import called_back, named_residuals, network;"
        "from jax_rmsprop._sweep import _trace; d = np.dtype('float32');"
        "n = dict(gamma=d, learning_rate=d, seed=np.dtype('int32'));"
        "print([_trace.fingerprint(_trace.trace(train, {}, n)) for train in"
        " (network, named_residuals, called_back)])"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1


@pytest.mark.parametrize(
    "way", ["~", "relative", "file", "link", "slash", "zarr", "Path"]
)
def test_every_way_to_write_a_path_is_one_place(way, tmp_path, monkeypatch):
    import zarr.storage

    real = tmp_path / "home" / "runs of Jürgen"
    real.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "home")
    store = {
        "~": "~/runs of Jürgen/a.zarr",
        "relative": "runs of Jürgen/../runs of Jürgen/a.zarr",
        "file": (real / "a.zarr").as_uri(),
        "link": str(tmp_path / "link" / "a.zarr"),
        "slash": f"{real}/a.zarr/",
        "zarr": zarr.storage.LocalStore(real / "a.zarr"),
        "Path": real / "a.zarr",
    }[way]
    (tmp_path / "link").symlink_to(real)
    expected = quiet(square, {"x": [1.0, 2.0]}, store=store, batch_size=1)
    assert [p.name for p in real.iterdir()] == ["a.zarr"]
    assert [p.name for p in (tmp_path / "home").iterdir()] == [real.name]
    if way != "relative":
        monkeypatch.chdir(tmp_path)
    for again in (store, real / "a.zarr"):
        assert bits(load_sweep(again)) == bits(expected)
    with pytest.raises(ValueError, match="holds another sweep: its x has other values"):
        quiet(square, {"x": [3.0, 2.0]}, store=store, batch_size=1)


@pytest.mark.parametrize(
    ("store", "error", "message"),
    [
        ("a.zip", ValueError, "`store` must be a folder, got 'a.zip'"),
        (3, TypeError, "`store` must be a path, a URL or a zarr store, got 3"),
        ({}, TypeError, "`store` must be a path, a URL or a zarr store, got {}"),
        ("nowhere://a", ValueError, "`store` nowhere://a: Protocol not known: nowhere"),
        ("dropbox://a", ModuleNotFoundError, "`store` dropbox://a: "),
        ("simplecache::memory://a", ValueError, "`store` must be a plain URL, got"),
    ],
)
def test_a_store_that_is_nowhere(store, error, message):
    for call in (load_sweep, lambda s: quiet(square, {"x": [1.0]}, store=s)):
        with pytest.raises(error) as caught:
            call(store)
        assert str(caught.value).startswith(message)
        assert "\n" not in str(caught.value)


def test_two_calls_on_one_store_at_once(tmp_path, start, together):
    """The second one waits, and finds all that the first one has computed."""
    store = tmp_path / "sweep.zarr"
    both = [start(store, size=8) for _ in range(2)]
    assert [result(*each) for each in both] == [(bits(together), 60)] * 2


def test_a_call_that_waits_says_so(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    store = tmp_path / "sweep.zarr"
    store.mkdir()
    other = os.open(store, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    threading.Timer(0.5, os.close, [other]).start()
    with pytest.warns(
        UserWarning, match="another process is writing to `store` .*waiti"
    ):
        curves = quiet(square, {"x": [1.0]}, store=store)
    assert curves.finished.all()


def test_a_sweep_inside_a_jit():
    with pytest.raises(TypeError, match="^`sweep` must be called outside a jit"):
        jax.jit(lambda y: quiet(lambda x: {"loss": x * y}, {"x": [1.0]}).loss.values)(
            1.0
        )


def test_a_sweep_where_jit_is_switched_off(together):
    with jax.disable_jit():
        assert bits(quiet(network, GRID, batch_size=8)) == bits(together)


@pytest.mark.parametrize("switch", ["debug_nans", "debug_infs"])
def test_a_member_that_diverges_under_a_switch(switch, together):
    with SWITCHES[switch]():
        curves = quiet(network, GRID, batch_size=8)
    assert bits(curves) == bits(together)
    assert curves.diverged.any()


@pytest.mark.parametrize("library", ["pandas", "xarray", "jax", "tuple", "range"])
def test_axes_of_other_libraries(library):
    import pandas as pd
    import xarray as xr

    values = {
        "pandas": pd.Series([1, 2, 3], index=[5, 6, 7]),
        "xarray": xr.DataArray([1, 2, 3], dims="x"),
        "jax": jnp.arange(1, 4),
        "tuple": (1, 2, 3),
        "range": range(1, 4),
    }[library]
    found = quiet(square, {"x": values})
    np.testing.assert_array_equal(found.loss, [1, 4, 9])
    np.testing.assert_array_equal(found.x, [1, 2, 3])


def test_a_store_that_is_a_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    raises(
        ValueError,
        f"`store` must be a folder or a new path, got the file {path}",
        square,
        {"x": [1]},
        store=path,
    )


def test_a_store_that_is_another_folder(tmp_path):
    import zarr

    (tmp_path / "thesis.tex").write_text("")
    raises(
        ValueError,
        f"`store` must be a sweep's or a new path, but {tmp_path} has thesis.tex",
        square,
        {"x": [1]},
        store=tmp_path,
    )
    zarr.create_group(tmp_path / "group")
    raises(
        ValueError,
        f"`store` must be a sweep's, but {tmp_path / 'group'} is of something else",
        square,
        {"x": [1]},
        store=tmp_path / "group",
    )
    with pytest.raises(ValueError, match="has no finished members"):
        load_sweep(tmp_path / "nothing")


def test_a_store_that_cannot_be_written():
    # A place where not even the superuser makes folders.
    with pytest.raises(
        OSError, match=r"`store` /proc/sweep.zarr cannot be written: \w"
    ):
        quiet(square, {"x": [1]}, store="/proc/sweep.zarr")


def test_an_empty_folder_is_a_new_store(tmp_path):
    """A process that was killed while it made the store leaves one."""
    (tmp_path / "zarr.json.0123.partial").write_text("{")
    curves = quiet(square, {"x": [1, 2]}, store=tmp_path)
    np.testing.assert_array_equal(curves.loss, [1, 4])


def test_a_full_disk(tmp_path):
    """Files of more than a few kilobytes cannot be written, then they can."""
    store = tmp_path / "sweep.zarr"
    code = (
        "import resource, numpy as np; from jax_rmsprop import sweep\n"
        "import jax.numpy as jnp, jax\n"
        "def train(x):\n"
        "    noise = jax.random.normal(jax.random.key(x), (5000,))\n"
        "    return {'loss': jnp.where(x < 8, 0.0, noise)}\n"
        "import sys; limit = int(sys.argv[2])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))\n"
        "c = sweep(train, {'x': range(16)}, batch_size=4, store=sys.argv[1],"
        " progress=False)\n"
        "print(int(c.finished.sum()))"
    )

    def attempt(limit):
        return subprocess.run(
            [sys.executable, "-c", code, str(store), str(limit)],
            capture_output=True,
            text=True,
        )

    failed = attempt(20_000)
    assert failed.returncode == 1
    last = failed.stderr.strip().splitlines()[-1]
    assert (
        f"`store` {store} cannot be written: File too large; what is finished" in last
    )
    assert int(load_sweep(store).finished.sum()) == 8
    assert attempt(-1).stdout == "16\n"


# Ends


def steps_of(gamma, steps=3):
    """The last step of some, all gradients being 1."""
    optimizer, one = rmsprop(1e-3, gamma), jnp.ones(1)
    state = optimizer.init(one)
    for _ in range(steps):
        updates, state = optimizer.update(one, state)
    return {"step": updates[0]}


def test_a_gamma_that_float32_takes_for_1():
    """By the same numbers as doubles, which a single optimizer has."""
    gammas = log_one_minus(0.9, 1 - 1e-9, 6)
    assert (np.float32(gammas) == 1).any()
    for train in (
        steps_of,
        lambda gamma: jax.vmap(lambda _: steps_of(gamma))(jnp.ones(2)),
    ):
        found = quiet(train, {"gamma": gammas}, batch_size=2).step.values
        alone = [steps_of(float(gamma))["step"] for gamma in gammas]
        np.testing.assert_allclose(
            found.reshape(len(gammas), -1)[:, 0], alone, rtol=tolerance("float32", 64)
        )
    # An axis of Python values needs nothing of that.
    python = {"gamma": np.array(gammas, object)}
    found = quiet(jax.jit(steps_of, static_argnums=0), python).step.values
    np.testing.assert_allclose(
        found.ravel(), np.ravel(alone), rtol=tolerance("float32", 64)
    )


def test_a_gamma_that_is_lost_on_the_way_is_refused():
    """Where the optimizer gets another array than the sweep gave."""
    for train in (
        jax.jit(steps_of),
        lambda gamma: steps_of(gamma * 1.0),
        lambda gamma: {"loss": gamma},
    ):
        with pytest.raises(ValueError, match="^`gamma` has values so near 1 that") as e:
            quiet(train, {"gamma": [0.5, 0.9999999]})
        assert "\n" not in str(e.value)
        quiet(train, {"gamma": [0.5, 0.9999]})


def interrupt_after(monkeypatch, batches):
    """Press Ctrl-C while a batch runs."""
    call = _program.Program.__call__
    count = []

    def interrupted(self, numbers):
        count.append(None)
        if len(count) == batches:
            signal.raise_signal(signal.SIGINT)
        return call(self, numbers)

    monkeypatch.setattr(_program.Program, "__call__", interrupted)


@pytest.mark.parametrize("kept", [False, True])
def test_ctrl_c_ends_with_what_is_finished(
    kept, tmp_path, monkeypatch, together, ctrl_c
):
    store = tmp_path / "sweep.zarr" if kept else None
    before = signal.getsignal(signal.SIGINT)
    interrupt_after(monkeypatch, 2)
    one = jax.devices()[:1]
    again = ", and the same call computes them" if kept else ""
    with pytest.warns(UserWarning, match="interrupted") as caught:
        curves = quiet(network, GRID, batch_size=8, store=store, devices=one)
    assert str(caught[0].message) == (
        "interrupted: 16 of 60 members are finished; those where `finished` is False "
        f"are missing{again}"
    )
    assert signal.getsignal(signal.SIGINT) is before
    assert curves.finished.values.sum() == 16
    done = curves.finished.values.ravel()
    assert done[:16].all()
    for name in ("loss", "end.v", "diverged_at", "diverged"):
        rows, whole = (
            x[name].values.reshape(60, -1).astype(float) for x in (curves, together)
        )
        np.testing.assert_array_equal(rows[:16], whole[:16])
        missing = np.nan if name in ("loss", "end.v") else rows[20]
        np.testing.assert_array_equal(
            rows[16:], np.broadcast_to(missing, rows[16:].shape)
        )
    assert not curves.diverged.values.ravel()[16:].any()
    monkeypatch.undo()
    if kept:
        assert bits(load_sweep(store)) == bits(curves)
        whole = quiet(network, GRID, batch_size=8, store=store, devices=one)
        assert bits(whole) == bits(together)


def test_the_second_ctrl_c_ends_at_once(monkeypatch, tmp_path, ctrl_c):
    call = _program.Program.__call__

    def interrupted(self, numbers):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return call(self, numbers)

    monkeypatch.setattr(_program.Program, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quiet(square, {"x": [1]}, store=tmp_path)
    monkeypatch.undo()
    np.testing.assert_array_equal(quiet(square, {"x": [1]}, store=tmp_path).loss, [1])


def test_ctrl_c_before_anything_ran(monkeypatch, ctrl_c):
    build = _program.Program.__init__

    def interrupted(self, *args):
        signal.raise_signal(signal.SIGINT)
        build(self, *args)

    monkeypatch.setattr(_program.Program, "__init__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quiet(square, {"x": [1]})


def test_a_ctrl_c_that_is_switched_off_stays_off(monkeypatch, ctrl_c):
    """As a shell does for a job in the background."""
    ctrl_c(signal.SIG_IGN)
    interrupt_after(monkeypatch, 2)
    curves = quiet(square, {"x": range(8)}, batch_size=1, devices=jax.devices()[:1])
    assert curves.finished.all()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


# Processes


@pytest.fixture
def start():
    """Start processes that sweep; those that still run in the end are killed."""
    running = []

    def start(store, **options):
        answer, theirs = forks().Pipe(duplex=False)
        process = forks().Process(
            target=run, args=(theirs, store), kwargs=options, daemon=True
        )
        process.start()
        theirs.close()
        running.append(process)
        return process, answer

    yield start
    for process in running:
        process.kill()
        process.join()


def result(process, answer):
    assert answer.poll(240)
    found = answer.recv()
    process.join(60)
    assert process.exitcode == 0
    return found


def chunks(store):
    return sum(1 for _ in store.glob("*/checksum/c/*"))


def test_kill_9_ten_times_over(tmp_path, start):
    """Each time at another of the moments at which it begins or ends a file.

    To create the folder takes 76 of them, and a batch 10.
    """
    store = tmp_path / "sweep.zarr"
    random = np.random.default_rng(int.from_bytes(os.urandom(4)))
    creating = random.integers(1, 76, 4)
    computing = random.integers(90, 130, 1), random.integers(1, 60, 5)
    died, counts = np.concatenate([creating, *computing]), []
    for number in died:
        process, _ = start(store, die=int(number), size=1)
        process.join(240)
        assert process.exitcode == -signal.SIGKILL
        counts.append(chunks(store))
    print("killed at", died, "with batches in the folder", counts)
    assert counts == sorted(counts)
    assert 0 < counts[-1] < 60  # it was at work
    found = result(*start(store, size=1))
    whole = quiet(network, GRID, batch_size=1, devices=jax.devices()[:1])
    assert found == (bits(whole), 60)


def test_two_processes_give_the_same(tmp_path, start, together):
    for store in (None, tmp_path / "sweep.zarr"):
        options = {"devices": 2, "processes": 2, "port": free_port(), "size": 8}
        both = [start(store, process=i, **options) for i in range(2)]
        assert [result(*each) for each in both] == [(bits(together), 60)] * 2


def test_two_processes_of_which_one_is_killed(tmp_path, start, alone):
    store = tmp_path / "sweep.zarr"
    options = {"devices": 2, "processes": 2, "size": 1}
    port = free_port()
    (first, _), (second, _) = (
        start(store, process=i, port=port, die=100 * i, **options) for i in range(2)
    )
    second.join(240)
    assert second.exitcode == -signal.SIGKILL
    first.kill()  # which would wait for the other
    first.join()
    assert 0 < chunks(store) < 60
    port = free_port()
    both = [start(store, process=i, port=port, **options) for i in range(2)]
    assert [result(*each) for each in both] == [(bits(alone), 60)] * 2


def test_100_000_members_in_bounded_memory(tmp_path):
    """200 megabytes of results, of which the process never holds a quarter."""
    code = (
        "import resource, sys, jax.numpy as jnp\n"
        "from jax_rmsprop import sweep\n"
        "from jax_rmsprop._sweep import _sweep\n"
        "_sweep.free_memory = lambda: 0\n"
        "def train(x):\n"
        "    return {'loss': x + jnp.arange(500.0), 'last': x}\n"
        "def peak():\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "def run(n, store):\n"
        "    return sweep(train, {'x': jnp.arange(float(n))}, batch_size=1000,"
        " store=store, progress=False)\n"
        "run(2000, sys.argv[1] + '/small').last.sum().compute()\n"
        "before = peak()\n"
        "curves = run(100_000, sys.argv[1] + '/large')\n"
        "assert curves.loss.shape == (100_000, 500)\n"
        "assert float(curves.loss[99_999, 499]) == 99_999 + 499\n"
        "assert (curves.last == curves.x).all().compute()\n"
        "print(peak() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(done.stdout) < 50, done.stdout


def test_the_same_as_hyperoptax():
    """Its GridSearch on the same function and grid."""
    hyperoptax = require("hyperoptax")
    grid = {"gamma": list(GRID["gamma"]), "learning_rate": [0.01, 0.001]}

    def final(gamma, learning_rate):
        return network(gamma, learning_rate, jnp.int32(0))["loss"][-1]

    space = {name: hyperoptax.DiscreteSpace(values) for name, values in grid.items()}
    state, search = hyperoptax.GridSearch.init(space, n_parallel=5)
    with jax.numpy_dtype_promotion("standard"):
        _, (points, found) = search.optimize_scan(
            state, jax.random.key(0), lambda _, point: final(**point), n_iterations=2
        )
    ours = quiet(final, grid, batch_size=5)
    np.testing.assert_array_equal(
        np.ravel(points["gamma"]), np.repeat(np.float32(grid["gamma"]), 2)
    )
    np.testing.assert_allclose(
        np.ravel(found), ours.value.values.ravel(), rtol=tolerance("float32", 64)
    )


def test_log_one_minus():
    gammas = log_one_minus(0.5, 0.9999, 9)
    np.testing.assert_allclose(np.diff(np.log(1 - gammas)), np.log(2e-4) / 8, rtol=1e-9)
    assert (gammas[0], gammas[-1]) == (0.5, 0.9999)
    for low, high, n, error, message in (
        (1.0, 0.9, 3, ValueError, "`low` must be in [0, 1), got 1.0"),
        (0.9, 1.0, 3, ValueError, "`high` must be in [0, 1), got 1.0"),
        (0.9, 0.99, 1, ValueError, "`num` must be an integer >= 2, got 1"),
    ):
        with pytest.raises(error) as caught:
            log_one_minus(low, high, n)
        assert str(caught.value) == message


def test_an_axis_is_read_without_loss():
    axis = _grid.parse({"x": jnp.array([0.9, 0.99], "bfloat16")}, False).axes["x"]
    assert axis.labels.dtype == "float64"
    np.testing.assert_array_equal(axis.labels, np.float64([0.8984375, 0.98828125]))
