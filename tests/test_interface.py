"""The interface of Optax transformations, tested as Optax tests its own."""

import dataclasses
import functools
import pickle
from typing import NamedTuple

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_rmsprop import RMSPropState, conventions, rmsprop, scale_by_rmsprop
from tests.helpers import (
    OPTIMIZERS,
    SWITCHES,
    describe,
    each,
    mesh_of_four,
    params,
    states_of,
    tolerance,
    two_or_each,
)

pytestmark = pytest.mark.usefixtures("standard_promotion")

# With codecs a step inside a jit is another program, and may round differently.
IN_FULL = {
    n: o for n, o in OPTIMIZERS.items() if n not in ("in fewer bits", "one byte")
}
NARROW = ["float16", "bfloat16", "float32", "complex64"]


def run(optimizer, x, n=3, update=None):
    """The updates of n steps and the last state; the gradient is the parameters."""
    state = optimizer.init(x)
    for _ in range(n):
        updates, state = (update or optimizer.update)(x, state, x)
    return updates, state


@functools.cache
def after_three_steps():
    """Every optimizer's updates and state after three steps of `params()`."""
    return jax.jit(lambda x: each(lambda o: run(o, x)))(params())


# Types, classes, compilations.


@pytest.mark.parametrize("dtypes", [NARROW, ["float64"]], ids=["x32", "x64"])
def test_state_and_update_are_stable(dtypes, request):
    """All steps are one program, traced once."""
    if "float64" in dtypes:
        request.getfixturevalue("x64")
    x = {dtype: params(dtype)["w"] for dtype in dtypes}
    states = states_of(x)

    # Both branches of a cond must agree in tree, shape, type and weak type.
    @jax.jit
    @functools.partial(chex.assert_max_traces, n=1)
    def step(take, g, states):
        return {
            name: jax.lax.cond(
                take,
                lambda s, o=o: o.update(g, s, g),
                lambda s: (g, s),
                states[name],
            )
            for name, o in OPTIMIZERS.items()
        }

    for _ in range(2):
        for name, (u, new) in step(True, x, states).items():
            assert describe(u) == describe(x)
            assert describe(new) == describe(states[name])
            assert jax.tree.structure(new) == jax.tree.structure(states[name])
            if name in IN_FULL:
                assert all(a.dtype.itemsize >= 4 for a in jax.tree.leaves(new))
            states[name] = new
    chex.clear_trace_counter()


def test_one_state_class():
    for options in ({}, {"centered": True}, {"bias_correction": True}):
        state = scale_by_rmsprop(**options).init(jnp.ones(3))
        assert type(state) is RMSPropState
        assert (state.mu is None) == (not options.get("centered", False))
        assert (state.weight is None) == (not options.get("bias_correction", False))


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


def test_extra_arguments_are_accepted():
    x = params()

    def both(optimizer, x=x):
        plain, _ = optimizer.update(x, optimizer.init(x), x)
        extra, _ = optimizer.update(x, optimizer.init(x), x, value=1.0, unheard_of=2)
        return plain, extra

    found = jax.jit(lambda x: each(lambda optimizer: both(optimizer, x)))(x)
    for plain, extra in (*found.values(), both(OPTIMIZERS["everything"])):
        chex.assert_trees_all_equal(plain, extra)


def test_parameters_may_be_anything_where_they_are_not_used():
    """Equinox users pass whole models, including functions."""
    optimizer, x = rmsprop(0.1), params()
    model = {"model": jax.nn.relu, "name": "a"}
    updates, _ = optimizer.update(x, optimizer.init(x), model)
    expected, _ = optimizer.update(x, optimizer.init(x), x)
    chex.assert_trees_all_equal(updates, expected)


TYPES = ["bfloat16", "float16", "float32", "int32"]


@pytest.mark.parametrize(
    "wide",
    [False, pytest.param(True, marks=pytest.mark.slow)],
    ids=["x32", "x64"],
)
def test_the_type_of_a_hyperparameter_changes_no_type(wide, request):
    if wide:
        request.getfixturevalue("x64")
    x = params("bfloat16"), params("float32")
    numbers = [1, 1.0, np.float16(1), np.float32(1), np.float64(1), np.int64(1)]
    numbers += [np.ones(()), *(jnp.ones((), t) for t in TYPES)]
    if wide:
        numbers.append(jnp.ones((), "float64"))

    def step(n):
        optimizer = rmsprop(n, n, n, initial_scale=n, momentum=n, weight_decay=n)
        return optimizer.update(x, optimizer.init(x), x)

    def types(tree):
        return jax.tree.map(lambda a: (a.dtype, a.weak_type), tree)

    expected = step(numbers[0])
    for found in map(step, numbers):
        assert types(found) == types(expected)
        chex.assert_trees_all_equal(found, expected)
    # As operands of the caller's jit, where they have a type but no value.
    for traced in jax.jit(lambda numbers: [step(n) for n in numbers])(numbers):
        assert types(traced) == types(expected)


