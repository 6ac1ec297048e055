"""In other people's hands: frameworks, checkpoints, wrappers, JAX's own switches."""

import functools
import io
import warnings

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_rmsprop import conventions, population, rmsprop, scale_by_rmsprop, storage
from tests.conftest import flag, tolerance

with warnings.catch_warnings():
    # The Flax of JAX 0.8's time asks for a name that JAX had just deprecated.
    warnings.simplefilter("ignore", DeprecationWarning)
    import flax.serialization
    from flax import nnx

pytestmark = pytest.mark.usefixtures("standard_promotion")

IN_FEWER_BITS = {
    "nu": storage.uint8(0),
    "mu": storage.bfloat16(),
    "trace": storage.int8(0),
}
MAKES = {
    "plain": functools.partial(rmsprop, 0.01),
    "everything": functools.partial(
        rmsprop, 0.01, centered=True, momentum=0.9, nesterov=True, weight_decay=0.1
    ),
    "corrected": functools.partial(rmsprop, 0.01, bias_correction=True),
    "schedules": functools.partial(
        rmsprop,
        optax.cosine_decay_schedule(0.1, 100),
        optax.linear_schedule(0.5, 0.99, 100),
        momentum=optax.linear_schedule(0.5, 0.9, 100),
        weight_decay=optax.constant_schedule(0.01),
    ),
    "in fewer bits": functools.partial(
        rmsprop, 0.01, centered=True, momentum=0.9, storage=IN_FEWER_BITS
    ),
    "one byte": functools.partial(rmsprop, 0.01, storage={"nu": storage.uint8(0)}),
    "a convention": functools.partial(conventions.pytorch, 0.01, momentum=0.9),
}
make = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES.keys())


def params():
    return {"w": jnp.arange(6.0).reshape(2, 3) - 2, "b": jnp.ones(3)}


def run(optimizer, x, n=3, update=None):
    """The updates of n steps and the last state; the gradient is the parameters."""
    state = optimizer.init(x)
    for _ in range(n):
        updates, state = (update or optimizer.update)(x, state, x)
    return updates, state


# Shapes and trees.


@make
def test_init_of_shapes(make):
    optimizer = make()
    shapes = jax.eval_shape(params)
    chex.assert_trees_all_equal(optimizer.init(shapes), optimizer.init(params()))


@make
def test_init_of_shapes_with_a_sharding(make):
    mesh = jax.make_mesh((4,), ("d",), (AxisType.Auto,))
    where = NamedSharding(mesh, PartitionSpec("d"))
    state = make().init({"w": jax.ShapeDtypeStruct((8, 3), "float32", sharding=where)})
    nu = optax.tree.get(state, "nu")["w"]
    assert nu.sharding.is_equivalent_to(where, 2)


@make
@pytest.mark.parametrize(
    "tree", [{}, [], {"a": jnp.ones((3, 0)), "w": jnp.ones((3, 2))}], ids=str
)
def test_trees_without_leaves_or_elements(make, tree):
    for optimizer in (make(), optax.chain(optax.clip(1.0), make())):
        state = optimizer.init(tree)
        updates, state = optimizer.update(tree, state, tree)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, tree)


@pytest.mark.parametrize("tree", [{}, {"a": jnp.ones((2, 0))}], ids=str)
def test_a_population_without_elements(tree):
    optimizer = population(rmsprop, {"learning_rate": [0.1, 0.2]})
    updates, _ = run(optimizer, tree)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, tree)
    shapes = {"w": jax.ShapeDtypeStruct((2, 3), "float32")}
    chex.assert_trees_all_equal(
        optimizer.init(shapes), optimizer.init({"w": jnp.zeros((2, 3))})
    )


@make
def test_optax_finds_what_is_like_the_parameters(make):
    """And with it everything that shards, masks or averages a state."""
    optimizer, x = make(), params()
    _, state = run(optimizer, x)
    marked = optax.tree_utils.tree_map_params(
        optimizer, lambda s, p: s.shape == p.shape, state, x
    )
    found = [m for m in jax.tree.leaves(marked) if isinstance(m, bool)]
    assert all(found)
    assert len(found) >= 2


