"""What every Optax transformation promises, tested as Optax tests its own."""

import dataclasses
import functools
import pickle
from typing import NamedTuple

import chex
import equinox as eqx
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_rmsprop import ScaleByRMSPropState, conventions, rmsprop, scale_by_rmsprop
from tests.conftest import mesh_of_four, not_under, tolerance

MAKES = {
    "scale_by_rmsprop": scale_by_rmsprop,
    "plain": functools.partial(rmsprop, 0.1),
    "schedules": functools.partial(
        rmsprop,
        optax.cosine_decay_schedule(0.1, 100),
        optax.linear_schedule(0.5, 0.99, 100),
    ),
    "centered": functools.partial(rmsprop, 0.1, centered=True),
    "corrected": functools.partial(rmsprop, 0.1, bias_correction=True),
    "momentum": functools.partial(rmsprop, 0.1, momentum=0.9, nesterov=True),
    "everything": functools.partial(
        rmsprop,
        0.1,
        0.99,
        centered=True,
        momentum=0.9,
        lr_in_momentum=False,
        weight_decay=0.1,
    ),
}
make = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES.keys())


def params(dtype="float32"):
    return {
        "w": jnp.arange(6, dtype=dtype).reshape(2, 3) - 2,
        "b": [jnp.ones(3, dtype), jnp.asarray(-0.5, dtype)],
    }


def describe(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type, x.sharding), tree)


# Types, classes, compilations.


@make
def test_state_and_update_are_stable(make, dtype, standard_promotion):
    x = params(dtype)
    optimizer = make()
    state = optimizer.init(x)

    # Both branches of a cond must agree in tree, shape, type and weak type.
    @jax.jit
    def step(take, g, state):
        return jax.lax.cond(
            take,
            lambda: optimizer.update(g, state, g),
            lambda: (g, state),
        )

    u, new = step(True, x, state)
    assert describe(u) == describe(x)
    assert describe(new) == describe(state)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    for leaf in jax.tree.leaves(state):
        assert leaf.dtype.itemsize >= 4


@make
def test_one_compilation(make, standard_promotion):
    optimizer, x = make(), params()
    step = jax.jit(chex.assert_max_traces(lambda *args: optimizer.update(*args), n=1))
    state = optimizer.init(x)
    for _ in range(3):
        _, state = step(x, state, x)
    chex.clear_trace_counter()


@not_under("check_tracer_leaks", because="JAX traces everything anew there")
def test_optimizers_of_one_make_share_their_compilation(caplog):
    x = params()

    def use(gamma, rate):
        optimizer = rmsprop(rate, gamma, momentum=gamma)
        _, state = optimizer.update(x, optimizer.init(x))
        optimizer.update(x, state)

    use(0.9, 0.1)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        for i in range(100):
            use(i / 100, 0.1 / (i + 1))
    assert [r for r in caplog.records if "ompil" in r.getMessage()] == []


@make
def test_extra_arguments_are_accepted(make, standard_promotion):
    optimizer, x = make(), params()
    plain, _ = optimizer.update(x, optimizer.init(x), x)
    extra, _ = optimizer.update(x, optimizer.init(x), x, value=1.0, unheard_of=2)
    chex.assert_trees_all_equal(plain, extra)


def test_parameters_may_be_anything_where_they_are_not_used():
    """Equinox's users pass whole models, functions and all."""
    optimizer, x = rmsprop(0.1), params()
    model = {"model": jax.nn.relu, "name": "a"}
    updates, _ = optimizer.update(x, optimizer.init(x), model)
    expected, _ = optimizer.update(x, optimizer.init(x), x)
    chex.assert_trees_all_equal(updates, expected)


TYPES = ["bfloat16", "float16", "float32", "int32"]


