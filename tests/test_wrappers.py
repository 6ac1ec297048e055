"""Optax's wrappers, and its own tests of contributed optimizers."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_rmsprop import rmsprop, scale_by_rmsprop
from tests.helpers import (
    OPTIMIZERS,
    TWO,
    each,
    params,
    square,
    tolerance,
    train_each,
    two_or_each,
)

pytestmark = pytest.mark.usefixtures("standard_promotion")


def test_inject_hyperparams():
    schedule, options = optax.linear_schedule(0.1, 0.0, 100), {"momentum": 0.5}
    x = params()
    injected = optax.inject_hyperparams(rmsprop)(schedule, gamma=0.95, **options)
    alone = optax.inject_hyperparams(scale_by_rmsprop)(gamma=0.95)
    found = train_each(
        {
            "injected": injected,
            "plain": rmsprop(schedule, gamma=0.95, **options),
            "injected alone": alone,
            "alone": scale_by_rmsprop(0.95),
        },
        x,
        jax.tree.map(lambda p: jnp.stack([p] * 4), x),
    )
    # 1 - gamma is computed in float32 there, in double here: 3e-8 relative to 0.05.
    close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-6)
    close(found["injected"][0], found["plain"][0])
    close(found["injected alone"][0], found["alone"][0])
    state = found["injected"][1]
    state.hyperparams["gamma"] = jnp.asarray(0.5)
    _, state = jax.jit(injected.update)(x, state, x)
    assert state.hyperparams["gamma"] == 0.5


def test_inject_hyperparams_beside_bfloat16_parameters():
    """README's pitfall: by default it casts gamma to bfloat16, too."""
    x = {"w": jnp.ones((2, 3), "bfloat16")}
    make = functools.partial(optax.inject_hyperparams, rmsprop)
    careless = make()(learning_rate=0.1, gamma=0.999)
    assert careless.init(x).hyperparams["gamma"] == 1
    careful = make(hyperparam_dtype=jnp.float32)(learning_rate=0.1, gamma=0.999)
    numbers = rmsprop(np.float32(0.1), np.float32(0.999))
    state, expected = careful.init(x), numbers.init(x)
    for _ in range(3):
        updates, state = careful.update(x, state, x)
        right, expected = numbers.update(x, expected, x)
    assert state.hyperparams["gamma"] == np.float32(0.999)
    chex.assert_trees_all_equal(updates, right)


def test_members_side_by_side_have_the_bits_of_one(rng):
    """The how-to's code: hyperparameters in the state, by jax.vmap."""
    make = optax.inject_hyperparams(rmsprop, hyperparam_dtype=jnp.float32)
    gammas, rates = jnp.array([0.5, 0.9, 0.999]), jnp.array([0.1, 0.01, 0.001])
    x = jnp.asarray(rng.standard_normal((3, 64)), "float32")
    gradients = jnp.asarray(rng.standard_normal((10, 64)), "float32")

    def train(gamma, rate, x):
        optimizer = make(learning_rate=rate, gamma=gamma)

        def step(carry, g):
            x, state = carry
            updates, state = optimizer.update(g, state, x)
            return (optax.apply_updates(x, updates), state), updates

        return jax.lax.scan(step, (x, optimizer.init(x)), gradients)

    many, alone = jax.jit(jax.vmap(train))(gammas, rates, x), jax.jit(train)
    for i in range(3):
        one = alone(gammas[i], rates[i], x[i])
        chex.assert_trees_all_equal(jax.tree.map(lambda a: a[i], many), one)  # noqa: B023


@two_or_each
def test_multi_steps(optimizers):
    """It steps with the mean of gradients, at the last of them."""
    x = params()
    half, more = (jax.tree.map(lambda p: f * p, x) for f in (0.5, 1.5))  # noqa: B023

    @jax.jit
    def steps(x, half, more):
        def both(optimizer):
            several = optax.MultiSteps(optimizer, every_k_schedule=2)
            first, state = several.update(half, several.init(x), x)
            second, _ = several.update(more, state, x)
            return first, second, optimizer.update(x, optimizer.init(x), x)[0]

        return each(both, optimizers)

    for first, second, expected in steps(x, half, more).values():
        chex.assert_trees_all_equal(first, jax.tree.map(jnp.zeros_like, x))
        chex.assert_trees_all_close(second, expected, rtol=1e-5)


@two_or_each
def test_masked_and_partition(optimizers):
    x = {"w": params()["w"], "b": jnp.ones(3)}

    def three(x, optimizer):
        masked = optax.masked(optimizer, {"w": True, "b": False})
        parts = optax.partition(
            {"ours": optimizer, "frozen": optax.set_to_zero()},
            {"w": "ours", "b": "frozen"},
        )
        w = {"w": x["w"]}
        return (
            optimizer.update(w, optimizer.init(w), w)[0],
            masked.update(x, masked.init(x), x)[0],
            parts.update(x, parts.init(x), x)[0],
        )

    @jax.jit
    def steps(x):
        return each(functools.partial(three, x), optimizers)

    for alone, masked, parts in steps(x).values():
        chex.assert_trees_all_equal(masked, alone | {"b": x["b"]})
        chex.assert_trees_all_equal(parts, alone | {"b": jnp.zeros_like(x["b"])})


