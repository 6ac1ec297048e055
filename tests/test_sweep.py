"""Sweeps: every row is its own training, in any batch and after any restart."""

import itertools
import sys

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_rmsprop.sweeps import _batch, _training
from tests.helpers import SWITCHES, require, tolerance
from tests.sweeps import GRID, bits, network, quiet, raises, square


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


@pytest.mark.parametrize("size", [pytest.param(3, marks=pytest.mark.slow), 8])
def test_a_row_is_the_single_run_at_that_batch_size(size, rng):
    curves = quiet(network, GRID, batch_size=size)
    for _ in range(5):
        place = {name: rng.integers(len(values)) for name, values in GRID.items()}
        point = {name: [GRID[name][i]] for name, i in place.items()}
        single = quiet(network, point, batch_size=size, devices=jax.devices()[:1])
        row = curves.isel({name: [i] for name, i in place.items()})
        assert bits(single) == bits(row)


FEW_PLACES = {(7, 2), (8, 4)}


# Whole batches, a short last one, a batch larger than the grid, one batch for all.
@pytest.mark.parametrize(
    "size",
    [7, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3, 16, 60, 100))],
)
def test_any_batch_size(size, alone):
    curves = quiet(network, GRID, batch_size=size)
    for name in ("loss", "end.v"):
        # 15 steps, each with a few sums in another order.
        good = ~alone.diverged
        np.testing.assert_allclose(
            curves[name].where(good),
            alone[name].where(good),
            rtol=tolerance("float32", 128),
            atol=tolerance("float32", 16),
        )
    for name in ("end.seed", "diverged", "diverged_at", "finished"):
        np.testing.assert_array_equal(curves[name], alone[name])


@pytest.mark.parametrize(
    ("size", "devices"),
    [
        pytest.param(*each, marks=() if each in FEW_PLACES else pytest.mark.slow)
        for each in itertools.product((1, 7, 8), (1, 2, 3, 4))
    ],
)
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
    if dtype == "bfloat16":  # files have no bfloat16
        expected = expected.astype("float32")
    for store in (None, tmp_path / "store"):
        curves = quiet(train, {"x": range(3)}, store=store)
        found = curves["result"].values
        assert found.dtype == expected.dtype
        assert found.tobytes() == expected.tobytes()


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


def test_one_compilation_for_each_shape(compiled):
    """Even if the last batch of 60 members is not full."""
    quiet(network, GRID, batch_size=7, devices=jax.devices()[:2])
    assert compiled == [7]


def test_what_the_training_closes_over_is_an_argument_of_the_program():
    """As constants, data would be compiled into the program of every batch size."""
    data = jnp.asarray(np.random.default_rng(0).standard_normal(100_000), "float32")
    kinds = {"x": np.dtype("float32")}
    traced = _training.trace(lambda x: data.sum() * x, {}, kinds)
    mesh = _batch.make_mesh(jax.devices()[:1])
    program = _batch.CompiledBatch(traced, mesh, 4)
    assert program.memory_bytes > 400_000
    assert len(program._step.as_text()) < 100_000


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
    raises(
        TypeError,
        "`train` must be a function of the axes, or a Training, got 3",
        3,
        grid,
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


def test_a_sweep_inside_a_jit():
    with pytest.raises(TypeError, match="^`sweep` must be called outside a jit"):
        jax.jit(lambda y: quiet(lambda x: {"loss": x * y}, {"x": [1.0]}).loss.values)(
            1.0
        )


def test_a_sweep_where_jit_is_switched_off(together):
    with jax.disable_jit(), jax.transfer_guard("disallow"):
        assert bits(quiet(network, GRID, batch_size=8)) == bits(together)


@pytest.mark.parametrize("switch", ["debug_nans", "debug_infs"])
def test_a_member_that_diverges_under_a_switch(switch, together):
    with SWITCHES[switch]():
        curves = quiet(network, GRID, batch_size=8)
    assert bits(curves) == bits(together)
    assert curves.diverged.any()


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


def test_points_that_agree_on_one_axis():
    """Points equal in float32 on one axis may differ on another; equals run once."""
    gamma = [0.9998933410490818, 0.9998933741828987, 0.5, 0.5]
    rate = [0.125, 0.25, 0.5, 0.5]
    points = {"gamma": gamma, "learning_rate": rate}
    curves = quiet(
        lambda gamma, learning_rate: {"loss": gamma * learning_rate},
        points,
        zipped=True,
        batch_size=2,
    )
    np.testing.assert_array_equal(curves.loss, np.float32(gamma) * np.float32(rate))
    np.testing.assert_array_equal(curves.gamma, gamma)
    assert curves.computed == 3