@pytest.mark.parametrize("wide", [False, True], ids=["x32", "x64"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_type_of_a_hyperparameter_changes_no_type(wide, dtype, request):
    if wide:
        request.getfixturevalue("x64")
    x = params(dtype)
    numbers = [1, 1.0, np.float16(1), np.float32(1), np.float64(1), np.int64(1)]
    numbers += [np.ones(()), *(jnp.ones((), t) for t in TYPES)]
    if wide:
        numbers.append(jnp.ones((), "float64"))
    expected = None
    for number in numbers:
        optimizer = rmsprop(
            number,
            number,
            number,
            initial_scale=number,
            momentum=number,
            weight_decay=number,
        )
        u, state = optimizer.update(x, optimizer.init(x), x)
        result = jax.tree.map(lambda a: (a.dtype, a.weak_type), (u, state))
        expected = expected or (result, u)
        assert result == expected[0]
        chex.assert_trees_all_equal(u, expected[1])
        # As an operand of the caller's own jit, where it has a type and no value.
        traced = jax.jit(
            lambda n: rmsprop(
                n, n, n, initial_scale=n, momentum=n, weight_decay=n
            ).update(x, state, x)  # noqa: B023 - called at once
        )(number)
        assert jax.tree.map(lambda a: (a.dtype, a.weak_type), traced) == result


# Optax's wrappers.


def steps(optimizer, x, n=4):
    """Parameters and state after n steps on a parabola."""

    @jax.jit
    def step(x, state):
        u, state = optimizer.update(x, state, x)
        return optax.apply_updates(x, u), state

    state = optimizer.init(x)
    for _ in range(n):
        x, state = step(x, state)
    return x, state


def test_inject_hyperparams():
    x = params()
    injected = optax.inject_hyperparams(rmsprop)(
        optax.linear_schedule(0.1, 0.0, 100), gamma=0.95, momentum=0.5
    )
    plain = rmsprop(optax.linear_schedule(0.1, 0.0, 100), gamma=0.95, momentum=0.5)
    # 1 - gamma is formed in float32 there, in double here: 3e-8 of 0.05.
    chex.assert_trees_all_close(steps(injected, x)[0], steps(plain, x)[0], rtol=1e-5)
    _, state = steps(injected, x)
    state.hyperparams["gamma"] = jnp.asarray(0.5)
    _, state = jax.jit(injected.update)(x, state, x)
    assert state.hyperparams["gamma"] == 0.5


def test_inject_hyperparams_into_the_transformation():
    x = params()
    injected = optax.inject_hyperparams(scale_by_rmsprop)(gamma=0.95)
    chex.assert_trees_all_close(
        steps(injected, x)[0], steps(scale_by_rmsprop(0.95), x)[0], rtol=1e-5
    )


@make
def test_multi_steps(make, standard_promotion):
    x = params()
    several = optax.MultiSteps(make(), every_k_schedule=2)
    state = several.init(x)
    half = jax.tree.map(lambda p: p / 2, x)
    u, state = jax.jit(several.update)(half, state, x)
    chex.assert_trees_all_equal(u, jax.tree.map(jnp.zeros_like, x))
    u, state = jax.jit(several.update)(jax.tree.map(lambda p: 1.5 * p, x), state, x)
    expected, _ = jax.jit(make().update)(x, make().init(x), x)
    chex.assert_trees_all_close(u, expected, rtol=1e-5)


@make
def test_masked_and_partition(make, standard_promotion):
    x = params()
    masked = optax.masked(make(), {"w": True, "b": False})
    u, _ = jax.jit(masked.update)(x, masked.init(x), x)
    alone, _ = jax.jit(make().update)(
        {"w": x["w"]}, make().init({"w": x["w"]}), {"w": x["w"]}
    )
    chex.assert_trees_all_equal(u, {"w": alone["w"], "b": x["b"]})

    parts = optax.partition(
        {"ours": make(), "frozen": optax.set_to_zero()}, {"w": "ours", "b": "frozen"}
    )
    u, _ = jax.jit(parts.update)(x, parts.init(x), x)
    chex.assert_trees_all_equal(
        u, {"w": alone["w"], "b": jax.tree.map(jnp.zeros_like, x["b"])}
    )


@not_under("debug_nans", because="it is given a NaN")
@make
def test_apply_if_finite(make, standard_promotion):
    x = params()
    guarded = optax.apply_if_finite(make(), max_consecutive_errors=2)
    bad = jax.tree.map(lambda p: p * jnp.nan, x)
    u, state = jax.jit(guarded.update)(bad, guarded.init(x), x)
    chex.assert_trees_all_equal(u, jax.tree.map(jnp.zeros_like, x))
    u, _ = jax.jit(guarded.update)(x, state, x)
    expected, _ = jax.jit(make().update)(x, make().init(x), x)
    chex.assert_trees_all_equal(u, expected)


@make
def test_flatten(make, standard_promotion):
    x = params()
    chex.assert_trees_all_close(
        steps(optax.flatten(make()), x)[0], steps(make(), x)[0], rtol=1e-6
    )


@make
def test_tree_tools(make, standard_promotion):
    x, optimizer = params(), make()
    state = optimizer.init(x)
    chex.assert_trees_all_equal_shapes(optax.tree.get(state, "nu"), x)
    doubled = optax.tree.map_params(optimizer, lambda s: s + 2, state)
    chex.assert_trees_all_equal(
        optax.tree.get(doubled, "nu"),
        jax.tree.map(lambda n: n + 2, optax.tree.get(state, "nu")),
    )
    assert optax.tree.get(doubled, "count") == 0
    specs = optax.tree.map_params(
        optimizer, lambda _, p: p.shape, state, x, transform_non_params=lambda _: None
    )
    assert optax.tree.get(specs, "nu")["w"] == (2, 3)


@make
def test_in_a_chain_with_clipping(make, standard_promotion):
    """What is clipped gets the steps of the clipped gradient."""
    optimizer, x = make(), params()
    clip = optax.clip_by_global_norm(1.0)
    chained = optax.chain(clip, optimizer)
    updates, _ = chained.update(x, chained.init(x), x)
    clipped, _ = clip.update(x, clip.init(x))
    expected, _ = optimizer.update(clipped, optimizer.init(x), x)
    chex.assert_trees_all_equal(updates, expected)


# JAX's transformations.


def updates_of(optimizer, gradients, how):
    """The updates and the last state, called in one of four ways."""
    state = optimizer.init(gradients[0])
    if how == "scanned":

        def body(state, g):
            u, state = optimizer.update(g, state, g)
            return state, u

        state, us = jax.jit(lambda s, g: jax.lax.scan(body, s, g))(state, gradients)
        return us, state
    update = optimizer.update
    if how == "jitted":
        update = jax.jit(update)
    if how == "vmapped over one":
        batched = jax.vmap(update)

        def update(*args):
            one = jax.tree.map(lambda x: x[None], args)
            return jax.tree.map(lambda x: x[0], batched(*one))

    us = []
    for g in gradients:
        u, state = update(g, state, g)
        us.append(u)
    return jnp.stack(us), state


@pytest.mark.parametrize("how", ["jitted", "scanned", "vmapped over one"])
@make
def test_the_same_bits_however_it_is_called(make, how, rng, standard_promotion):
    gradients = jnp.asarray(rng.standard_normal((20, 37)), "float32")
    eager = updates_of(make(), gradients, "eager")
    other = updates_of(make(), gradients, how)
    chex.assert_trees_all_equal(eager, other)


@not_under("disable_jit", "debug_nans", "debug_infs", because="no donation there")
@make
def test_every_donated_buffer_is_reused(make, dtype, standard_promotion):
    x, optimizer = params(dtype), make()
    state = optimizer.init(x)

    def step(x, state, g):
        u, state = optimizer.update(g, state, x)
        return optax.apply_updates(x, u), state

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(x, state, x).compile()
    donated = sum(leaf.nbytes for leaf in jax.tree.leaves((x, state)))
    assert compiled.memory_analysis().alias_size_in_bytes == donated
    compiled(x, state, params(dtype))


@make
def test_export_for_every_platform(make, standard_promotion):
    x, optimizer = params(), make()
    state = optimizer.init(x)
    platforms = ("cpu", "cuda", "rocm", "tpu")
    exported = jax.export.export(jax.jit(optimizer.update), platforms=platforms)(
        x, state, x
    )
    assert exported.platforms == platforms
    # Another compilation, which may round once or twice otherwise.
    chex.assert_trees_all_close(
        exported.call(x, state, x),
        optimizer.update(x, state, x),
        rtol=tolerance("float32", 4),
    )
    jax.export.export(jax.jit(optimizer.init), platforms=platforms)(x)


@make
def test_pickling(make, standard_promotion):
    x = params()
    _, state = steps(make(), x)
    again = pickle.loads(pickle.dumps(state))
    assert jax.tree.structure(again) == jax.tree.structure(state)
    chex.assert_trees_all_equal(again, state)
    if make is MAKES["schedules"]:
        return  # Optax's schedules are closures, which pickle refuses
    optimizer = pickle.loads(pickle.dumps(make()))
    chex.assert_trees_all_equal(
        optimizer.update(x, state, x), make().update(x, state, x)
    )


def rate_schedule(step):
    return 0.1 / (step + 1.0)


@dataclasses.dataclass
class Halving:
    """A schedule that has no hash, as no dataclass has one unless it is frozen."""

    start: float

    def __call__(self, step):
        return self.start * 0.5**step


@pytest.mark.parametrize("make", [rmsprop, conventions.laprop, conventions.dreamer_v3])
def test_a_schedule_without_a_hash(make, standard_promotion):
    unhashable, plain = make(Halving(0.1)), make(lambda step: 0.1 * 0.5**step)
    x = params()
    found, expected = (o.update(x, o.init(x), x)[0] for o in (unhashable, plain))
    chex.assert_trees_all_equal(found, expected)


def test_pickling_with_a_schedule(standard_promotion):
    optimizer = pickle.loads(pickle.dumps(rmsprop(rate_schedule)))
    x = params()
    chex.assert_trees_all_equal(
        optimizer.update(x, optimizer.init(x)),
        rmsprop(rate_schedule).update(x, optimizer.init(x)),
    )


# Sweeps.

SWEPT = {
    "gamma": jnp.array([0.0, 0.5, 0.9, 0.99, 0.9999]),
    "eps": jnp.array([0.0, 1e-8, 1e-6, 1e-3, 0.1]),
    "learning_rate": jnp.array([0.0, 1e-3, 1e-2, 0.1, 0.7]),
    "seed": jnp.arange(5),
}


NOISE = np.random.default_rng(0).standard_normal((5, 30, 64))


def train(
    dtype,
    size=64,
    pull=True,
    *,
    learning_rate=0.05,
    gamma=0.9,
    eps=1e-6,
    seed=0,
    **options,
):
    """Parameters and updates of a scanned training, the optimizer built inside."""
    noise = jnp.asarray(NOISE, dtype)[seed, :, :size]
    optimizer = rmsprop(learning_rate, gamma, eps, **options)

    def step(carry, n):
        x, state = carry
        u, state = optimizer.update(x + n if pull else n, state, x)
        x = optax.apply_updates(x, u)
        return (x, state), (x, u)

    x = jnp.ones(size, dtype)
    return jax.lax.scan(step, (x, optimizer.init(x)), noise)


@not_under("debug_nans", "debug_infs", because="gamma 0 diverges in float16")
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "centered": True}], ids=str)
@pytest.mark.parametrize("name", SWEPT)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_row_of_a_sweep_is_the_single_run(name, dtype, options):
    @jax.jit
    def one(value):
        return train(dtype, **{name: value}, **options)

    sweep = jax.jit(jax.vmap(one))(SWEPT[name])
    for i, value in enumerate(SWEPT[name]):
        row = jax.tree.map(lambda x: x[i], sweep)  # noqa: B023 - called at once
        chex.assert_trees_all_equal(row, one(value))
    # With the last value known when it is compiled it is another program, which a
    # compiler may round otherwise: of the two products of a momentum it contracts
    # either with their sum. Two spacings a step.
    known = jax.jit(lambda: train(dtype, **{name: value}, **options))()
    assert_close_by_largest(row, known, roundings=4 * 30)


