"""A population: each member is a training of its own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_rmsprop import PopulationState, population, rmsprop
from jax_rmsprop.quantization import quantize_state, uint8
from tests.helpers import tolerance

GRID = {"gamma": [0.5, 0.9, 0.999], "learning_rate": [0.1, 0.001]}
POINTS = [(g, r) for g in GRID["gamma"] for r in GRID["learning_rate"]]


@pytest.fixture
def params(rng):
    return {
        "w": jnp.asarray(rng.standard_normal((6, 4, 3)), "float32"),
        "b": jnp.asarray(rng.standard_normal(6), "float32"),
    }


def loss(p, batch=1.0):
    return (p["w"] ** 2).sum() * batch + p["b"] ** 4


def gradients(params, batch=1.0):
    return jax.vmap(jax.grad(loss), (0, None))(params, batch)


def scanned(optimizer, gradients, params, state, n):
    """Parameters and state after n steps, of which each has its batch."""

    def step(carry, batch):
        params, state = carry
        updates, state = optimizer.update(gradients(params, batch), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, state), jnp.arange(1.0, n + 1))[0]


@functools.partial(jax.jit, static_argnums=(0, 3))
def steps(optimizer, params, state, n):
    return scanned(optimizer, gradients, params, state, n)


@pytest.mark.parametrize(
    "make",
    [
        rmsprop,
        lambda gamma, learning_rate: rmsprop(
            learning_rate, gamma, momentum=0.9, centered=True, weight_decay=0.01
        ),
        lambda gamma, learning_rate: optax.chain(
            optax.clip_by_global_norm(1.0), optax.adam(learning_rate, b2=gamma)
        ),
    ],
    ids=["rmsprop", "with options", "a chain of Optax"],
)
def test_each_member_is_its_own_training(params, make, standard_promotion):
    optimizer = population(make, GRID)
    after, state = steps(optimizer, params, optimizer.init(params), 20)
    assert isinstance(state, PopulationState)

    @jax.jit
    def alone(gamma, rate, p):
        one = make(gamma=gamma, learning_rate=rate)
        return scanned(one, jax.grad(loss), p, one.init(p), 20)[0]

    for m, (gamma, rate) in enumerate(POINTS):
        member = jax.tree.map(lambda x, m=m: x[m], params)
        p = alone(jnp.float32(gamma), jnp.float32(rate), member)
        for name in p:
            np.testing.assert_allclose(
                after[name][m],
                p[name],
                # Each of 20 steps rounds otherwise in a batch, twice or so.
                rtol=tolerance("float32", 64),
                atol=tolerance("float32", 64),
            )


def test_hyperparameters_are_float32_beside_bfloat16(params):
    params = jax.tree.map(lambda x: x.astype("bfloat16"), params)
    grid = {"gamma": [0.999], "learning_rate": [0.1], "momentum": np.linspace(0, 1, 6)}
    optimizer = population(rmsprop, grid | {"momentum": [0.9] * 6})
    state = optimizer.init(params)
    assert state.hyperparams["gamma"].dtype == "float32"
    np.testing.assert_array_equal(state.hyperparams["gamma"], np.float32([0.999] * 6))
    updates, _ = optimizer.update(params, state, params)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype("bfloat16")}
    # A whole number stays one.
    seeds = population(lambda seed: optax.sgd(0.1), {"seed": range(6)})
    assert seeds.init(params).hyperparams["seed"].dtype == "int32"


@pytest.mark.parametrize("wide", [False, True])
def test_a_gamma_that_float32_takes_for_1_is_refused(wide, request):
    if wide:
        request.getfixturevalue("x64")
    with pytest.raises(
        ValueError, match="^`gamma` must be at most 0.99997 or 1, since"
    ):
        population(rmsprop, {"gamma": [0.9, 0.9999999], "learning_rate": [0.1, 0.1]})
    population(rmsprop, {"gamma": [0.9, 0.9999, 1.0], "learning_rate": [0.1]})


def test_under_x64_they_are_float32_all_the_same(x64, params):
    params = jax.tree.map(lambda x: x.astype("float64"), params)
    optimizer = population(rmsprop, GRID)
    state = optimizer.init(params)
    assert state.hyperparams["gamma"].dtype == "float32"
    updates, state = optimizer.update(params, state, params)
    assert updates["w"].dtype == "float64"


def test_another_learning_rate_compiles_nothing(params):
    optimizer = population(rmsprop, GRID)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(gradients(params), state, params)
        return optax.apply_updates(params, updates), state

    before, state = step(params, state)
    state = optax.tree.set(
        state, learning_rate=jnp.zeros(6), gamma=jnp.full(6, 0.25, "float32")
    )
    after, state = step(before, state)
    assert step._cache_size() == 1
    for name in after:
        np.testing.assert_array_equal(after[name], before[name])
    assert optax.tree.get(state, "gamma")[3] == 0.25


def test_product_and_pairs(params):
    state = population(rmsprop, GRID).init(params)
    found = zip(
        *(state.hyperparams[n] for n in ("gamma", "learning_rate")), strict=True
    )
    np.testing.assert_array_equal(list(found), np.float32(POINTS))
    pairs = {"gamma": [0.1] * 6, "learning_rate": range(6)}
    state = population(rmsprop, pairs, zipped=True).init(params)
    np.testing.assert_array_equal(state.hyperparams["learning_rate"], range(6))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        rmsprop,
        lambda gamma, learning_rate: quantize_state(
            rmsprop(
                learning_rate,
                gamma,
                momentum=0.9,
            ),
            {"nu": uint8(min_size=1)},
        ),
    ],
    ids=["full", "stored"],
)
def test_the_member_axis_can_be_sharded(axis_type, compiled, make, rng):
    mesh = jax.make_mesh((2,), ("members",), (axis_type,), devices=jax.devices()[:2])
    optimizer = population(make, GRID)
    whole = {
        "w": jnp.asarray(rng.standard_normal((6, 4, 3)), "float32"),
        "b": jnp.asarray(rng.standard_normal(6), "float32"),
    }
    expected, _ = steps(optimizer, whole, optimizer.init(whole), 3)

    with jax.set_mesh(mesh):
        # As JAX itself spells the sharding of a result.
        rest = [None] if axis_type == AxisType.Explicit else []
        params = {
            name: jax.device_put(
                x,
                NamedSharding(mesh, PartitionSpec("members", *rest * (x.ndim - 1))),
            )
            for name, x in whole.items()
        }
        state = (jax.jit(optimizer.init) if compiled else optimizer.init)(params)

        def split(tree):
            return [x.sharding.spec[:1] == ("members",) for x in jax.tree.leaves(tree)]

        assert all(split(state))

        @jax.jit
        def step(params, state, batch):
            updates, state = optimizer.update(gradients(params, batch), state, params)
            return optax.apply_updates(params, updates), state

        for i in range(3):
            params, state = step(params, state, jnp.float32(i + 1))
        assert all(split((params, state)))
        assert step._cache_size() == 1
        text = step.lower(params, state, jnp.float32(1)).compile().as_text()
    if make is rmsprop:  # JAX 0.8 gathers six bools for a stored state
        for word in ("all-reduce", "all-gather", "all-to-all", "collective-permute"):
            assert word not in text
    for name in params:
        np.testing.assert_allclose(
            params[name], expected[name], rtol=tolerance("float32", 64)
        )


def test_donation(params):
    optimizer = population(rmsprop, GRID)
    state = optimizer.init(params)

    def step(params, state):
        updates, state = optimizer.update(gradients(params), state, params)
        return optax.apply_updates(params, updates), state

    donated = jax.jit(step, donate_argnums=(0, 1))
    memory = donated.lower(params, state).compile().memory_analysis()
    total = sum(x.nbytes for x in jax.tree.leaves((params, state)))
    assert memory.alias_size_in_bytes == total
    donated(params, state)
    assert all(x.is_deleted() for x in jax.tree.leaves((params, state)))


def test_orbax_keeps_the_hyperparameters(params, tmp_path):
    optimizer = population(rmsprop, GRID)
    middle, state = steps(optimizer, params, optimizer.init(params), 5)
    state = optax.tree.set(state, gamma=jnp.linspace(0, 0.9, 6))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", (middle, state))
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(
            tmp_path / "state", jax.tree.map(jnp.zeros_like, (middle, state))
        )
    expected = steps(optimizer, middle, state, 5)
    found = steps(optimizer, *restored, 5)
    for x, y in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(x, y)


def test_in_a_scan_and_with_extra_arguments(params):
    def make(learning_rate):
        return optax.chain(
            optax.sgd(learning_rate),
            optax.contrib.reduce_on_plateau(patience=1, cooldown=0, factor=0.5),
        )

    optimizer = population(make, {"learning_rate": [0.1] * 6})

    def step(carry, i):
        params, state = carry
        # The even members' value stays, the odd ones' falls.
        value = jnp.where(jnp.arange(6) % 2, -i, 1.0)
        updates, state = optimizer.update(params, state, params, value=value)
        return (params, state), updates["b"] / params["b"]

    with jax.numpy_dtype_promotion("standard"):
        start = params, optimizer.init(params)
        _, scales = jax.lax.scan(step, start, jnp.arange(6.0))
    assert (scales[-1, ::2] > -0.06).all()
    np.testing.assert_allclose(scales[-1, 1::2], -0.1, rtol=1e-6)


def raises(error, message, function, *args, **kwargs):
    with pytest.raises(error) as caught:
        function(*args, **kwargs)
    assert str(caught.value) == message


def test_bad_input(params):
    raises(
        TypeError,
        "`centered` must be numbers, got True; for Python values make a population for "
        "each",
        population,
        rmsprop,
        GRID | {"centered": [True, False]},
    )
    raises(
        TypeError,
        "`make_optimizer` must take the axes of the grid by name: got an unexpected "
        "keyword argument 'rho'; the axes are rho, its arguments (gamma)",
        population,
        lambda gamma: optax.sgd(0.1),
        {"rho": [0.1]},
    )
    raises(
        ValueError,
        "`gamma` must have at least one value, got none",
        population,
        rmsprop,
        {"gamma": []},
    )
    optimizer = population(rmsprop, GRID)
    raises(
        ValueError,
        "`params` must have a leading axis of 6 members, but ['w'] has shape (4, 3)",
        optimizer.init,
        {"b": params["b"], "w": params["w"][0]},
    )
    state = optimizer.init(params)
    raises(
        ValueError,
        "`updates` must have a leading axis of 6 members, but ['b'] has shape ()",
        optimizer.update,
        {"b": jnp.ones(()), "w": params["w"]},
        state,
        params,
    )