# Trees.


class Layer(NamedTuple):
    """A leaf, and one that may be None."""

    kernel: jax.Array
    bias: jax.Array | None


class Net(NamedTuple):
    """NamedTuples in a NamedTuple, and an empty one."""

    first: Layer
    second: Layer
    empty: tuple = ()


def test_trees_of_every_kind():
    layer = Layer(jnp.ones((2, 3)), None)
    of_all = {
        "none": {"a": None, "b": jnp.ones(2)},
        "empty": {},
        "empty containers": {"a": [], "b": (), "c": {"d": jnp.ones(1)}},
        "zero-size": {"a": jnp.zeros((0, 3)), "b": jnp.ones(2)},
        "Python scalars": {"a": 1.5, "b": [2.0, -0.5]},
        "NumPy": {"a": np.ones(3, "float32")},
        "nested NamedTuples": Net(layer, Layer(jnp.ones(3), jnp.ones(()))),
    }
    optimizer = rmsprop(0.1, centered=True, momentum=0.9, weight_decay=0.1)
    for x in (of_all, {}, jnp.ones(3)):
        state = optimizer.init(x)
        u, new = optimizer.update(x, state, x)
        assert jax.tree.structure(u) == jax.tree.structure(x)
        assert jax.tree.structure(new) == jax.tree.structure(state)
        optax.apply_updates(x, u)


@pytest.mark.parametrize(
    "tree", [{}, [], {"a": jnp.ones((3, 0)), "w": jnp.ones((3, 2))}], ids=str
)
def test_trees_without_leaves_or_elements(tree):
    def step(optimizer):
        return run(optimizer, tree, 1)

    def in_a_chain(optimizer):
        return run(optax.chain(optax.clip(1.0), optimizer), tree, 1)

    found = jax.jit(lambda: (each(step), each(in_a_chain)))()
    eager = step(OPTIMIZERS["everything"]), step(OPTIMIZERS["in fewer bits"])
    for updates, _ in (*found[0].values(), *found[1].values(), *eager):
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, tree)


def test_init_of_shapes():
    shapes = jax.eval_shape(params)
    for optimizer in OPTIMIZERS.values():
        chex.assert_trees_all_equal(optimizer.init(shapes), optimizer.init(params()))


@two_or_each
def test_optax_finds_what_is_like_the_parameters(optimizers):
    """So everything works that shards, masks or averages a state."""
    x = params()
    for name, optimizer in optimizers.items():
        _, state = after_three_steps()[name]
        marked = optax.tree_utils.tree_map_params(
            optimizer, lambda s, p: s.shape == p.shape, state, x
        )
        found = [m for m in jax.tree.leaves(marked) if isinstance(m, bool)]
        assert all(found)
        assert len(found) >= 2
        added = optax.tree.map_params(optimizer, lambda s: s + s.dtype.type(2), state)
        chex.assert_trees_all_equal(
            optax.tree.get(added, "nu"),
            jax.tree.map(lambda n: n + n.dtype.type(2), optax.tree.get(state, "nu")),
        )
        specs = optax.tree.map_params(
            optimizer, lambda _, p: p.shape, state, x, transform_non_params=lambda _: 0
        )
        assert optax.tree.get(specs, "nu")["w"] == (2, 3)


def test_optax_gets_and_sets_by_name():
    for _, state in after_three_steps().values():
        nu = optax.tree.get(state, "nu")
        chex.assert_trees_all_equal_shapes(nu, params())
        zero = jax.tree.map(jnp.zeros_like, nu)
        chex.assert_trees_all_equal(
            optax.tree.get(optax.tree.set(state, nu=zero), "nu"), zero
        )


# Ways to call it.


