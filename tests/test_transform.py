"""The mathematics of `scale_by_rmsprop`: its equations, its safety, its precision."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_rmsprop import rmsprop, scale_by_rmsprop
from tests import reference
from tests.conftest import tolerance


def run(optimizer, gradients):
    """All updates and the last state, in one compiled scan from zero parameters."""

    @jax.jit
    def scan(gradients):
        def body(state, g):
            u, state = optimizer.update(g, state)
            return state, u

        return jax.lax.scan(body, optimizer.init(gradients[0]), gradients)

    state, updates = scan(jnp.asarray(gradients))
    return updates, state


OPTIONS = [
    {"eps_in_sqrt": e, "initial_scale": i, "centered": c, "bias_correction": b}
    for e, i, c, b in itertools.product(
        [True, False], [0.0, 1.0], [True, False], [True, False]
    )
    if not (c and b)
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", ["real", "complex"])
def test_the_equations_in_float64(x64, rng, options, kind):
    gradients = rng.standard_normal((60, 7)) * 10.0 ** rng.integers(-3, 3, 7)
    if kind == "complex":
        gradients = gradients + 1j * rng.standard_normal((60, 7))
    gamma = np.linspace(0.5, 0.99, 60)
    updates, state = run(
        scale_by_rmsprop(lambda t: jnp.asarray(gamma)[t], 1e-4, **options), gradients
    )

    truth = reference.RMSProp(gradients[0], **options)
    for t, g in enumerate(gradients):
        expected = truth.scaled(g, gamma[t], 1e-4)
        # Each of 60 steps rounds a few times, on both sides; the centered truth also
        # loses a digit or two in its difference of moments.
        np.testing.assert_allclose(updates[t], expected, rtol=tolerance("float64", 1e5))
    nu = truth.nu - abs(truth.mu) ** 2 if options["centered"] else truth.nu
    np.testing.assert_allclose(state.nu, nu, rtol=tolerance("float64", 1e5))
    assert state.count == 60


def test_bias_correction_is_adams_second_moment(rng, standard_promotion):
    gradients = rng.standard_normal((50, 5)).astype("float32")
    ours, _ = run(
        scale_by_rmsprop(0.999, 1e-8, eps_in_sqrt=False, bias_correction=True),
        gradients,
    )
    adam, _ = run(optax.scale_by_adam(b1=0.0, b2=0.999, eps=1e-8), gradients)
    # Both round a few times a step; Adam forms 1 - b2^t from a rounded b2.
    np.testing.assert_allclose(ours, adam, rtol=1e-4)


def test_bias_correction_is_adams_second_moment_float64(x64, rng, standard_promotion):
    gradients = rng.standard_normal((50, 5))
    ours, _ = run(
        scale_by_rmsprop(0.999, 1e-8, eps_in_sqrt=False, bias_correction=True),
        gradients,
    )
    adam, _ = run(optax.scale_by_adam(b1=0.0, b2=0.999, eps=1e-8), gradients)
    # 1 - 0.999^t and 1 - 0.999 cancel three digits, on both sides.
    np.testing.assert_allclose(ours, adam, rtol=tolerance("float64", 1e4))


@pytest.mark.parametrize("gamma", [0.9, optax.linear_schedule(0.0, 0.99, 20)])
def test_bias_correction_is_right_under_a_schedule_and_an_initial_value(gamma):
    """The average of equal squares is that square, whatever the weights."""
    for initial_scale in (0.0, 9.0):
        u, _ = run(
            scale_by_rmsprop(
                gamma, 0.0, bias_correction=True, initial_scale=initial_scale
            ),
            np.full((30, 1), -3.0, "float32"),
        )
        np.testing.assert_allclose(u, -1.0, rtol=tolerance("float32", 30))


def test_centered_variance_where_a_difference_of_moments_fails(rng):
    """Mean 1000 and spread 1: float32 moments would be wrong by a factor of four."""
    gradients = (1000 + rng.standard_normal((20_000, 16))).astype("float32")
    for gamma in (0.9, 0.99, 0.999):
        _, state = run(scale_by_rmsprop(gamma, centered=True), gradients)
        truth = reference.variance(gradients, gamma)
        # The deviation from the mean, about 1, carries the spacing of 1000, 6e-5; it
        # is squared, and averaged over at least ten steps.
        np.testing.assert_allclose(state.nu, truth, rtol=3e-4)


# Safety: never a NaN that the input did not contain.


@pytest.mark.parametrize("eps_in_sqrt", [True, False])
@pytest.mark.parametrize("g", [1e4, 1.0, -0.7])
def test_centered_constant_gradient(g, eps_in_sqrt):
    u, state = run(
        scale_by_rmsprop(0.9, 1e-8, centered=True, eps_in_sqrt=eps_in_sqrt),
        np.full((3000, 4), g, "float32"),
    )
    assert jnp.isfinite(u).all()
    # The mean stops where a tenth of the deviation is half a spacing of the mean.
    assert (state.nu >= 0).all()
    assert (state.nu <= (g * tolerance("float32") / 0.1) ** 2).all()


@pytest.mark.parametrize("eps_in_sqrt", [True, False])
@pytest.mark.parametrize("g", [1e4, 1.0, -0.7])
def test_centered_constant_gradient_steps_by_its_eps(x64, g, eps_in_sqrt):
    """As the docstring warns; in float64 the mean's rounding is far below eps."""
    u, _ = run(
        scale_by_rmsprop(0.9, 1e-4, centered=True, eps_in_sqrt=eps_in_sqrt),
        np.full((3000, 4), g),
    )
    np.testing.assert_allclose(u[-1], g / 1e-2 if eps_in_sqrt else g / 1e-4, rtol=1e-6)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_eps_zero_and_zero_gradients(options, dtype):
    u, state = run(scale_by_rmsprop(0.9, 0.0, **options), np.zeros((5, 3), dtype))
    np.testing.assert_array_equal(u, np.zeros((5, 3), dtype))
    assert jnp.isfinite(state.nu).all()


