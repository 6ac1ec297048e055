"""The mathematics of `scale_by_rmsprop`: its equations, its safety, its precision."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_rmsprop import rmsprop, scale_by_rmsprop
from tests import reference
from tests.helpers import axis, every, tolerance, updates_of


def run(optimizer, gradients):
    """All updates and the last state of one optimizer."""
    return updates_of({"": optimizer}, gradients)[""]


OPTIONS = {
    str(list(options.values())): options
    for options in every(
        axis("eps_in_sqrt", True, False),
        axis("initial_scale", 0.0, 1.0),
        axis("centered", True, False),
        axis("bias_correction", True, False),
    )
    if not (options["centered"] and options["bias_correction"])
}


def scaled_by(*args, **more):
    """A transformation for each set of options."""
    return {n: scale_by_rmsprop(*args, **o, **more) for n, o in OPTIONS.items()}


def test_the_equations_in_float64(x64, rng):
    real = rng.standard_normal((60, 7)) * 10.0 ** rng.integers(-3, 3, 7)
    gradients = {"real": real, "complex": real + 1j * rng.standard_normal((60, 7))}
    gamma = np.linspace(0.5, 0.99, 60)
    found = updates_of(scaled_by(lambda t: jnp.asarray(gamma)[t], 1e-4), gradients)
    for name, options in OPTIONS.items():
        updates, state = found[name]
        assert state.count == 60
        for kind in gradients:
            truth = reference.RMSProp(gradients[kind][0], **options)
            expected = [
                truth.scaled(g, gamma[t], 1e-4) for t, g in enumerate(gradients[kind])
            ]
            # Each of 60 steps rounds a few times on both sides; the centered truth also
            # loses a digit or two in its difference of moments.
            close = {"rtol": tolerance("float64", 1e5), "err_msg": f"{name} {kind}"}
            np.testing.assert_allclose(updates[kind], expected, **close)
            nu = truth.nu - abs(truth.mu) ** 2 if options["centered"] else truth.nu
            np.testing.assert_allclose(state.nu[kind], nu, **close)


def test_bias_correction_is_adams_second_moment(x64, rng, standard_promotion):
    double = rng.standard_normal((50, 5))
    gradients = {"single": double.astype("float32"), "double": double}
    ours = scale_by_rmsprop(0.999, 1e-8, eps_in_sqrt=False, bias_correction=True)
    adam = optax.scale_by_adam(b1=0.0, b2=0.999, eps=1e-8)
    found = updates_of({"ours": ours, "adam": adam}, gradients)
    ours, adam = found["ours"][0], found["adam"][0]
    # 1 - 0.999^t and 1 - 0.999 cancel three digits, on both sides.
    np.testing.assert_allclose(
        ours["double"], adam["double"], rtol=tolerance("float64", 1e4)
    )
    # Both round a few times per step; Adam computes 1 - b2^t from a rounded b2.
    np.testing.assert_allclose(ours["single"], adam["single"], rtol=1e-4)


def test_bias_correction_is_right_under_a_schedule_and_an_initial_value():
    """The average of equal squares is that square, for any weights."""
    found = updates_of(
        {
            (name, scale): scale_by_rmsprop(
                gamma, 0.0, bias_correction=True, initial_scale=scale
            )
            for name, gamma in {
                "number": 0.9,
                "schedule": optax.linear_schedule(0.0, 0.99, 20),
            }.items()
            for scale in (0.0, 9.0)
        },
        np.full((30, 1), -3.0, "float32"),
    )
    for name, (u, _) in found.items():
        np.testing.assert_allclose(
            u, -1.0, rtol=tolerance("float32", 30), err_msg=f"{name}"
        )


def test_centered_variance_where_a_difference_of_moments_fails(rng):
    """Mean 1000 and spread 1: float32 moments would be wrong by a factor of four."""
    gradients = (1000 + rng.standard_normal((20_000, 16))).astype("float32")
    found = updates_of(
        {gamma: scale_by_rmsprop(gamma, centered=True) for gamma in (0.9, 0.99, 0.999)},
        gradients,
    )
    for gamma, (_, state) in found.items():
        truth = reference.variance(gradients, gamma)
        # The deviation from the mean, about 1, has the spacing of 1000, 6e-5; it is
        # squared, and averaged over at least ten steps.
        np.testing.assert_allclose(state.nu, truth, rtol=3e-4)


# Safety: never a NaN that the input did not contain.

CONSTANT = np.array([1e4, 1.0, -0.7])


def test_centered_constant_gradient():
    g = np.tile(CONSTANT, (3000, 1)).astype("float32")
    found = updates_of(
        {
            e: scale_by_rmsprop(0.9, 1e-8, centered=True, eps_in_sqrt=e)
            for e in (True, False)
        },
        g,
    )
    for u, state in found.values():
        assert jnp.isfinite(u).all()
        # The mean stops where a tenth of the deviation is half a spacing of the mean.
        assert (state.nu >= 0).all()
        assert (state.nu <= (CONSTANT * tolerance("float32") / 0.1) ** 2).all()


def test_centered_constant_gradient_steps_by_its_eps(x64):
    """As the docstring warns; in float64 the mean's rounding is far below eps."""
    found = updates_of(
        {
            e: scale_by_rmsprop(0.9, 1e-4, centered=True, eps_in_sqrt=e)
            for e in (True, False)
        },
        np.tile(CONSTANT, (3000, 1)),
    )
    np.testing.assert_allclose(found[True][0][-1], CONSTANT / 1e-2, rtol=1e-6)
    np.testing.assert_allclose(found[False][0][-1], CONSTANT / 1e-4, rtol=1e-6)