def test_the_same_bits_however_it_is_called(rng):
    gradients = jnp.asarray(rng.standard_normal((20, 37)), "float32")
    # Outside a jit a schedule runs in Python, and rounds separately.
    optimizers = {n: o for n, o in IN_FULL.items() if n != "schedules"}

    def stepped(states, g):
        new = {n: o.update(g, states[n], g) for n, o in optimizers.items()}
        return {n: s for n, (_, s) in new.items()}, {n: u for n, (u, _) in new.items()}

    def by_itself(step):
        def scan(states, gradients):
            found = []
            for g in gradients:
                states, updates = step(states, g)
                found.append(updates)
            return states, jax.tree.map(lambda *us: jnp.stack(us), *found)

        return scan

    def batched(states, g):
        one = jax.tree.map(lambda x: x[None], (states, g))
        return jax.tree.map(lambda x: x[0], jax.vmap(stepped)(*one))

    states = {name: o.init(gradients[0]) for name, o in optimizers.items()}
    eager = by_itself(stepped)(states, gradients)
    for other in (
        by_itself(jax.jit(stepped)),
        by_itself(jax.jit(batched)),
        jax.jit(functools.partial(jax.lax.scan, stepped)),
    ):
        chex.assert_trees_all_equal(eager, other(states, gradients))


def switched(names):
    """The same steps outside a jit, in a scan, and in a vmapped scan."""
    x = {"w": (jnp.arange(6, dtype="float32") - 2).reshape(2, 3)}
    optimizers = {name: OPTIMIZERS[name] for name in names}

    def scanned(x):
        def step(states, _):
            new = {n: o.update(x, states[n], x) for n, o in optimizers.items()}
            return {n: s for n, (_, s) in new.items()}, {
                n: u for n, (u, _) in new.items()
            }

        states = {name: o.init(x) for name, o in optimizers.items()}
        _, updates = jax.lax.scan(step, states, length=3)
        return jax.tree.map(lambda u: u[-1], updates)

    @jax.jit
    def compiled(x):
        many = jax.vmap(scanned)(jax.tree.map(lambda p: jnp.stack([p, p]), x))
        return scanned(x), jax.tree.map(lambda u: u[1], many)

    eager = {name: run(optimizer, x)[0] for name, optimizer in optimizers.items()}
    return eager, compiled(x)


usual = functools.cache(switched)


# The others are rare, or those under which the tests as a whole run.
OFTEN = ("disable_jit", "debug_nans", "check_tracer_leaks", "an explicit mesh")


@pytest.mark.parametrize(
    "switch",
    [pytest.param(s, marks=() if s in OFTEN else pytest.mark.slow) for s in SWITCHES],
)
def test_switches(switch):
    names = ("everything",)
    if switch == "an explicit mesh":
        names += ("one byte",)
    # Optax's own schedules mix their types under strict promotion.
    if switch in ("check_tracer_leaks", "enable_x64"):
        names += ("schedules",)
    expected = usual(names)
    with SWITCHES[switch]():
        found = switched(names)
    # Without jit every operation rounds separately.
    chex.assert_trees_all_close(found, expected, rtol=tolerance("float32", 2**8))


@pytest.mark.parametrize("dtypes", [NARROW, ["float64"]], ids=["x32", "x64"])
def test_every_donated_buffer_is_reused(dtypes, request):
    if "float64" in dtypes:
        request.getfixturevalue("x64")
    x = each(lambda _: {dtype: params(dtype)["w"] for dtype in dtypes})
    states = jax.jit(lambda x: {n: o.init(x[n]) for n, o in OPTIMIZERS.items()})(x)

    def step(x, states, g):
        new = {n: o.update(g[n], states[n], x[n]) for n, o in OPTIMIZERS.items()}
        updates = {name: u for name, (u, _) in new.items()}
        return optax.apply_updates(x, updates), {n: s for n, (_, s) in new.items()}

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(x, states, x).compile()
    donated = sum(leaf.nbytes for leaf in jax.tree.leaves((x, states)))
    assert compiled.memory_analysis().alias_size_in_bytes == donated
    compiled(x, states, jax.tree.map(jnp.copy, x))


def test_export_for_every_platform():
    x = params()
    states = states_of(x)
    platforms = ("cpu", "cuda", "rocm", "tpu")

    def update(x, states):
        return {n: o.update(x, states[n], x) for n, o in OPTIMIZERS.items()}

    def init(x):
        return each(lambda optimizer: optimizer.init(x))

    exported = jax.export.export(jax.jit(update), platforms=platforms)(x, states)
    assert exported.platforms == platforms
    # Another program, which may round once or twice differently.
    chex.assert_trees_all_close(
        exported.call(x, states),
        jax.jit(update)(x, states),
        rtol=tolerance("float32", 4),
    )
    jax.export.export(jax.jit(init), platforms=platforms)(x)


def rate_schedule(step):
    return 0.1 / (step + 1.0)