@two_or_each
def test_apply_if_finite(optimizers):
    x = params()

    @jax.jit
    def steps(x, bad):
        def guard(optimizer):
            guarded = optax.apply_if_finite(optimizer, max_consecutive_errors=2)
            kept, state = guarded.update(bad, guarded.init(x), x)
            after, _ = guarded.update(x, state, x)
            return kept, after, optimizer.update(x, optimizer.init(x), x)[0]

        return each(guard, optimizers)

    bad = jax.tree.map(lambda p: p * jnp.nan, x)
    for kept, after, expected in steps(x, bad).values():
        chex.assert_trees_all_equal(kept, jax.tree.map(jnp.zeros_like, x))
        # Inside the condition it is another program, which may round once differently.
        chex.assert_trees_all_close(after, expected, rtol=tolerance("float32", 4))


@two_or_each
def test_flatten_and_a_chain_with_clipping(optimizers):
    """It takes the steps of the clipped gradient."""
    clip = optax.clip_by_global_norm(1.0)

    @jax.jit
    def steps(x):
        def first(optimizer, g=x):
            return optimizer.update(g, optimizer.init(x), x)[0]

        clipped, _ = clip.update(x, clip.init(x))
        return each(
            lambda o: (
                (first(optax.chain(clip, o)), first(o, clipped)),
                (first(optax.flatten(o)), first(o)),
            ),
            optimizers,
        )

    for chained, flat in steps(params()).values():
        chex.assert_trees_all_equal(*chained)
        chex.assert_trees_all_close(*flat, rtol=1e-6)


# With each of them the optimizer decreases the loss.
WRAPPERS = {
    "schedule_free": lambda tx: optax.contrib.schedule_free(tx, 0.01),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "conditionally_mask": lambda tx: optax.conditionally_mask(tx, lambda step: True),
    "conditionally_transform": lambda tx: optax.conditionally_transform(
        tx, lambda step: True
    ),
    "masked": lambda tx: optax.chain(
        optax.masked(tx, {"w": True, "b": False}),
        optax.masked(optax.sgd(0.1), {"w": False, "b": True}),
    ),
    "partition": lambda tx: optax.partition(
        {"ours": tx, "rest": optax.sgd(0.1)}, {"w": "ours", "b": "rest"}
    ),
    "named_chain": lambda tx: optax.named_chain(("ours", tx)),
    "flatten": optax.flatten,
    "adaptive_grad_clip": lambda tx: optax.chain(optax.adaptive_grad_clip(0.1), tx),
    "reduce_on_plateau": lambda tx: optax.chain(
        tx, optax.contrib.reduce_on_plateau(patience=1)
    ),
    "keep_params_nonnegative": lambda tx: optax.chain(
        tx, optax.keep_params_nonnegative()
    ),
    "add_noise": lambda tx: optax.chain(tx, optax.add_noise(1e-6, 0.5, 0)),
    "ema": lambda tx: optax.chain(tx, optax.ema(0.5)),
    "inject_hyperparams": lambda tx: optax.chain(
        tx, optax.inject_hyperparams(optax.scale)(step_size=1.0)
    ),
    "multi_transform": lambda tx: optax.multi_transform(
        {"ours": tx, "rest": optax.set_to_zero()}, {"w": "ours", "b": "rest"}
    ),
    "MultiSteps that skips": lambda tx: optax.MultiSteps(
        tx, 1, should_skip_update_fn=optax.skip_not_finite
    ),
    "mechanize": optax.contrib.mechanize,
    "sam": lambda tx: optax.contrib.sam(
        tx, optax.chain(optax.contrib.normalize(), optax.sgd(0.01)), sync_period=2
    ),
    "split_real_and_imaginary": optax.contrib.split_real_and_imaginary,
    "centralize and zero_nans": lambda tx: optax.chain(
        optax.zero_nans(), optax.centralize(), tx
    ),
    # By itself its step is as long as the parameters are.
    "scale_by_trust_ratio": lambda tx: optax.chain(
        tx, optax.scale_by_trust_ratio(), optax.scale(0.1)
    ),
    "apply_every": lambda tx: optax.chain(tx, optax.apply_every(2)),
    "normalize_by_update_norm": lambda tx: optax.chain(
        optax.normalize_by_update_norm(), tx
    ),
    "snapshot": lambda tx: optax.chain(tx, optax.snapshot("step", square)),
    "freeze": lambda tx: optax.chain(tx, optax.freeze({"w": False, "b": True})),
    "selective_transform": lambda tx: optax.selective_transform(
        tx, freeze_mask={"w": False, "b": True}
    ),
}
if hasattr(optax, "monitor"):  # since Optax 0.2.7
    WRAPPERS["monitor"] = lambda tx: optax.chain(
        optax.monitor({"norm": square}),
        tx,
        optax.monitor({"steps": optax.measure_with_ema(square, 0.9)}),
    )