NARROW = ["float16", "bfloat16", "float32", "complex64"]


@pytest.mark.parametrize("dtypes", [NARROW, ["float64"]], ids=["x32", "x64"])
def test_eps_zero_and_zero_gradients(dtypes, request):
    if "float64" in dtypes:
        request.getfixturevalue("x64")
    zeros = {dtype: jnp.zeros((5, 3), dtype) for dtype in dtypes}
    for u, state in updates_of(scaled_by(0.9, 0.0), zeros).values():
        for dtype in dtypes:
            assert u[dtype].dtype == dtype
            np.testing.assert_array_equal(u[dtype], zeros[dtype])
            assert jnp.isfinite(state.nu[dtype]).all()


SIZES = {
    "float32": [1e-38, 1e-30, 1e-15, 1e20, 3e38],
    "float16": [6e-8, 1e-4, 300.0, 65504.0],
    "bfloat16": [1e-38, 1e20, 3e38],
    "complex64": [1e-30, 1e20, 3e38 + 3e38j],
}


def test_no_nan_and_no_step_beyond_its_bound():
    pattern = [1.0, 0.0, -1.0, 1.0, 1e-3] * 20
    gradients = {d: np.outer(pattern, sizes).astype(d) for d, sizes in SIZES.items()}
    gammas = np.float32([0.0, 0.5, 0.9, 0.9999])
    every_eps = np.float32([0.0, 1e-8, 1e-6])

    def one(gamma, eps):
        found = updates_of(
            {
                "": scale_by_rmsprop(gamma, eps),
                "outside": scale_by_rmsprop(gamma, eps, eps_in_sqrt=False),
                "corrected": scale_by_rmsprop(gamma, eps, bias_correction=True),
            },
            gradients,
        )
        return {name: (u, state.nu) for name, (u, state) in found.items()}

    for u, nu in jax.vmap(jax.vmap(one, (None, 0)), (0, None))(
        gammas, every_eps
    ).values():
        for dtype in SIZES:
            assert jnp.isfinite(nu[dtype]).all()
            # The update is rounded to its dtype, after a handful of float32 roundings.
            slack = 1 + tolerance(dtype, 2) + tolerance("float32", 16)
            bounds = slack / np.sqrt(1 - gammas.astype(float))
            size = abs(np.asarray(u[dtype].astype("complex64"), complex))
            assert (size.max(axis=(1, 2, 3)) <= bounds).all()


def test_a_coordinate_moves_again_after_one_huge_gradient():
    huge = np.array([1e20, 3e38, np.inf])
    gradients = {d: np.ones((1500, 3), d) for d in ("float32", "complex64")}
    for g in gradients.values():
        g[0] = huge
    u, _ = run(scale_by_rmsprop(0.9), gradients)
    for dtype in gradients:
        assert jnp.isfinite(u[dtype]).all()
        # Back to the step of a constant gradient of 1, 1/sqrt(1 + 1e-6).
        np.testing.assert_allclose(u[dtype][-1], 1.0, rtol=1e-6)


def test_a_nan_stays_visible_and_in_its_own_element():
    gradients = np.ones((3, 2), "float32")
    gradients[1, 0] = np.nan
    u, state = run(scale_by_rmsprop(), gradients)
    assert jnp.isnan(u[1:, 0]).all()
    assert jnp.isnan(state.nu[0])
    assert jnp.isfinite(u[:, 1]).all()


def test_bfloat16_parameters_keep_an_average_that_moves():
    gammas = (0.9, 0.99, 0.999, 0.9999)
    g = np.full((20_000, 1), 0.37, "bfloat16")
    for gamma, (_, state) in updates_of(
        {x: scale_by_rmsprop(x) for x in gammas}, g
    ).items():
        truth = float(g[0, 0]) ** 2 * (1 - gamma**20_000)
        assert state.nu.dtype == jnp.float32
        assert abs(state.nu[0] / truth - 1) < 1e-3