def test_pickling():
    x = params()
    for name, (_, state) in after_three_steps().items():
        again = pickle.loads(pickle.dumps(state))
        assert jax.tree.structure(again) == jax.tree.structure(state)
        chex.assert_trees_all_equal(again, state)
        if name in ("schedules", "a convention"):
            continue  # contains Optax's closures, which cannot be pickled
        optimizer = pickle.loads(pickle.dumps(OPTIMIZERS[name]))
        chex.assert_trees_all_equal(
            optimizer.update(x, state, x), OPTIMIZERS[name].update(x, state, x)
        )
    optimizer = rmsprop(rate_schedule)
    again = pickle.loads(pickle.dumps(optimizer))
    chex.assert_trees_all_equal(run(again, x), run(optimizer, x))


# Sweeps by vmap.

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
    """Parameters and updates of a scanned training that builds its optimizer."""
    noise = jnp.asarray(NOISE, dtype)[seed, :, :size]
    optimizer = rmsprop(learning_rate, gamma, eps, **options)

    def step(carry, n):
        x, state = carry
        u, state = optimizer.update(x + n if pull else n, state, x)
        x = optax.apply_updates(x, u)
        return (x, state), (x, u)

    x = jnp.ones(size, dtype)
    return jax.lax.scan(step, (x, optimizer.init(x)), noise)


def rows(trainings, values):
    """Each training with each hyperparameter at its value, others unchanged."""
    return {
        f"{name}, {i}": train(*how, **options, **{name: value})
        for name, value in values.items()
        for i, (how, options) in enumerate(trainings)
    }


def assert_close_by_largest(actual, expected, roundings):
    """Each leaf within that number of roundings of its largest number."""
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        if jnp.issubdtype(a.dtype, jnp.inexact):
            largest = abs(np.asarray(e, "float64")).max()
            np.testing.assert_allclose(
                np.asarray(a, "float64"),
                np.asarray(e, "float64"),
                rtol=0,
                atol=tolerance(a.dtype, roundings) * largest,
            )


@pytest.mark.parametrize(
    "dtype",
    ["float32", *(pytest.param(t, marks=pytest.mark.slow) for t in NARROW[:2])],
)
def test_a_row_of_a_sweep_is_the_single_run(dtype):
    options = ({}, {"momentum": 0.9, "centered": True})
    one = functools.partial(rows, [((dtype,), o) for o in options])
    single, sweep = jax.jit(one), jax.jit(jax.vmap(one))(SWEPT)
    for i in range(5):
        values = {name: x[i] for name, x in SWEPT.items()}
        row = jax.tree.map(lambda x: x[i], sweep)  # noqa: B023 - called at once
        chex.assert_trees_all_equal(row, single(values))
    # With the last values known at compile time it is another program, which may round
    # differently: the compiler may contract either of the two products of a momentum
    # with their sum. Two spacings per step.
    assert_close_by_largest(row, jax.jit(lambda: one(values))(), roundings=4 * 30)


def test_a_row_of_odd_size_is_the_single_run_but_for_roundings():
    """XLA's reciprocal root rounds differently in a vector and in a loop's remainder.

    The gradients are given, since errors of gradients near zero would be magnified.
    """
    one = functools.partial(rows, [(("float32", 7, False), {})])
    single, sweep = jax.jit(one), jax.jit(jax.vmap(one))(SWEPT)
    for i in range(5):
        row = jax.tree.map(lambda x: x[i], sweep)  # noqa: B023 - called at once
        values = {name: x[i] for name, x in SWEPT.items()}
        assert_close_by_largest(row, single(values), roundings=4 * 30)


# Places.


def test_init_of_shapes_with_a_sharding():
    where = NamedSharding(mesh_of_four(), PartitionSpec("d"))
    shapes = {"w": jax.ShapeDtypeStruct((8, 3), "float32", sharding=where)}
    for optimizer in OPTIMIZERS.values():
        nu = optax.tree.get(optimizer.init(shapes), "nu")["w"]
        assert nu.sharding.is_equivalent_to(where, 2)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharding(axis_type):
    mesh = mesh_of_four(axis_type)
    with jax.set_mesh(mesh):
        sharded = NamedSharding(mesh, PartitionSpec("d"))
        everywhere = NamedSharding(mesh, PartitionSpec())
        x = {
            "w": jax.device_put(jnp.ones((8, 3)), sharded),
            "b": jax.device_put(jnp.ones(3), everywhere),
        }

        @jax.jit
        def update(x, states):
            return {n: o.update(x, states[n], x) for n, o in IN_FULL.items()}

        everything = {"everything": OPTIMIZERS["everything"].init(x)}
        compiled = jax.jit(lambda x: {n: o.init(x) for n, o in IN_FULL.items()})(x)
        for states in (everything, compiled):
            for state in states.values():
                for name in ("nu", "mu", "momentum"):
                    for leaf in jax.tree.leaves(optax.tree.get(state, name)):
                        its = x["w" if leaf.ndim == 2 else "b"].sharding
                        assert leaf.sharding.is_equivalent_to(its, leaf.ndim)
        for name, (u, new) in update(x, states).items():
            assert describe(new) == describe(states[name])
            assert u["w"].sharding.is_equivalent_to(sharded, 2)
            if name in everything:
                _, eager = IN_FULL[name].update(x, states[name], x)
                assert describe(eager) == describe(states[name])
        program = update.lower(x, states).compile().as_text()
    for collective in ("all-reduce", "all-gather", "all-to-all", "collective-permute"):
        assert collective not in program


