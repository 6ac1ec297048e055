"""Properties that hold for every gradient, tested by hypothesis."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jax_rmsprop import rmsprop, scale_by_rmsprop
from tests.helpers import tolerance

# All floats except subnormal ones, which XLA reads as zero.
finite = st.floats(
    width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False
)
# Gradients whose square is normal with a margin of at least 2^24.
ordinary = st.floats(2.0**-40, 2.0**40, width=32)
sign = st.sampled_from([-1.0, 0.0, 1.0])
gammas = st.floats(0.0, 1.0, width=32)
options = st.fixed_dictionaries(
    {
        "eps_in_sqrt": st.booleans(),
        "initial_scale": st.sampled_from([0.0, 1.0]),
        "centered": st.booleans(),
    }
)


def gradients(elements):
    """Five steps of sixteen coordinates, so that one program serves all.

    Sixteen fill XLA's vectors; elements in a remainder may round differently.
    """
    return hnp.arrays(np.float32, (5, 16), elements=elements)


def run(optimizer, gradients):
    state = optimizer.init(gradients[0])
    updates = []
    for g in gradients:
        u, state = optimizer.update(g, state)
        updates.append(u)
    return np.stack(updates), state


@given(gradients(finite), gammas, options)
def test_nu_is_never_negative_and_nothing_is_nan(g, gamma, options):
    u, state = run(scale_by_rmsprop(gamma, 1e-8, **options), g)
    assert (state.nu >= 0).all()
    assert jnp.isfinite(state.nu).all()
    assert not np.isnan(u).any()


@given(gradients(finite), gammas, options)
def test_the_update_has_the_gradients_sign(g, gamma, options):
    u, _ = run(scale_by_rmsprop(gamma, 1e-8, **options), g)
    v, _ = run(scale_by_rmsprop(gamma, 1e-8, **options), -g)
    np.testing.assert_array_equal(u, -v)
    assert (u * np.sign(g) >= 0).all()


@given(gradients(finite), st.floats(0.0, 0.9999), st.booleans())
def test_no_step_beyond_its_bound(g, gamma, eps_in_sqrt):
    u, _ = run(scale_by_rmsprop(gamma, 0.0, eps_in_sqrt=eps_in_sqrt), g)
    assert (abs(u) <= (1 + tolerance("float32", 16)) / np.sqrt(1 - gamma)).all()


@given(gradients(ordinary), gradients(sign), gammas, st.integers(-10, 10))
def test_scale_invariance_is_exact_for_powers_of_two(size, sign, gamma, power):
    g = size * sign
    for centered in (False, True):
        optimizer = scale_by_rmsprop(gamma, 0.0, centered=centered)
        u, state = run(optimizer, g)
        v, scaled = run(optimizer, g * np.float32(2.0**power))
        # Below this the smallest normal number, used for eps = 0, has an effect.
        felt = np.minimum(state.nu, scaled.nu) <= 2.0**-100
        np.testing.assert_array_equal(u[-1][~felt], v[-1][~felt])


@given(gradients(finite), gammas, options, st.permutations(range(16)))
def test_the_order_of_elements_does_not_matter(g, gamma, options, order):
    optimizer = scale_by_rmsprop(gamma, 1e-8, **options)
    u, _ = run(optimizer, g)
    v, _ = run(optimizer, g[:, order])
    np.testing.assert_array_equal(u[:, order], v)


@given(gradients(finite), gammas)
def test_the_order_and_nesting_of_leaves_do_not_matter(g, gamma):
    optimizer = rmsprop(0.1, gamma, momentum=0.9)
    nested = {"b": [g[0], {"x": g[1]}], "a": (g[2],)}
    swapped = {"a": [g[0], {"x": g[1]}], "b": (g[2],)}
    u, _ = optimizer.update(nested, optimizer.init(nested))
    v, _ = optimizer.update(swapped, optimizer.init(swapped))
    np.testing.assert_array_equal(u["b"][0], v["a"][0])
    np.testing.assert_array_equal(u["b"][1]["x"], v["a"][1]["x"])
    np.testing.assert_array_equal(u["a"][0], v["b"][0])


@given(gradients(ordinary), gammas, st.floats(0.0, 1.0, width=32))
def test_a_sweeps_row_is_the_single_run(g, gamma, rate):
    gammas, rates = jnp.array([0.5, gamma], "float32"), jnp.array([0.1, rate])
    rows = jax.vmap(_last_update, in_axes=(0, 0, None))(gammas, rates, g)
    np.testing.assert_array_equal(rows[1], _last_update(gammas[1], rates[1], g))


@jax.jit
def _last_update(gamma, rate, gradients):
    optimizer = rmsprop(rate, gamma, momentum=0.9)
    state = optimizer.init(gradients[0])
    for g in gradients:
        u, state = optimizer.update(g, state)
    return u
