"""The chain: learning rate, momentum and decay, each in its place at every step."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_rmsprop import rmsprop
from tests import reference
from tests.conftest import require, tolerance

STEPS = 40
CHAINS = [
    {
        "momentum": m,
        "nesterov": n,
        "lr_in_momentum": inside,
        "decoupled_weight_decay": decoupled,
        "centered": c,
        "eps_in_sqrt": e,
    }
    for m, n, inside, decoupled, c, e in itertools.product(
        [None, 0.9], *[[True, False]] * 5
    )
    if not (n and m is None)
]


def trajectory(optimizer, x, gradients):
    """The parameters after each step, the gradients given, in one compiled scan."""

    def step(carry, g):
        x, state = carry
        u, state = optimizer.update(g, state, x)
        x = optax.apply_updates(x, u)
        return (x, state), x

    x = jnp.asarray(x)
    return jax.jit(lambda g: jax.lax.scan(step, (x, optimizer.init(x)), g)[1])(
        jnp.asarray(gradients)
    )


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("options", CHAINS, ids=lambda o: str(list(o.values())))
def test_the_chain_in_float64(x64, rng, options, weight_decay):
    gradients = rng.standard_normal((STEPS, 5)) * 10.0 ** rng.integers(-3, 3, 5)
    x = rng.standard_normal(5)
    rates = 0.1 * rng.random(STEPS)  # different at every step
    gammas = np.linspace(0.6, 0.99, STEPS)
    ours = trajectory(
        rmsprop(
            lambda t: jnp.asarray(rates)[t],
            lambda t: jnp.asarray(gammas)[t],
            1e-4,
            weight_decay=weight_decay,
            **options,
        ),
        x,
        gradients,
    )
    truth = reference.RMSProp(x, **options)
    for t, g in enumerate(gradients):
        expected = truth.step(
            g,
            learning_rate=rates[t],
            gamma=gammas[t],
            eps=1e-4,
            weight_decay=weight_decay,
        )
        # Some roundings a step on both sides; the centered truth's difference of
        # moments loses a digit or two. Relative to the step, as x may pass by zero.
        np.testing.assert_allclose(
            ours[t],
            expected,
            rtol=tolerance("float64", 1e5),
            atol=tolerance("float64", 1e5),
        )


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_the_real_pytorch(x64, rng, centered, momentum, weight_decay):
    torch = require("torch")
    gradients = rng.standard_normal((STEPS, 6)) * 10.0 ** np.arange(-3, 3)
    rates = 0.1 * rng.random(STEPS)
    x = rng.standard_normal(6)

    theirs = torch.tensor(x, requires_grad=True)
    optimizer = torch.optim.RMSprop(
        [theirs],
        alpha=0.95,
        eps=1e-3,
        momentum=momentum,
        centered=centered,
        weight_decay=weight_decay,
    )
    expected = []
    for rate, g in zip(rates, gradients, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        theirs.grad = torch.tensor(g)
        optimizer.step()
        expected.append(theirs.detach().numpy().copy())

    ours = trajectory(
        rmsprop(
            lambda t: jnp.asarray(rates)[t],
            0.95,
            1e-3,
            eps_in_sqrt=False,
            lr_in_momentum=False,
            momentum=momentum or None,
            centered=centered,
            weight_decay=weight_decay,
            decoupled_weight_decay=False,
        ),
        x,
        gradients,
    )
    # PyTorch's difference of moments loses digits where the variance is small.
    np.testing.assert_allclose(ours, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("momentum", [None, 0.9])
def test_the_real_optax(rng, standard_promotion, momentum, nesterov):
    gradients = rng.standard_normal((STEPS, 6)).astype("float32")
    x = rng.standard_normal(6).astype("float32")
    nesterov = nesterov and momentum is not None
    ours, theirs = (
        trajectory(make(0.01, 0.9, 1e-6, momentum=momentum, nesterov=nesterov), x, g)
        for make, g in ((rmsprop, gradients), (optax.rmsprop, gradients))
    )
    # Forty steps of 0.01 to 0.1, each a handful of roundings of itself and of x.
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_decay_enters_where_it_should():
    """One step from x = 2 with gradient 0: decay alone moves the parameter."""
    x = jnp.array([2.0])
    for lr_in_momentum in (True, False):
        optimizer = rmsprop(
            0.1, momentum=0.9, weight_decay=0.5, lr_in_momentum=lr_in_momentum
        )
        u, state = optimizer.update(jnp.zeros(1), optimizer.init(x), x)
        np.testing.assert_allclose(u, [-0.1 * 0.5 * 2], rtol=tolerance("float32", 4))
        for part in ("nu", "trace"):
            np.testing.assert_array_equal(optax.tree.get(state, part), [0.0])

    coupled = rmsprop(0.1, weight_decay=0.5, decoupled_weight_decay=False)
    _, state = coupled.update(jnp.zeros(1), coupled.init(x), x)
    # The gradient became 0.5 * 2 = 1, and nu a tenth of its square.
    np.testing.assert_allclose(state[1].nu, [0.1], rtol=tolerance("float32", 4))


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize(
    "mask",
    [{"w": True, "b": False}, lambda params: {"w": True, "b": False}],
    ids=["tree", "function"],
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
        # One rounding to bfloat16, after float32's own, and where step and decay
        # cancel, their roundings relative to the larger.
        np.testing.assert_allclose(
            np.asarray(u, "float64"),
            exact,
            rtol=tolerance("bfloat16", 1.01),
            atol=tolerance("float32", 16) * abs(truth.b).max(),
        )


def test_leaves_of_two_widths_keep_theirs(x64):
    """A wide learning rate widens nothing."""
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
    """Beside a float32 array, a float64 one gets 0.1 as a double."""
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
        for name, bits in (("single", 2**6), ("double", 2**6)):
            np.testing.assert_allclose(
                x[name], truth[name].x, tolerance(x[name].dtype, bits), 1e-30
            )
