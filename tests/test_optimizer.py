"""The whole step: the order of learning rate, momentum and decay."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_rmsprop import rmsprop, scale_by_rmsprop
from tests import reference
from tests.helpers import axis, few_or_all, tolerance, train_each

STEPS = 40


@few_or_all
def test_every_option_in_float64(x64, rng, combinations):
    chains = [
        chain
        for chain in combinations(
            axis("momentum", None, 0.9),
            axis("nesterov", False, True),
            axis("lr_in_momentum", True, False),
            axis("decoupled_weight_decay", True, False),
            axis("centered", True, False),
            axis("eps_in_sqrt", True, False),
            axis("weight_decay", 0.0, 0.1),
        )
        if chain["momentum"] or not chain["nesterov"]
    ]
    gradients = rng.standard_normal((STEPS, 5)) * 10.0 ** rng.integers(-3, 3, 5)
    x = rng.standard_normal(5)
    rates = 0.1 * rng.random(STEPS)  # different at every step
    gammas = np.linspace(0.6, 0.99, STEPS)
    schedules = lambda t: jnp.asarray(rates)[t], lambda t: jnp.asarray(gammas)[t]
    found = train_each(
        {i: rmsprop(*schedules, 1e-4, **chain) for i, chain in enumerate(chains)},
        jnp.asarray(x),
        jnp.asarray(gradients),
    )
    for i, chain in enumerate(chains):
        decay = {"weight_decay": chain.pop("weight_decay")}
        truth = reference.RMSProp(x, **chain)
        expected = [
            truth.step(g, learning_rate=rates[t], gamma=gammas[t], eps=1e-4, **decay)
            for t, g in enumerate(gradients)
        ]
        # Some roundings per step on both sides; the centered truth's difference of
        # moments loses a digit or two. Relative to the step, since x may pass zero.
        few = tolerance("float64", 1e5)
        np.testing.assert_allclose(found[i][0], expected, few, few, err_msg=f"{chain}")


def test_decay_enters_where_it_should():
    """One step from x = 2 with gradient 0: decay alone moves the parameter."""
    x = jnp.array([2.0])
    for lr_in_momentum in (True, False):
        optimizer = rmsprop(
            0.1, momentum=0.9, weight_decay=0.5, lr_in_momentum=lr_in_momentum
        )
        u, state = optimizer.update(jnp.zeros(1), optimizer.init(x), x)
        np.testing.assert_allclose(u, [-0.1 * 0.5 * 2], rtol=tolerance("float32", 4))
        for part in ("nu", "momentum"):
            np.testing.assert_array_equal(optax.tree.get(state, part), [0.0])

    coupled = rmsprop(0.1, weight_decay=0.5, decoupled_weight_decay=False)
    _, state = coupled.update(jnp.zeros(1), coupled.init(x), x)
    # The gradient became 0.5 * 2 = 1, and nu a tenth of its square.
    nu = optax.tree.get(state, "nu")
    np.testing.assert_allclose(nu, [0.1], rtol=tolerance("float32", 4))


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize(
    "mask",
    [
        {"w": True, "b": False},
        {"w": np.array(True), "b": jnp.array([False])},
        lambda params: {"w": True, "b": False},
    ],
    ids=["tree", "arrays", "function"],
)
def test_mask(mask, decoupled):
    params = {"w": jnp.ones(2), "b": jnp.ones(2)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    optimizer = rmsprop(
        0.1, weight_decay=0.5, mask=mask, decoupled_weight_decay=decoupled
    )
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    assert (updates["w"] < 0).all()
    np.testing.assert_array_equal(updates["b"], [0.0, 0.0])


def test_half_precision_rounds_once(rng):
    """Learning rate, momentum and decay act in float32; only the update is rounded."""
    gradients = rng.standard_normal((STEPS, 50)).astype("bfloat16")
    x = rng.standard_normal(50).astype("bfloat16")
    optimizer = rmsprop(1e-3, 0.999, momentum=0.9, weight_decay=1e-2)
    state = optimizer.init(x)
    truth = reference.RMSProp(x, momentum=0.9)
    for g in gradients:
        truth.x = x.astype("float64")
        u, state = optimizer.update(jnp.asarray(g), state, jnp.asarray(x))
        truth.step(g, learning_rate=1e-3, gamma=0.999, weight_decay=1e-2)
        exact = truth.x - x.astype("float64")
        # One rounding to bfloat16, after float32's own; if step and decay cancel, their
        # roundings relative to the larger.
        np.testing.assert_allclose(
            np.asarray(u, "float64"),
            exact,
            rtol=tolerance("bfloat16", 1.01),
            atol=tolerance("float32", 16) * abs(truth.b).max(),
        )


def test_leaves_of_two_widths_keep_theirs(x64):
    """A wider learning rate does not widen a leaf."""
    x = {"half": jnp.ones(3, "float16"), "single": jnp.ones(3, "float32")}
    for rate in (0.1, jnp.float64(0.1), optax.constant_schedule(jnp.float64(0.1))):
        optimizer = rmsprop(rate, momentum=0.9, weight_decay=0.1)
        u, state = jax.jit(optimizer.update)(x, optimizer.init(x), x)
        assert {k: v.dtype.name for k, v in u.items()} == {
            "half": "float16",
            "single": "float32",
        }
        for leaf in jax.tree.leaves(state):
            assert leaf.dtype in (jnp.float32, jnp.int32)


def test_a_python_number_is_exact_for_each_leaf(x64, standard_promotion):
    """Next to a float32 array, a float64 one gets 0.1 as a double."""
    x = {"single": jnp.ones(3, "float32"), "double": jnp.linspace(-1, 1, 5)}
    optimizer = rmsprop(0.1, 0.9, momentum=0.9, weight_decay=0.1)
    state, step = optimizer.init(x), jax.jit(optimizer.update)
    truth = {name: reference.RMSProp(p, momentum=0.9) for name, p in x.items()}
    for _ in range(5):
        g = {name: 0.3 * p for name, p in x.items()}
        updates, state = step(g, state, x)
        for name, stepper in truth.items():
            stepper.step(g[name], learning_rate=0.1, weight_decay=0.1)
        x = optax.apply_updates(x, updates)
        for name, stepper in truth.items():
            bound = tolerance(x[name].dtype, 2**6)
            np.testing.assert_allclose(x[name], stepper.x, bound, 1e-30)


def test_what_an_optimizer_is_by_default():
    """The defaults are the textbook's, or else Optax's."""
    defaults = {
        name: p.default
        for name, p in inspect.signature(rmsprop).parameters.items()
        if name != "learning_rate"
    }
    assert defaults == {
        "gamma": 0.9,
        "eps": 1e-6,
        "eps_in_sqrt": True,
        "initial_scale": 0.0,
        "centered": False,
        "bias_correction": False,
        "momentum": None,
        "nesterov": False,
        "lr_in_momentum": True,
        "weight_decay": 0.0,
        "decoupled_weight_decay": True,
        "mask": None,
    }
    inner = inspect.signature(scale_by_rmsprop).parameters
    assert {n: p.default for n, p in inner.items()} == {n: defaults[n] for n in inner}
