"""The equations on one array, compared to float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_rmsprop import _arithmetic, _equations
from tests.helpers import tolerance

GAMMAS = [0.0, 1e-9, 0.1, 0.3, 0.4999, 0.5, 0.9, 0.9999, 1 - 1e-9, 1.0]
gamma = pytest.mark.parametrize("gamma", GAMMAS)


def decay(gamma, dtype="float32"):
    weights = np.array([gamma, 1 - np.float64(gamma)], dtype)
    return _equations.decay(*jnp.asarray(weights))


@gamma
def test_average(gamma, rng):
    """Within a rounding of each of its terms, though they differ widely."""
    old = 10 ** rng.uniform(-15, 15, 1000)
    new = 10 ** rng.uniform(-15, 15, 1000)
    old, new = old.astype("float32"), new.astype("float32")
    found = jax.jit(_equations.average)(old, new, decay(gamma))
    expected = gamma * old.astype(float) + (1 - gamma) * new.astype(float)
    # The average starts from the value with the larger weight, so its error is relative
    # to that value, even if its product with the weight is small beside the other term.
    heavier = np.where(gamma >= 0.5, old, new)
    error = np.abs(found - expected)
    assert (error <= tolerance("float32", 4) * np.maximum(expected, heavier)).all()


@gamma
def test_an_average_of_equals_stays(gamma):
    x = jnp.linspace(0.1, 1, 100)
    found = jax.jit(_equations.average)(x, x, decay(gamma))
    np.testing.assert_array_equal(found, x)


@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_the_ends_are_exact(gamma, rng):
    old, new = rng.random((2, 100), "float32") * [[1e10], [1e-10]]
    old, new = jnp.float32(old), jnp.float32(new)
    found = jax.jit(_equations.average)(old, new, decay(gamma))
    np.testing.assert_array_equal(found, old if gamma else new)


@gamma
def test_centered_is_the_difference_of_moments(gamma, x64, rng):
    mu, g = rng.normal(size=(2, 100))
    nu = rng.random(100)
    mean, variance = _equations.mean_and_variance(
        *map(jnp.asarray, (mu, nu, g)), decay(gamma, "float64")
    )
    square = gamma * (nu + mu**2) + (1 - gamma) * g**2
    expected = gamma * mu + (1 - gamma) * g
    np.testing.assert_allclose(mean, expected, 1e-12, 1e-15)
    np.testing.assert_allclose(variance, square - expected**2, 1e-9, 1e-14)


def test_squares_are_rounded_before_they_are_averaged(rng):
    """Otherwise a compiler's choice to contract product and sum would show.

    It may differ between two programs: a sweep's row and a single run.
    """
    mu, nu, g = jnp.float32(rng.normal(size=(3, 1000)))
    at = decay(0.9)
    average = jax.jit(_equations.average)

    @jax.jit
    def square(x, factor):
        return factor * (x * x)

    found = jax.jit(_equations.mean_square)(nu, g, at)
    np.testing.assert_array_equal(found, average(nu, square(g, 1.0), at))
    _, found = jax.jit(_equations.mean_and_variance)(mu, nu, g, at)
    np.testing.assert_array_equal(found, average(nu, square(g - mu, at.gamma), at))


@pytest.mark.parametrize("eps_in_sqrt", [True, False])
@pytest.mark.parametrize("eps", [0.0, 1e-6, 1.0])
def test_scaled(eps, eps_in_sqrt, rng):
    g, nu = jnp.float32(rng.normal(size=100)), jnp.float32(rng.random(100))
    options = {
        "eps": _arithmetic.positive(jnp.float32(eps)),
        "eps_in_sqrt": eps_in_sqrt,
    }
    found = _equations.scaled(g, nu, **options)
    root = np.sqrt(nu + eps) if eps_in_sqrt else np.sqrt(nu) + eps
    np.testing.assert_allclose(found, g / root, tolerance("float32", 8))
    zero = _equations.scaled(0 * g, 0 * nu, **options)
    np.testing.assert_array_equal(zero, 0)


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64"])
def test_a_bounded_gradient_has_a_finite_square(dtype, request):
    if dtype == "float64":
        request.getfixturevalue("x64")
    g = _arithmetic.bounded(jnp.array([-np.inf, 1e38, 3.0, np.inf], dtype))
    # Four of them, or eight if a part is a difference.
    assert jnp.isfinite(8 * _arithmetic.largest(g.real.dtype) ** 2)
    assert jnp.isfinite(
        4 * _equations.mean_square(0 * g.real, g, decay(0.0, g.real.dtype))
    ).all()
    assert g[2] == 3
    exponent = 510 if g.real.dtype == "float64" else 62  # as documented
    assert _arithmetic.largest(g.real.dtype) == 2.0**exponent
    tiny = jnp.sqrt(jnp.finfo(g.real.dtype).tiny)
    assert jnp.isfinite(_arithmetic.largest(g.real.dtype) / tiny)