@make
def test_optax_gets_and_sets_by_name(make):
    optimizer, x = make(), params()
    _, state = run(optimizer, x)
    nu = optax.tree.get(state, "nu")
    chex.assert_trees_all_equal_shapes(nu, x)
    zero = jax.tree.map(jnp.zeros_like, nu)
    chex.assert_trees_all_equal(
        optax.tree.get(optax.tree.set(state, nu=zero), "nu"), zero
    )


# Frameworks.


@make
def test_nnx(make):
    def trained(tx, compiled):
        model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

        def step(model, optimizer):
            x = jnp.ones((2, 3))
            optimizer.update(model, nnx.grad(lambda m: (m(x) ** 2).mean())(model))

        step = nnx.jit(step) if compiled else step
        for _ in range(3):
            step(model, optimizer)
        graph, state = nnx.split(optimizer)
        nnx.merge(graph, state)
        return model.kernel[...]

    def by_hand(tx):
        model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
        x = {"kernel": model.kernel[...], "bias": model.bias[...]}
        state = tx.init(x)

        def loss(x):
            return ((jnp.ones((2, 3)) @ x["kernel"] + x["bias"]) ** 2).mean()

        for _ in range(3):
            updates, state = tx.update(jax.grad(loss)(x), state, x)
            x = optax.apply_updates(x, updates)
        return x["kernel"]

    # In one byte a gradient that rounds otherwise may round to another code.
    bits = 2**18 if make is MAKES["in fewer bits"] else 64
    for compiled in (False, True):
        np.testing.assert_allclose(
            trained(make(), compiled), by_hand(make()), tolerance("float32", bits)
        )


@make
def test_nnx_of_an_abstract_model(make):
    model = nnx.eval_shape(lambda: nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    nnx.Optimizer(model, make(), wrt=nnx.Param)


@make
def test_flax_serialization(make):
    optimizer, x = make(), params()
    _, state = run(optimizer, x)
    again = flax.serialization.from_bytes(
        optimizer.init(x), flax.serialization.to_bytes(state)
    )
    chex.assert_trees_all_equal(again, state)


@make
def test_equinox_serialization(make):
    optimizer, x = make(), params()
    _, state = run(optimizer, x)
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, state)
    file.seek(0)
    chex.assert_trees_all_equal(
        eqx.tree_deserialise_leaves(file, optimizer.init(x)), state
    )


@make
def test_orbax_onto_another_sharding(make, tmp_path):
    mesh = jax.make_mesh((4,), ("d",), (AxisType.Auto,))
    where = NamedSharding(mesh, PartitionSpec("d"))
    optimizer = make()
    x = {"w": jnp.arange(24.0).reshape(8, 3)}
    _, state = run(optimizer, x)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(
                s.shape,
                s.dtype,
                sharding=where if s.ndim == 2 else NamedSharding(mesh, PartitionSpec()),
            ),
            state,
        )
        again = checkpointer.restore(tmp_path / "state", abstract)
    chex.assert_trees_all_equal(again, state)
    assert optax.tree.get(again, "nu")["w"].sharding.is_equivalent_to(where, 2)
    chex.assert_trees_all_close(
        optimizer.update(x, again, x)[0], optimizer.update(x, state, x)[0], rtol=1e-5
    )


# Optax's wrappers: with each of them the optimizer goes downhill.
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
}


def square(x):
    return sum((leaf**2).sum() for leaf in jax.tree.leaves(x))


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", ["everything", "in fewer bits"])
def test_optax_wrappers(name, wrapper):
    optimizer = WRAPPERS[wrapper](MAKES[name]())
    x = {"w": jnp.arange(1.0, 7).reshape(2, 3), "b": jnp.ones(3)}
    state, before = optimizer.init(x), square(x)

    @jax.jit
    def step(x, state):
        value, g = jax.value_and_grad(square)(x)
        extra = {"value": value} if wrapper == "reduce_on_plateau" else {}
        updates, state = optimizer.update(g, state, x, **extra)
        return optax.apply_updates(x, updates), state

    for _ in range(10):
        x, state = step(x, state)
    assert square(x) < before


@pytest.mark.parametrize("name", ["everything", "in fewer bits"])
def test_lookahead(name):
    optimizer = optax.lookahead(MAKES[name](), sync_period=2, slow_step_size=0.5)
    x = optax.LookaheadParams.init_synced({"w": jnp.arange(1.0, 7).reshape(2, 3)})
    state, before = optimizer.init(x), square(x.slow)
    for _ in range(10):
        g = jax.grad(square)(x.fast)
        updates, state = jax.jit(optimizer.update)(g, state, x)
        x = optax.apply_updates(x, updates)
    assert square(x.slow) < before


