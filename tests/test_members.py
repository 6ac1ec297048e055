"""The axes of a sweep: allowed values, and which members share a program."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_rmsprop import log_one_minus, rmsprop
from jax_rmsprop.sweeps import _members
from tests.helpers import tolerance
from tests.sweeps import (
    network,
    quiet,
    raises,
    square,
)


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
    # Paired, equal values share a program at any position.
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
    assert list(curves.width.values) == [2, 3]


def test_values_that_look_alike_are_told_apart():
    functions = [lambda x: x, lambda x: 2 * x, functools.partial(jnp.multiply, 3.0)]
    curves = quiet(lambda f: {"loss": f(jnp.ones(()))}, {"f": functions})
    names = curves.f.values.tolist()
    assert [name.split()[0] for name in names] == ["<lambda>", "<lambda>", "multiply"]
    assert len(set(names)) == 3
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
        ([1.0, 1e-50], ValueError, "`x` must fit float32, got 1e-50"),
        (
            [2.0, 1.0, 1 + 1e-12],
            ValueError,
            "`x` must have values that differ in float32, but 1.0 and 1.000000000001 "
            "round to the same number",
        ),
        (
            [0.5, 1.0, 0.5],
            ValueError,
            "`x` must not contain duplicates, but 0.5 appears 2 times",
        ),
        (
            ["a", "b", "a"],
            ValueError,
            "`x` must not contain duplicates, but a appears 2 times",
        ),
    ],
)
def test_bad_axes(values, error, message):
    raises(error, message, square, {"x": values})


def test_random_keys_are_no_axis():
    raises(
        TypeError,
        "`x` must be numbers or Python values, got random keys; sweep over seeds, and "
        "make a key of each with jax.random.key",
        square,
        {"x": jax.random.split(jax.random.key(0), 3)},
    )


@pytest.mark.parametrize("grid", [{}, [1, 2], None])
def test_bad_grids(grid):
    raises(
        TypeError,
        "`axes` must be a mapping of the name of at least one axis to its values, got "
        f"{grid!r}",
        square,
        grid,
    )


def test_names_that_a_result_needs():
    names = (
        "carried, diverged, diverged_at, finished, member, output, rung, step, steps"
    )
    for name in ("member", "diverged", "carry_4", "no name", 3):
        raises(
            ValueError,
            "an axis must have the name of an argument, other than "
            f"{names}, carry_0 and the like; got {name!r}",
            square,
            {name: [1]},
        )
    for name in ("x", "steps", "carry_4"):
        raises(
            ValueError,
            f"`train` must not return an output {name!r}: the name is taken",
            lambda x, name=name: {name: x},
            {"x": [1]},
        )


def test_axes_of_unusual_names():
    """Those of our own functions' arguments, and a letter that Python replaces."""
    found = quiet(
        lambda function, name, **micro: {"loss": function(micro["μ"])},
        {"function": [jnp.square], "name": ["a"], "µ": [3.0]},
        labels={"name": ["the one"]},
    )
    assert found.loss.item() == 9
    with pytest.raises(ValueError, match="^an axis must have the name of .* got 'μ'$"):
        quiet(square, {"µ": [1.0], "μ": [1.0]})


def test_unequal_lengths():
    raises(
        ValueError,
        "zipped axes must be equally long, but `a` has 2, `b` has 3",
        lambda a, b: a * b,
        {"a": [1, 2], "b": [1, 2, 3]},
        zipped=True,
    )


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


@pytest.mark.parametrize("dtype", ["int8", "uint8", "uint16", "float16", "bfloat16"])
def test_narrow_numbers_arrive_in_32_bits(dtype):
    values = jnp.array([2, 100], dtype)
    for x in (values, np.asarray(values), list(np.asarray(values))):
        found = quiet(lambda x: {"loss": x * 1000}, {"x": x})
        np.testing.assert_array_equal(found.loss, [2000, 100_000])
        assert found.loss.dtype == ("float32" if "float" in dtype else "int32")


def test_dates_of_pandas():
    import pandas as pd

    got = []
    days = pd.date_range("2020-01-01", periods=2).astype("datetime64[ns]")
    quiet(lambda day: got.append(day) or {"loss": jnp.ones(())}, {"day": days})
    assert [day.year for day in got] == [2020, 2020]


def test_a_gamma_whose_distance_to_1_is_lost_is_refused():
    gammas = log_one_minus(0.5, 0.9999999, 2)
    said = "^`gamma` must be as far from 1 in float32 as it says, but 1 - 0.9999999 is"
    with pytest.raises(ValueError, match=said):
        quiet(lambda gamma: {"loss": gamma}, {"gamma": gammas})
    quiet(lambda gamma: {"loss": gamma}, {"gamma": log_one_minus(0.5, 0.9999, 2)})
    # Other numbers have no such check.
    quiet(lambda discount: {"loss": discount}, {"discount": [0.5, 0.9999999]})
    with pytest.warns(
        UserWarning, match="^`p` 0.99999999999 rounds to exactly 1 in float32"
    ) as said:
        quiet(lambda p: {"loss": p}, {"p": [0.5, 0.99999999999]})
    assert said[0].filename == __file__


def test_a_gamma_near_1_as_a_python_value():
    """It has the precision of a single optimizer's."""

    def step(gamma):
        optimizer, one = rmsprop(1e-3, gamma), jnp.ones(1)
        return {"step": optimizer.update(one, optimizer.init(one))[0]}

    gammas = [0.9, 1 - 1e-7, 1 - 1e-9]
    found = quiet(step, {"gamma": np.array(gammas, object)}).step.values
    alone = [step(gamma)["step"] for gamma in gammas]
    np.testing.assert_allclose(found, alone, rtol=tolerance("float32", 4))


def test_an_axis_is_read_without_loss():
    axis = _members.parse_grid({"x": jnp.array([0.9, 0.99], "bfloat16")}, False).axes[
        "x"
    ]
    assert axis.labels.dtype == "float64"
    np.testing.assert_array_equal(axis.labels, np.float64([0.8984375, 0.98828125]))