def assert_close_by_largest(actual, expected, roundings):
    """Each leaf within so many roundings of its largest number."""
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        if jnp.issubdtype(a.dtype, jnp.inexact):
            largest = abs(np.asarray(e, "float64")).max()
            np.testing.assert_allclose(
                np.asarray(a, "float64"),
                np.asarray(e, "float64"),
                rtol=0,
                atol=tolerance(a.dtype, roundings) * largest,
            )


@pytest.mark.parametrize("name", SWEPT)
def test_a_row_of_odd_size_is_the_single_run_but_for_roundings(name):
    """XLA's reciprocal root rounds otherwise in a vector than in a loop's remainder.

    The gradients are given, since near zero a gradient's own error is magnified.
    """

    @jax.jit
    def one(value):
        return train("float32", 7, pull=False, **{name: value})

    sweep = jax.jit(jax.vmap(one))(SWEPT[name])
    for i, value in enumerate(SWEPT[name]):
        row = jax.tree.map(lambda x: x[i], sweep)  # noqa: B023 - called at once
        assert_close_by_largest(row, one(value), roundings=4 * 30)


# Trees.


class Layer(NamedTuple):
    """A leaf and one that may be None."""

    kernel: jax.Array
    bias: jax.Array | None


class Net(NamedTuple):
    """NamedTuples in a NamedTuple, and an empty one."""

    first: Layer
    second: Layer
    empty: tuple = ()


