"""What a state says about gamma and eps, against NumPy."""

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
    found = jax.jit(
        lambda s, g: diagnose(s, g, gamma=gamma, eps=eps, eps_in_sqrt=inside)
    )(state, g)
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
    assert diagnose(state).largest_step is None


@pytest.mark.parametrize(
    "optimizer", [optax.rmsprop(0.1), optax.adam(0.1), conventions.dreamer_v3()]
)
def test_whatever_has_a_nu(optimizer):
    x = jnp.ones(3)
    _, state = optimizer.update(x, optimizer.init(x), x)
    assert diagnose(state, eps=0.0).eps_share == 0


def test_a_state_without_a_count():
    assert diagnose(optax.rmsprop(0.1).init(jnp.ones(3))).window is None


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_the_window(gamma):
    x = jnp.ones(3)
    optimizer = scale_by_rmsprop(gamma)
    state = optimizer.init(x)
    for steps in range(4):
        found = diagnose(state, gamma=gamma)
        expected = sum(gamma**t for t in range(steps))
        np.testing.assert_allclose(found.window, expected, 1e-6)
        _, state = optimizer.update(x, state)


@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("g", [0.0, 1e30, np.inf])
def test_nothing_but_numbers(g, eps):
    """Also before the first step, and where a gradient is bounded."""
    g = jnp.full(3, g, "float32")
    optimizer = scale_by_rmsprop(0.9, eps, bias_correction=True)
    state = optimizer.init(g)
    assert jnp.isfinite(diagnose(state, jnp.zeros(3), eps=eps).largest_step)
    updates, state = optimizer.update(g, state)
    found = diagnose(state, g, eps=eps)
    assert all(jnp.isfinite(x).all() for x in found)
    np.testing.assert_allclose(found.largest_step, jnp.abs(updates).max(), 1e-6)


def test_a_state_in_fewer_bits():
    kept = {"nu": uint8(0)}
    optimizer = quantize_state(rmsprop(0.1), kept)
    x = jnp.ones(3)
    _, state = optimizer.update(x, optimizer.init(x))
    with pytest.raises(TypeError) as refused:
        diagnose(state)
    assert str(refused.value) == (
        "`state` must be in full precision, but its nu is uint8; "
        "pass quantization.dequantize_state(state, ...)"
    )
    assert diagnose(dequantize_state(state, kept)).eps_share == 0


def test_bad_input():
    state = rmsprop(0.1).init(jnp.ones(3))
    with pytest.raises(ValueError, match=r"^`gamma` must be in \[0, 1\], got 2.0$"):
        diagnose(state, gamma=2)
    with pytest.raises(ValueError, match="^`state` must have a field nu, as that of"):
        diagnose(optax.sgd(0.1).init(jnp.ones(3)))
    with pytest.raises(ValueError, match="^`gradient` must have the leaves and shapes"):
        diagnose(state, jnp.ones(2))