@pytest.mark.parametrize(
    "steps", [100_000, pytest.param(10**6, marks=pytest.mark.slow)]
)
def test_many_steps_of_a_slow_average(rng, steps):
    """Float32 sets the bounds: (1 - gamma) times less than half a spacing is lost."""
    optimizer, gamma = scale_by_rmsprop(0.9999), 0.9999

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
    last = min(steps, 400_000)  # weights before that are below 1e-17
    weights = (1 - gamma) * gamma ** np.arange(last - 1.0, -1.0, -1.0)
    truth = (weights * gradients[-last:].astype("float64") ** 2).sum()
    assert abs(noisy / truth - 1) < 1e-5


def test_the_count_stays_at_the_largest_integer():
    """It does not overflow to negative steps after two billion."""
    g = jnp.ones(1)
    optimizer = scale_by_rmsprop()
    state = optimizer.init(g)._replace(count=jnp.int32(2**31 - 1))
    _, state = optimizer.update(g, state)
    assert state.count == 2**31 - 1


# Derivatives.


def test_derivatives_by_hyperparameters(x64):
    scales = jnp.array([1.0, 10.0, 0.0])  # the last parameter's gradient is zero
    options = {
        f"{more} {inside}": {**more, "eps_in_sqrt": inside}
        for more in ({}, {"centered": True}, {"momentum": 0.9})
        for inside in (True, False)
    }

    def loss(x):
        return (scales * x**2).sum()

    def final_loss(hyper, options):
        optimizer = rmsprop(*hyper, **options)

        def step(carry, _):
            x, state = carry
            u, state = optimizer.update(jax.grad(loss)(x), state)
            return (optax.apply_updates(x, u), state), None

        x = jnp.array([1.0, -2.0, 3.0])
        (x, _), _ = jax.lax.scan(step, (x, optimizer.init(x)), length=10)
        return loss(x)

    @jax.jit
    def losses(hyper):
        return {name: final_loss(hyper[name], o) for name, o in options.items()}

    at = dict.fromkeys(options, jnp.array([0.05, 0.9, 1e-2]))
    found = jax.jit(jax.grad(lambda hyper: sum(losses(hyper).values())))(at)
    for i, h in enumerate([1e-6, 1e-6, 1e-6]):
        after, before = (
            losses({name: x.at[i].add(sign * h) for name, x in at.items()})
            for sign in (1, -1)
        )
        for name in options:
            # Central differences: an error of h^2 times a third derivative, and the
            # rounding of the loss over h, 1e-16 * 1 / 1e-6.
            finite = (after[name] - before[name]) / (2 * h)
            np.testing.assert_allclose(found[name][i], finite, rtol=1e-6, err_msg=name)


def test_derivatives_are_finite_where_the_gradient_is_zero():
    def total(gamma, eps, g, options):
        optimizer = scale_by_rmsprop(gamma, eps, **options)
        u, state = optimizer.update(g, optimizer.init(g))
        u2, _ = optimizer.update(g, state)
        return u.sum() + u2.sum()

    @jax.jit
    def derivatives(eps):
        return {
            name: jax.grad(total, argnums=(0, 1, 2))(0.9, eps, jnp.zeros(3), options)
            for name, options in OPTIONS.items()
        }

    for eps in (0.0, 1e-8):
        for name, found in derivatives(eps).items():
            assert all(jnp.isfinite(d).all() for d in found), (name, eps)


def test_a_small_gradient_after_a_large_one():
    """Float32 keeps its seven digits, however large the average was before."""
    gradients = np.array([[4097.0], [1.2], [-0.7]], "float32")
    found = updates_of(
        {
            (gamma, centered): scale_by_rmsprop(gamma, 1e-6, centered=centered)
            for gamma in (0.0, 1e-6, 1e-3, 0.24, 0.3, 0.5, 0.9, 0.999)
            for centered in (False, True)
        },
        gradients,
    )
    for (gamma, centered), (u, _) in found.items():
        truth = reference.RMSProp(gradients[0], centered=centered)
        expected = [truth.scaled(g, gamma, 1e-6) for g in gradients]
        # A few roundings each for average, deviation, square, sum, root and quotient.
        np.testing.assert_allclose(
            u, expected, rtol=tolerance("float32", 16), err_msg=f"{gamma} {centered}"
        )


def test_gamma_at_its_ends():
    g = np.array([[2.0], [-3.0]], "float32")
    found = updates_of(
        {gamma: scale_by_rmsprop(gamma, 1e-6) for gamma in (0.0, 1.0)}, g
    )
    # 0: the sign of each gradient; 1, the textbook's exercise: nu never leaves 0.
    for gamma, expected, nu in ((0.0, [[1.0], [-1.0]], 9.0), (1.0, g * 1e3, 0.0)):
        u, state = found[gamma]
        np.testing.assert_allclose(u, expected, rtol=1e-6)
        assert state.nu == nu
