"""Ranges and points."""

import numpy as np
import pytest

from jax_rmsprop import linear, log, log_one_minus, points
from tests.sweeps import GRID, network, quiet

SPACE = {
    "gamma": log_one_minus(0.5, 0.9999),
    "learning_rate": log(1e-4, 1),
    "momentum": linear(0, 0.9),
    "width": [32, 64, 128],
    "kind": ["a", "b"],
}


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


def test_log_and_linear():
    np.testing.assert_allclose(log(1e-4, 1, 9), np.geomspace(1e-4, 1, 9), rtol=1e-12)
    np.testing.assert_allclose(log(1, 1e-4, 9), np.geomspace(1, 1e-4, 9), rtol=1e-12)
    np.testing.assert_allclose(linear(-1, 3, 9), np.linspace(-1, 3, 9), rtol=1e-12)
    assert list(log(0.001, 0.1, 3)[[0, -1]]) == [0.001, 0.1]
    for make, low, allowed in (
        (log, 0, "above 0 and finite"),
        (log, float("inf"), "above 0 and finite"),
        (linear, float("nan"), "a finite number"),
    ):
        with pytest.raises(ValueError, match="^`low` must be ") as caught:
            make(low, 1)
        assert str(caught.value) == f"`low` must be {allowed}, got {low}"


@pytest.mark.parametrize("method", ["sobol", "random", "latin"])
def test_points_are_spread_over_the_space(method):
    found = points(SPACE, 256, method=method, seed=3)
    assert list(found) == list(SPACE)
    assert all(len(values) == 256 for values in found.values())
    assert set(found["width"]) == {32, 64, 128}
    assert set(found["kind"]) == {"a", "b"}
    fractions = {
        "gamma": np.log((1 - found["gamma"]) / 0.5) / np.log(2e-4),
        "learning_rate": 1 + np.log10(found["learning_rate"]) / 4,
        "momentum": found["momentum"] / 0.9,
    }
    for values in fractions.values():
        assert values.min() >= 0
        assert values.max() <= 1
        # Random numbers: 32 in each eighth, up to four standard deviations of 5.3;
        # the others are even by design.
        counts = np.histogram(values, 8, (0, 1))[0]
        spread = abs(counts - 32).max()
        assert spread <= (22 if method == "random" else 0)
    again = points(SPACE, 256, method=method, seed=3)
    other = points(SPACE, 256, method=method, seed=4)
    np.testing.assert_array_equal(found["gamma"], again["gamma"])
    assert (found["gamma"] != other["gamma"]).any()


@pytest.mark.parametrize("method", ["sobol", "random"])
@pytest.mark.parametrize(("n", "more"), [(64, 128), (1, 2), (10, 33)])
def test_they_are_nested(method, n, more):
    few, many = (points(SPACE, k, method=method, seed=5) for k in (n, more))
    for name in SPACE:
        np.testing.assert_array_equal(few[name], many[name][:n])


def test_a_search_grows(tmp_path):
    space = {"gamma": log_one_minus(0.5, 0.999), "learning_rate": log(1e-4, 0.1)}

    def search(n):
        found = points(space, n) | {"seed": np.zeros(n, int)}
        return quiet(network, found, zipped=True, store=tmp_path, batch_size=8)

    few, many = search(16), search(32)
    assert (few.computed, many.computed) == (16, 16)
    np.testing.assert_array_equal(few.loss, many.loss[:16])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"space": {}},
            TypeError,
            "`space` must be a mapping of at least one axis to a range or to values, "
            "got {}",
        ),
        (
            {"space": {"x": 0.5}},
            TypeError,
            "`x` must be a range, such as log(1e-4, 1), or a sequence of values, got "
            "0.5",
        ),
        (
            {"space": {"x": []}},
            ValueError,
            "`x` must have at least one value, got none",
        ),
        ({"n": 0}, ValueError, "`n` must be an integer >= 1, got 0"),
        (
            {"method": "grid"},
            ValueError,
            "`method` must be one of sobol, random, latin, got 'grid'",
        ),
        ({"seed": -1}, ValueError, "`seed` must be an integer >= 0, got -1"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error) as caught:
        points(**({"space": SPACE, "n": 4} | arguments))
    assert str(caught.value) == message


def test_axes_that_are_ranges_are_refused_by_a_sweep():
    with pytest.raises(TypeError, match="^`gamma` must be a sequence of values, got l"):
        quiet(network, GRID | {"gamma": log_one_minus(0.5, 0.9)})