def test_trees_of_every_kind():
    layer = Layer(jnp.ones((2, 3)), None)
    trees = {
        "none": {"a": None, "b": jnp.ones(2)},
        "empty": {},
        "empty containers": {"a": [], "b": (), "c": {"d": jnp.ones(1)}},
        "zero-size": {"a": jnp.zeros((0, 3)), "b": jnp.ones(2)},
        "Python scalars": {"a": 1.5, "b": [2.0, -0.5]},
        "NumPy": {"a": np.ones(3, "float32")},
        "nested NamedTuples": Net(layer, Layer(jnp.ones(3), jnp.ones(()))),
        "one array": jnp.ones(3),
    }
    for x in trees.values():
        optimizer = rmsprop(0.1, centered=True, momentum=0.9, weight_decay=0.1)
        state = optimizer.init(x)
        u, new = optimizer.update(x, state, x)
        assert jax.tree.structure(u) == jax.tree.structure(x)
        assert jax.tree.structure(new) == jax.tree.structure(state)
        optax.apply_updates(x, u)


def test_equinox(standard_promotion):
    model = eqx.nn.MLP(2, 1, 8, 2, key=jax.random.key(0))
    optimizer = rmsprop(1e-2, weight_decay=1e-3)
    state = optimizer.init(eqx.filter(model, eqx.is_array))

    @eqx.filter_jit
    def step(model, state, x):
        def loss(model):
            return (jax.vmap(model)(x) ** 2).mean()

        value, g = eqx.filter_value_and_grad(loss)(model)
        u, state = optimizer.update(g, state, eqx.filter(model, eqx.is_array))
        return eqx.apply_updates(model, u), state, value

    x = jax.random.normal(jax.random.key(1), (32, 2))
    losses = []
    for _ in range(30):
        model, state, value = step(model, state, x)
        losses.append(value)
    assert losses[-1] < 0.1 * losses[0]