@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [
        ("float32", [1e-38, 1e-30, 1e-15, 1e20, 3e38]),
        ("float16", [6e-8, 1e-4, 300.0, 65504.0]),
        ("bfloat16", [1e-38, 1e20, 3e38]),
        ("complex64", [1e-30, 1e20, 3e38 + 3e38j]),
    ],
)
@pytest.mark.parametrize(
    "options", [{}, {"eps_in_sqrt": False}, {"bias_correction": True}], ids=str
)
def test_no_nan_and_no_step_beyond_its_bound(dtype, sizes, options):
    pattern = [1.0, 0.0, -1.0, 1.0, 1e-3] * 20
    gradients = np.outer(pattern, sizes).astype(dtype)
    gammas = np.float32([0.0, 0.5, 0.9, 0.9999])
    every_eps = np.float32([0.0, 1e-8, 1e-6])

    def one(gamma, eps):
        u, state = run(scale_by_rmsprop(gamma, eps, **options), gradients)
        return u, state.nu

    many = jax.vmap(jax.vmap(one, (None, 0)), (0, None))
    u, nu = many(gammas, every_eps)
    assert jnp.isfinite(nu).all()
    # The update is rounded to its dtype, after a handful of float32 roundings.
    slack = 1 + tolerance(dtype, 2) + tolerance("float32", 16)
    bounds = slack / np.sqrt(1 - gammas.astype(float))
    largest = abs(np.asarray(u.astype("complex64"), complex)).max(axis=(1, 2, 3))
    assert (largest <= bounds).all()


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
@pytest.mark.parametrize("huge", [1e20, 3e38, np.inf])
def test_a_coordinate_moves_again_after_one_huge_gradient(huge, dtype):
    gradients = np.ones((1500, 2), dtype)
    gradients[0] = huge
    u, _ = run(scale_by_rmsprop(0.9), gradients)
    assert jnp.isfinite(u).all()
    # Back at what a constant gradient of one gives, 1/sqrt(1 + 1e-6).
    np.testing.assert_allclose(u[-1], 1.0, rtol=1e-6)


def test_a_nan_stays_visible_and_in_its_own_element():
    gradients = np.ones((3, 2), "float32")
    gradients[1, 0] = np.nan
    u, state = run(scale_by_rmsprop(), gradients)
    assert jnp.isnan(u[1:, 0]).all()
    assert jnp.isnan(state.nu[0])
    assert jnp.isfinite(u[:, 1]).all()


@pytest.mark.parametrize("gamma", [0.9, 0.99, 0.999, 0.9999])
def test_bfloat16_parameters_keep_an_average_that_moves(gamma):
    g = np.full((20_000, 1), 0.37, "bfloat16")
    _, state = run(scale_by_rmsprop(gamma), g)
    truth = float(g[0, 0]) ** 2 * (1 - gamma**20_000)
    assert state.nu.dtype == jnp.float32
    assert abs(state.nu[0] / truth - 1) < 1e-3