def test_shard_map_checks_what_varies():
    """A state is created inside and carried through a scan."""
    x = jnp.arange(24.0).reshape(8, 3)
    spec = PartitionSpec("d")

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh_of_four(), in_specs=spec, out_specs=spec
    )
    def train(x):
        def trained(optimizer):
            def step(carry, _):
                x, state = carry
                updates, state = optimizer.update(x, state, x)
                return (optax.apply_updates(x, updates), state), None

            return jax.lax.scan(step, (x, optimizer.init(x)), length=3)[0][0]

        return each(trained)

    assert all(found.shape == x.shape for found in train(x).values())


# Custom schedules, and numbers that a program's dtype does not hold.


@dataclasses.dataclass
class Halving:
    """A schedule without a hash, like any dataclass that is not frozen."""

    start: float

    def __call__(self, step):
        return self.start * 0.5**step


@pytest.mark.parametrize("make", [rmsprop, conventions.laprop, conventions.dreamer_v3])
def test_a_schedule_without_a_hash(make):
    unhashable, plain = make(Halving(0.1)), make(lambda step: 0.1 * 0.5**step)
    x = {"w": jnp.ones(3)}
    chex.assert_trees_all_equal(run(unhashable, x, 1)[0], run(plain, x, 1)[0])


def test_schedules_of_plain_python():
    x = params()

    def steps(step):
        return 0.1 if step < 2 else 0.01

    def numpy(step):
        return np.where(np.asarray(step) < 2, 0.1, 0.01).item()

    expected, _ = run(rmsprop(lambda t: jnp.where(t < 2, 0.1, 0.01)), x)
    for schedule in (steps, numpy):
        chex.assert_trees_all_close(run(rmsprop(schedule), x)[0], expected, rtol=1e-6)
        optimizer = rmsprop(schedule)
        state = optimizer.init(x)
        with pytest.raises(TypeError) as caught:
            jax.jit(optimizer.update)(x, state)
        message = str(caught.value).split("\n----")[0]
        assert message.startswith(
            "`learning_rate` must be a schedule of JAX operations inside a jit,"
        )
        assert "\n" not in message.strip()


@pytest.mark.parametrize(
    ("value", "got"),
    [(jnp.ones(1), "an array of shape (1,)"), (None, "None"), ("a", "'a'")],
)
def test_a_schedule_that_returns_no_scalar(value, got):
    with pytest.raises(TypeError) as caught:
        run(rmsprop(0.1, lambda step: value), params(), 1)
    assert str(caught.value) == (
        f"`gamma`'s schedule must return a scalar number, got {got}"
    )


def test_momentum_and_weight_decay_by_schedules():
    """Each step uses the schedules' numbers at that step."""
    x, n = params(), 5
    momentum, decay = (lambda t: 0.5 + 0.1 * t), (lambda t: 0.1 / (1 + t))
    optimizer = rmsprop(0.1, momentum=momentum, weight_decay=decay)
    state = optimizer.init(x)
    other = rmsprop(0.1, momentum=0.1, weight_decay=0.1).init(x)
    for t in range(n):
        step = rmsprop(
            0.1, momentum=float(momentum(t)), weight_decay=float(decay(jnp.float32(t)))
        )
        updates, state = optimizer.update(x, state, x)
        expected, other = step.update(x, other, x)
        chex.assert_trees_all_close(updates, expected, rtol=tolerance("float32", 8))


def test_a_constant_schedule_is_as_exact_as_its_number():
    g = jnp.ones(1)
    for gamma in (0.999999, 1 - 1e-8):
        alone, _ = run(scale_by_rmsprop(gamma), g)
        scheduled, _ = run(scale_by_rmsprop(optax.constant_schedule(gamma)), g)
        np.testing.assert_allclose(scheduled, alone, rtol=tolerance("float32", 4))
