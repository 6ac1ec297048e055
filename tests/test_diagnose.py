"""Diagnoses of gamma and eps from a state, compared to NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_rmsprop import conventions, diagnose, rmsprop, scale_by_rmsprop
from jax_rmsprop.quantization import dequantize_state, quantize_state, uint8
from tests.helpers import tolerance

pytestmark = pytest.mark.usefixtures("standard_promotion")


def gradients(n=7):
    rng = np.random.default_rng(0)
    scale = 10 ** rng.uniform(-4, 2, (41, 5))
    return (scale * rng.normal(size=(n, 41, 5))).astype("float32")


def averages(gs, gamma, initial=0.0):
    nu = np.full(gs.shape[1:], initial)
    for g in gs.astype(float):
        nu = gamma * nu + (1 - gamma) * g**2
    return nu


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("corrected", [True, False])
def test_against_numpy(inside, corrected):
    gs, gamma, eps = gradients(), 0.9, 1e-2
    options = {"eps_in_sqrt": inside, "bias_correction": corrected}
    optimizer = optax.chain(
        optax.clip(1e6), rmsprop(0.1, gamma, eps, momentum=0.9, **options)
    )
    x = {"a": gs[0, :20], "b": [gs[0, 20:]]}
    state = optimizer.init(x)
    for g in gs:
        g = {"a": g[:20], "b": [g[20:]]}
        _, state = optimizer.update(g, state)
    found = jax.jit(functools.partial(diagnose, optimizer))(state, g)
    nu = averages(gs, gamma) / (1 - gamma ** len(gs) if corrected else 1)
    root = np.sqrt(nu + eps) if inside else np.sqrt(nu) + eps
    threshold = eps if inside else eps**2
    close = {"rtol": tolerance("float32", 16)}
    np.testing.assert_allclose(found.threshold, threshold, **close)
    np.testing.assert_allclose(found.eps_share, (nu < threshold).mean(), **close)
    np.testing.assert_allclose(found.window, (1 - gamma**7) / (1 - gamma), **close)
    np.testing.assert_allclose(
        found.nu, np.sort(nu.ravel())[[0, 10, 102, 194, 204]], **close
    )
    np.testing.assert_allclose(found.largest_step, np.abs(gs[-1] / root).max(), **close)
    assert diagnose(optimizer, state).largest_step is None


def test_within_whatever_optax_wraps():
    """It uses the optimizer's own hyperparameters, a schedule at its step."""
    gammas = optax.piecewise_constant_schedule(0.5, {2: 1.8})
    alone = rmsprop(0.1, gammas, 1e-2)
    x = {"weight": jnp.array([0.01, 1.0, 3.0])}
    state = alone.init(x)
    for _ in range(3):
        before = state
        _, state = alone.update(x, state)
    expected = diagnose(alone, state, x)
    np.testing.assert_allclose(expected.window, (1 - 0.9**3) / 0.1, rtol=1e-6)
    for wrapped in (
        optax.chain(optax.clip(10.0), alone),
        optax.masked(alone, {"weight": True}),
        optax.apply_if_finite(alone, 3),
        optax.flatten(alone),
        optax.MultiSteps(alone, 1).gradient_transformation(),
    ):
        state = wrapped.init(x)
        for _ in range(3):
            _, state = wrapped.update(x, state, x)
        found = diagnose(wrapped, state)
        for a, b in zip(found[:4], expected[:4], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)
    del before


def test_a_partition_group_by_group():
    names = {"weight": "one", "mu": "other", "rest": "one"}
    x = {name: jnp.full(3, 2.0 + i) for i, name in enumerate(names)}
    optimizer = optax.partition(
        {
            "other": rmsprop(0.1, 0.5, 1e2, momentum=0.9),
            "one": conventions.pytorch(0.1, alpha=0.9, eps=1e-3),
        },
        names,
    )
    _, state = optimizer.update(x, optimizer.init(x), x)
    one, other = diagnose(optimizer, state, x).values()
    np.testing.assert_allclose(one.threshold, 1e-6, rtol=1e-6)
    np.testing.assert_allclose(other.threshold, 1e2)
    np.testing.assert_allclose(one.nu, 0.1 * np.array([4, 4, 4, 16, 16]), rtol=1e-6)
    np.testing.assert_allclose(other.nu, [4.5] * 5)
    assert (one.eps_share, other.eps_share) == (0, 1)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_the_window(gamma):
    x = jnp.ones(3)
    optimizer = scale_by_rmsprop(gamma)
    state = optimizer.init(x)
    for steps in range(4):
        found = diagnose(optimizer, state)
        expected = sum(gamma**t for t in range(steps))
        np.testing.assert_allclose(found.window, expected, 1e-6)
        _, state = optimizer.update(x, state)


@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("g", [0.0, 1e30, np.inf])
def test_nothing_but_numbers(g, eps):
    """All figures are finite, also before the first step and for bounded gradients."""
    g = jnp.full(3, g, "float32")
    optimizer = scale_by_rmsprop(0.9, eps, bias_correction=True)
    state = optimizer.init(g)
    assert jnp.isfinite(diagnose(optimizer, state, jnp.zeros(3)).largest_step)
    updates, state = optimizer.update(g, state)
    found = diagnose(optimizer, state, g)
    assert all(jnp.isfinite(x).all() for x in found)
    np.testing.assert_allclose(found.largest_step, jnp.abs(updates).max(), 1e-6)


def test_a_state_in_fewer_bits():
    kept = {"nu": uint8(0)}
    inner = rmsprop(0.1)
    optimizer = quantize_state(inner, kept)
    x = jnp.ones(3)
    _, state = optimizer.update(x, optimizer.init(x))
    with pytest.raises(TypeError) as refused:
        diagnose(optimizer, state)
    assert str(refused.value) == (
        "`state` must be in full precision, but its nu is uint8; "
        "pass quantization.dequantize_state(state, ...)"
    )
    assert diagnose(inner, dequantize_state(state, kept)).eps_share == 0


def test_bad_input():
    optimizer, x = rmsprop(0.1), jnp.ones(3)
    state = optimizer.init(x)
    with pytest.raises(
        ValueError, match="^`optimizer` must contain an RMSProp of this"
    ):
        diagnose(optax.sgd(0.1), state)
    with pytest.raises(ValueError, match="^`state` must be the optimizer's: it has"):
        diagnose(optimizer, optax.sgd(0.1).init(x))
    with pytest.raises(ValueError, match="^`gradient` must have the leaves and shapes"):
        diagnose(optimizer, state, jnp.ones(2))