def test_a_million_steps_of_a_slow_average(rng):
    """The bounds are float32's: (1 - gamma) times less than half a spacing is lost."""
    optimizer, gamma, steps = scale_by_rmsprop(0.9999), 0.9999, 1_000_000

    @functools.partial(jax.jit, static_argnums=0)
    def nu(gradient):
        def body(t, state):
            return optimizer.update(gradient(t), state)[1]

        return jax.lax.fori_loop(0, steps, body, optimizer.init(jnp.zeros(1))).nu[0]

    constant = nu(lambda t: jnp.full(1, 0.37))
    truth = np.float64(np.float32(0.37)) ** 2 * (1 - gamma**steps)
    assert abs(constant / truth - 1) < 6e-4

    gradients = rng.standard_normal(steps).astype("float32")
    noisy = nu(lambda t: jnp.asarray(gradients)[t][None])
    last = 400_000  # weights before that are below 1e-17
    weights = (1 - gamma) * gamma ** np.arange(last - 1.0, -1.0, -1.0)
    truth = (weights * gradients[-last:].astype("float64") ** 2).sum()
    assert abs(noisy / truth - 1) < 1e-5


# Derivatives.


@pytest.mark.parametrize("eps_in_sqrt", [True, False])
@pytest.mark.parametrize("options", [{}, {"centered": True}, {"momentum": 0.9}])
def test_derivatives_by_hyperparameters(x64, options, eps_in_sqrt):
    scales = jnp.array([1.0, 10.0, 0.0])  # the last parameter's gradient is zero

    def final_loss(hyper):
        learning_rate, gamma, eps = hyper
        optimizer = rmsprop(
            learning_rate, gamma, eps, eps_in_sqrt=eps_in_sqrt, **options
        )

        def loss(x):
            return (scales * x**2).sum()

        def step(carry, _):
            x, state = carry
            u, state = optimizer.update(jax.grad(loss)(x), state)
            return (optax.apply_updates(x, u), state), None

        x = jnp.array([1.0, -2.0, 3.0])
        (x, _), _ = jax.lax.scan(step, (x, optimizer.init(x)), length=10)
        return loss(x)

    at = jnp.array([0.05, 0.9, 1e-2])
    derivative = jax.jit(jax.grad(final_loss))(at)
    value = jax.jit(final_loss)
    for i, h in enumerate([1e-6, 1e-6, 1e-6]):
        # Central differences: an error of h^2 times a third derivative, and the
        # rounding of the loss over h, 1e-16 * 1 / 1e-6.
        finite = (value(at.at[i].add(h)) - value(at.at[i].add(-h))) / (2 * h)
        np.testing.assert_allclose(derivative[i], finite, rtol=1e-6)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_derivatives_are_finite_where_the_gradient_is_zero(options, eps):
    def total(gamma, eps, g):
        optimizer = scale_by_rmsprop(gamma, eps, **options)
        u, state = optimizer.update(g, optimizer.init(g))
        u2, _ = optimizer.update(g, state)
        return u.sum() + u2.sum()

    derivatives = jax.grad(total, argnums=(0, 1, 2))(0.9, eps, jnp.zeros(3))
    for d in derivatives:
        assert jnp.isfinite(d).all()


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("gamma", [0.0, 1e-6, 1e-3, 0.3, 0.5, 0.9, 0.999])
def test_a_small_gradient_after_a_large_one(gamma, centered):
    """Float32 keeps its seven digits, however much larger the average was."""
    gradients = np.array([[4097.0], [1.2], [-0.7]], "float32")
    u, _ = run(scale_by_rmsprop(gamma, 1e-6, centered=centered), gradients)
    truth = reference.RMSProp(gradients[0], centered=centered)
    for g, ours in zip(gradients, u, strict=True):
        # A few roundings each of average, deviation, square, sum, root and quotient.
        np.testing.assert_allclose(
            ours, truth.scaled(g, gamma, 1e-6), rtol=tolerance("float32", 16)
        )


@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_gamma_at_its_ends(gamma):
    g = np.array([[2.0], [-3.0]], "float32")
    u, state = run(scale_by_rmsprop(gamma, 1e-6), g)
    # 0: the sign of each gradient; 1, the textbook's exercise: nu never leaves 0.
    expected = [[1.0], [-1.0]] if gamma == 0 else g * 1e3
    np.testing.assert_allclose(u, expected, rtol=1e-6)
    assert state.nu == (9.0 if gamma == 0 else 0.0)