def test_inject_hyperparams_beside_bfloat16_parameters():
    """README's pitfall: by default it makes bfloat16 of gamma too."""
    x = {"w": jnp.ones((2, 3), "bfloat16")}
    make = functools.partial(optax.inject_hyperparams, rmsprop)
    careless = make()(learning_rate=0.1, gamma=0.999)
    assert careless.init(x).hyperparams["gamma"] == 1
    careful = make(hyperparam_dtype=jnp.float32)(learning_rate=0.1, gamma=0.999)
    updates, state = run(careful, x)
    assert state.hyperparams["gamma"] == np.float32(0.999)
    expected, _ = run(rmsprop(np.float32(0.1), np.float32(0.999)), x)
    chex.assert_trees_all_equal(updates, expected)


# JAX's own switches.


def mesh(kind):
    return jax.set_mesh(jax.make_mesh((4,), ("d",), (kind,)))


SWITCHES = {
    "disable_jit": jax.disable_jit,
    "debug_nans": lambda: jax.debug_nans(True),
    "debug_infs": lambda: jax.debug_infs(True),
    "check_tracer_leaks": jax.checking_leaks,
    "strict promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "matmul precision": lambda: jax.default_matmul_precision("float32"),
    "enable_x64": lambda: flag("jax_enable_x64", True),
    "an automatic mesh": lambda: mesh(AxisType.Auto),
    "an explicit mesh": lambda: mesh(AxisType.Explicit),
}


def case(make):
    """The same steps outside a jit, in a scan, and in one for members."""
    x = {"w": (jnp.arange(6, dtype="float32") - 2).reshape(2, 3)}
    optimizer = make()
    eager, _ = run(optimizer, x)

    def scanned(x):
        def step(state, _):
            updates, state = optimizer.update(x, state, x)
            return state, updates

        _, updates = jax.lax.scan(step, optimizer.init(x), length=3)
        return jax.tree.map(lambda u: u[-1], updates)

    many = jax.vmap(scanned)(jax.tree.map(lambda p: jnp.stack([p, p]), x))
    return eager, jax.jit(scanned)(x), jax.tree.map(lambda u: u[1], many)


@functools.cache
def usual(make):
    return case(make)


@pytest.mark.parametrize("name", ["everything", "schedules", "one byte"])
@pytest.mark.parametrize("switch", SWITCHES)
def test_switches(switch, name):
    if (switch, name) == ("strict promotion", "schedules"):
        return  # Optax's own schedules mix their types
    expected = usual(MAKES[name])
    with SWITCHES[switch]():
        found = case(MAKES[name])
    # Without jit every operation rounds by itself.
    chex.assert_trees_all_close(found, expected, rtol=tolerance("float32", 2**8))


@make
def test_shard_map_checks_what_varies(make):
    """With a state that is made inside and carried through a scan."""
    optimizer = make()
    x = jnp.arange(24.0).reshape(8, 3)
    on = jax.make_mesh((4,), ("d",), (AxisType.Auto,))
    spec = PartitionSpec("d")

    @jax.jit
    @functools.partial(jax.shard_map, mesh=on, in_specs=spec, out_specs=spec)
    def train(x):
        def step(carry, _):
            x, state = carry
            updates, state = optimizer.update(x, state, x)
            return (optax.apply_updates(x, updates), state), None

        return jax.lax.scan(step, (x, optimizer.init(x)), length=3)[0][0]

    assert train(x).shape == x.shape


# Numbers that a program's type does not hold, and schedules of one's own.


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
            "`learning_rate` must be a schedule of JAX operations where it is compiled,"
        )
        assert "\n" not in message.strip()


@pytest.mark.parametrize(
    ("value", "got"),
    [(jnp.ones(1), "an array of shape (1,)"), (None, "None"), ("a", "'a'")],
)
def test_a_schedule_that_returns_no_scalar(value, got):
    with pytest.raises(TypeError) as caught:
        rmsprop(0.1, lambda step: value).init(params())
    assert str(caught.value) == (
        f"`gamma`'s schedule must return a scalar number, got {got}"
    )


def test_momentum_and_weight_decay_by_schedules():
    """Each step is that of the numbers that the schedules have there."""
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