def test_one_state_class():
    for options in ({}, {"centered": True}, {"bias_correction": True}):
        state = scale_by_rmsprop(**options).init(jnp.ones(3))
        assert type(state) is ScaleByRMSPropState
        assert (state.mu is None) == (not options.get("centered", False))
        assert (state.weight is None) == (not options.get("bias_correction", False))


# Places.


@pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
@make
def test_sharding(make, axis_type, standard_promotion):
    kind = getattr(jax.sharding.AxisType, axis_type)
    mesh = mesh_of_four(kind)
    spec = jax.sharding.PartitionSpec
    with jax.set_mesh(mesh):
        sharded = jax.sharding.NamedSharding(mesh, spec("d"))
        everywhere = jax.sharding.NamedSharding(mesh, spec())
        x = {
            "w": jax.device_put(jnp.ones((8, 3)), sharded),
            "b": jax.device_put(jnp.ones(3), everywhere),
        }
        optimizer = make()
        update = jax.jit(optimizer.update)
        for init in (optimizer.init, jax.jit(optimizer.init)):
            state = init(x)
            for name in ("nu", "mu", "trace"):
                part = optax.tree.get(state, name)
                for leaf in jax.tree.leaves(part):
                    assert leaf.sharding.is_equivalent_to(
                        x["w" if leaf.ndim == 2 else "b"].sharding, leaf.ndim
                    )
            u, new = update(x, state, x)
            assert describe(new) == describe(state)
            assert u["w"].sharding.is_equivalent_to(sharded, 2)
            _, eager = optimizer.update(x, state, x)
            assert describe(eager) == describe(state)
        program = update.lower(x, state, x).compile().as_text()
    for collective in ("all-reduce", "all-gather", "all-to-all", "collective-permute"):
        assert collective not in program