def start():
    return {"w": jnp.arange(1.0, 7).reshape(2, 3), "b": jnp.ones(3)}


@pytest.mark.slow
def test_optax_wrappers():
    wrapped = {
        (name, wrapper): wrap(optimizer)
        for wrapper, wrap in WRAPPERS.items()
        for name, optimizer in TWO.items()
    }

    def step(name, x, state):
        value, g = jax.value_and_grad(square)(x)
        extra = {"value": value} if name[1] == "reduce_on_plateau" else {}
        updates, state = wrapped[name].update(g, state, x, **extra)
        return optax.apply_updates(x, updates), state

    @jax.jit
    def steps(carries):
        return {name: step(name, *carry) for name, carry in carries.items()}

    carries = {name: (start(), wrapped[name].init(start())) for name in wrapped}
    for _ in range(10):
        carries = steps(carries)
    uphill = [name for name, (x, _) in carries.items() if square(x) >= square(start())]
    assert not uphill


def test_lookahead():
    x = {"w": start()["w"]}

    @jax.jit
    def train():
        def one(inner):
            optimizer = optax.lookahead(inner, sync_period=2, slow_step_size=0.5)

            def step(carry, _):
                both, state = carry
                g = jax.grad(square)(both.fast)
                updates, state = optimizer.update(g, state, both)
                return (optax.apply_updates(both, updates), state), None

            both = optax.LookaheadParams.init_synced(x)
            carry = both, optimizer.init(both)
            return square(jax.lax.scan(step, carry, length=10)[0][0].slow)

        return each(one, TWO)

    assert all(found < square(x) for found in train().values())


@pytest.mark.skipif(not hasattr(optax.contrib, "galore"), reason="since Optax 0.2.8")
def test_galore():
    """It does not pass on parameters, so there is no decay."""
    optimizer = optax.contrib.scale_by_galore(
        rank=1, base_optimizer=OPTIMIZERS["in fewer bits"]
    )
    x = {"w": start()["w"]}
    updates, _ = jax.jit(optimizer.update)(x, optimizer.init(x), x)
    assert square(optax.apply_updates(x, updates)) < square(x)


def test_aggregating():
    aggregating = pytest.importorskip(
        "optax.experimental", reason="since Optax 0.2.7", exc_type=ImportError
    ).aggregating
    mean = aggregating.Aggregator(
        init=optax.init_empty_state,
        update=lambda g, state, params=None: (
            jax.tree.map(lambda x: x.mean(0), g),
            state,
        ),
    )
    x = {"w": start()["w"]}
    members = jax.tree.map(lambda g: jnp.stack([g, 3 * g]), x)
    twice = jax.tree.map(lambda g: 2 * g, x)
    for inner in TWO.values():
        optimizer = aggregating.process(optax.identity(), mean, inner)
        updates, _ = optimizer.update(members, optimizer.init(x), x)
        expected, _ = inner.update(twice, inner.init(x), x)
        chex.assert_trees_all_equal(updates, expected)


# The checks of Optax's tests for its contributions.

TARGETS = {
    "rosenbrock": (
        jnp.zeros(2),
        jnp.ones(2),
        lambda x: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2,
    ),
    "several arrays": (
        (jnp.zeros(3), jnp.zeros((2, 2))),
        (jnp.array([1.0, -1.0, 2.0]), jnp.array([[1.0, 0.0], [-1.0, 1.0]])),
        None,
    ),
}


def test_it_converges():
    """From Optax's starting points, within its tolerance of 0.03.

    With a constant rate RMSProp ends in steps of the rate's size, so it falls here.
    """
    slower = optax.scale_by_schedule(optax.cosine_decay_schedule(1.0, 20_000))

    def trained(optimizer, start, end, loss):
        def distance(x):
            return square(jax.tree.map(jnp.subtract, x, end))

        tx = optax.chain(optimizer, slower)

        def step(carry, _):
            x, state = carry
            updates, state = tx.update(jax.grad(loss or distance)(x), state, x)
            return (optax.apply_updates(x, updates), state), None

        state = optax.tree.map_params(tx, lambda v: v, tx.init(start))
        return jax.lax.scan(step, (start, state), length=20_000)[0][0]

    optimizers = {"plain": rmsprop(0.01)}
    optimizers |= {name: OPTIMIZERS[name] for name in ("corrected", "in fewer bits")}

    @jax.jit
    def train():
        return {
            (name, target): trained(optimizer, *TARGETS[target])
            for name, optimizer in optimizers.items()
            for target in TARGETS
        }

    for (_, target), x in train().items():
        chex.assert_trees_all_close(x, TARGETS[target][1], rtol=3e-2, atol=3e-2)
