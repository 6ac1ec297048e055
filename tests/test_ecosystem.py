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
from jax.sharding import NamedSharding, PartitionSpec

from jax_rmsprop import (
    conventions,
    population,
    rmsprop,
    scale_by_rmsprop,
    sweep,
)
from jax_rmsprop.quantization import bfloat16, int8, quantize_state, uint8
from tests.conftest import SWITCHES, mesh_of_four, tolerance
from tests.frameworks import quietly

with warnings.catch_warnings():
    # The Flax of JAX 0.8's time asks for a name that JAX had just deprecated.
    warnings.simplefilter("ignore", DeprecationWarning)
    import flax.serialization
    from flax import nnx

pytestmark = pytest.mark.usefixtures("standard_promotion")

IN_FEWER_BITS = {
    "nu": uint8(0),
    "mu": bfloat16(),
    "trace": int8(0),
}


def in_fewer_bits(codecs, **options):
    return quantize_state(rmsprop(0.01, **options), codecs)


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
        in_fewer_bits, IN_FEWER_BITS, centered=True, momentum=0.9
    ),
    "one byte": functools.partial(in_fewer_bits, {"nu": uint8(0)}),
    "a convention": functools.partial(conventions.pytorch, 0.01, momentum=0.9),
}
make = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES.keys())
FEW = ["everything", "schedules", "in fewer bits"]
few = pytest.mark.parametrize("make", [MAKES[name] for name in FEW], ids=FEW)


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
    mesh = mesh_of_four()
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


@few
@pytest.mark.parametrize("how", ["masked", "partition"])
def test_nnx_with_a_part_of_the_model(make, how):
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    ours = {"kernel": True, "bias": False}
    if how == "masked":
        tx = optax.chain(
            optax.masked(make(), nnx.State(ours)),
            optax.masked(
                optax.set_to_zero(), nnx.State({"kernel": False, "bias": True})
            ),
        )
    else:
        labels = {"kernel": "ours", "bias": "rest"}
        tx = optax.partition(
            {"ours": make(), "rest": optax.set_to_zero()}, nnx.State(labels)
        )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model, nnx.Param)))

    @nnx.jit
    def step(model, optimizer):
        x = jnp.ones((2, 3))
        optimizer.update(model, nnx.grad(lambda m: (m(x) ** 2).mean())(model))

    for _ in range(3):
        step(model, optimizer)
    assert (model.kernel[...] != before["kernel"]).any()
    np.testing.assert_array_equal(model.bias[...], before["bias"])


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
    mesh = mesh_of_four()
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


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@few
def test_linen_train_state(make):
    """And its checkpoint, by Flax's own serialization."""
    from flax import linen
    from flax.training.train_state import TrainState

    model, x = linen.Dense(3), jnp.linspace(-1, 1, 8).reshape(4, 2)
    labels = jnp.array([0, 1, 2, 0])
    train = TrainState.create(
        apply_fn=model.apply, params=model.init(jax.random.key(0), x), tx=make()
    )

    @jax.jit
    def step(train):
        def loss(params):
            return cross_entropy(train.apply_fn(params, x), labels)

        value, g = jax.value_and_grad(loss)(train.params)
        return train.apply_gradients(grads=g), value

    train, first = step(train)
    for _ in range(30):
        train, last = step(train)
    assert last < first
    saved = flax.serialization.to_bytes(train)
    again = flax.serialization.from_bytes(train, saved)
    chex.assert_trees_all_equal(again.opt_state, train.opt_state)


@few
def test_haiku(make):
    hk = quietly("haiku")

    model = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([8, 3])(x)))
    x, labels = jnp.linspace(-1, 1, 8).reshape(4, 2), jnp.array([0, 1, 2, 0])
    params, optimizer = model.init(jax.random.key(0), x), make()
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        value, g = jax.value_and_grad(
            lambda p: cross_entropy(model.apply(p, x), labels)
        )(params)
        updates, state = optimizer.update(g, state, params)
        return optax.apply_updates(params, updates), state, value

    params, state, first = step(params, state)
    for _ in range(30):
        params, state, last = step(params, state)
    assert last < first


class Model(eqx.Module):
    """With functions, a name and a number beside its arrays."""

    layer: eqx.nn.MLP
    scale: jax.Array
    activation: object = jnp.tanh
    name: str = eqx.field(static=True, default="a model")

    def __call__(self, x):
        return self.activation(self.layer(x)) * self.scale


@few
def test_an_equinox_model(make):
    model = Model(eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(0)), jnp.ones(()))
    optimizer = make()
    state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
    x = jnp.linspace(-1, 1, 8).reshape(4, 2)

    @eqx.filter_jit
    def step(model, state):
        def loss(model):
            return ((jax.vmap(model)(x)[:, 0] - 1) ** 2).mean()

        value, g = eqx.filter_value_and_grad(loss)(model)
        trained = eqx.filter(model, eqx.is_inexact_array)
        updates, state = optimizer.update(g, state, trained)
        return eqx.apply_updates(model, updates), state, value

    model, state, first = step(model, state)
    for _ in range(50):
        model, state, last = step(model, state)
    assert last < first
    assert model.name == "a model"


def agent(gamma, learning_rate, seed, make=rmsprop):
    """A Q-network on gymnax's Catch, one step for each of the environment's."""
    import gymnax
    import rlax

    environment, settings = gymnax.make("Catch-bsuite")
    keys = jax.random.split(jax.random.key(seed), 3)
    seen, world = environment.reset(keys[0], settings)
    first = seen.size
    params = {
        "w": jax.random.normal(keys[1], (first, 16)) / first**0.5,
        "v": jnp.zeros((16, environment.num_actions)),
    }
    optimizer = make(learning_rate=learning_rate, gamma=gamma)

    def values(p, seen):
        return jnp.tanh(seen.ravel() @ p["w"]) @ p["v"]

    def step(carry, key):
        params, state, seen, world = carry
        explore, act, move = jax.random.split(key, 3)
        action = jnp.where(
            jax.random.uniform(explore) < 0.2,
            jax.random.randint(act, (), 0, environment.num_actions),
            values(params, seen).argmax(),
        )
        after, world, reward, done, _, _ = environment.step(
            move, world, action, settings
        )

        def loss(p):
            error = rlax.q_learning(
                values(p, seen), action, reward, 1.0 - done, values(p, after)
            )
            return error**2

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state, after, world), reward

    start = params, optimizer.init(params), seen, world
    _, rewards = jax.lax.scan(step, start, jax.random.split(keys[2], 200))
    return {"rewards": rewards}


def test_a_sweep_of_agents():
    """A whole training with its environment as one member, in gymnax and rlax."""
    quietly("gymnax")
    quietly("rlax")
    grid = {"gamma": [0.9, 0.99], "learning_rate": [0.001, 0.01], "seed": range(2)}
    curves = sweep(agent, grid, progress=False, batch_size=8)
    assert curves.rewards.sizes["rewards_dim_0"] == 200
    assert not curves.diverged.any()
    # Catch gives -1 or 1 at the end of each game of nine steps.
    assert (np.abs(curves.rewards).sum("rewards_dim_0") == 200 // 9).all()


# As members: in a sweep's program, and side by side.


@few
def test_every_option_in_a_sweep(make):
    """A row is the training by itself, but for roundings."""

    def train(learning_rate, gamma):
        tx = optax.chain(make(), optax.scale(1.0))
        if make is not MAKES["schedules"]:
            tx = optax.chain(make(gamma=gamma), optax.scale(learning_rate))

        def step(carry, _):
            x, state = carry
            updates, state = tx.update(x, state, x)
            return (optax.apply_updates(x, updates), state), square(x)

        x = {"w": jnp.arange(1.0, 7).reshape(2, 3)}
        return jax.lax.scan(step, (x, tx.init(x)), length=5)[1]

    rates, gammas = [0.5, 1.0, 2.0], [0.9, 0.99]
    grid = {"learning_rate": rates, "gamma": gammas}
    curves = sweep(train, grid, progress=False)
    bits = 2**18 if make is MAKES["in fewer bits"] else 2**8
    for rate in rates:
        for gamma in gammas:
            alone = jax.jit(train)(np.float32(rate), np.float32(gamma))
            row = curves.value.sel(learning_rate=rate, gamma=gamma)
            np.testing.assert_allclose(row, alone, tolerance("float32", bits))


@pytest.mark.parametrize(
    ("options", "codecs"),
    [
        ({"centered": True, "momentum": 0.9, "nesterov": True}, {}),
        ({"bias_correction": True}, {}),
        ({"momentum": 0.9, "lr_in_momentum": False, "weight_decay": 0.1}, {}),
        ({"centered": True, "momentum": 0.9}, IN_FEWER_BITS),
    ],
    ids=["centered", "corrected", "decays", "in fewer bits"],
)
def test_every_option_in_a_population(options, codecs):
    def make(learning_rate):
        return quantize_state(rmsprop(learning_rate, **options), codecs)

    rates = [0.1, 0.01]
    optimizer = population(make, {"learning_rate": rates})
    x = {"w": jnp.arange(1.0, 7).reshape(2, 3)}
    updates, _ = run(optimizer, x, update=jax.jit(optimizer.update))
    for i, rate in enumerate(rates):
        each = jax.tree.map(lambda p: p[i], x)  # noqa: B023
        one = make(learning_rate=rate)
        alone, _ = run(one, each, update=jax.jit(one.update))
        bits = 2**18 if codecs else 2**6
        chex.assert_trees_all_close(
            jax.tree.map(lambda u: u[i], updates),  # noqa: B023
            alone,
            rtol=tolerance("float32", bits),
        )


def square(x):
    return sum((leaf**2).sum() for leaf in jax.tree.leaves(x))


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
    "scale_by_trust_ratio": lambda tx: optax.chain(tx, optax.scale_by_trust_ratio()),
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


@pytest.mark.skipif(not hasattr(optax.contrib, "galore"), reason="since Optax 0.2.8")
def test_galore():
    """It passes no parameters on, so there is no decay."""
    optimizer = optax.contrib.scale_by_galore(
        rank=1, base_optimizer=MAKES["in fewer bits"]()
    )
    x = {"w": jnp.arange(1.0, 7).reshape(2, 3)}
    updates, _ = run(optimizer, x, update=jax.jit(optimizer.update))
    assert square(optax.apply_updates(x, updates)) < square(x)


@pytest.mark.parametrize("name", ["everything", "in fewer bits"])
def test_aggregating(name):
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
    optimizer = aggregating.process(optax.identity(), mean, MAKES[name]())
    x = {"w": jnp.arange(1.0, 7).reshape(2, 3)}
    each = jax.tree.map(lambda g: jnp.stack([g, 3 * g]), x)
    updates, _ = optimizer.update(each, optimizer.init(x), x)
    alone = MAKES[name]()
    twice = jax.tree.map(lambda g: 2 * g, x)
    expected, _ = alone.update(twice, alone.init(x), x)
    chex.assert_trees_all_equal(updates, expected)


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


# What Optax's tests of its contributions ask of each of them.

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


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["plain", "corrected", "in fewer bits"])
def test_it_converges(name, target):
    """From Optax's starting points, within its tolerance of 0.03.

    With a constant rate RMSProp ends in steps of the rate's size, so it falls here.
    """
    start, end, loss = TARGETS[target]

    def distance(x):
        return square(jax.tree.map(jnp.subtract, x, end))

    tx = optax.chain(MAKES[name](), SLOWER)

    def step(carry, _):
        x, state = carry
        updates, state = tx.update(jax.grad(loss or distance)(x), state, x)
        return (optax.apply_updates(x, updates), state), None

    state = optax.tree.map_params(tx, lambda v: v, tx.init(start))
    (x, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=20_000))((start, state))
    chex.assert_trees_all_close(x, end, rtol=3e-2, atol=3e-2)


# The rate of 0.01 falls to nothing at the end.
SLOWER = optax.scale_by_schedule(optax.cosine_decay_schedule(1.0, 20_000))


# JAX's own switches.


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


@pytest.mark.parametrize(
    ("switch", "name"),
    [
        *((switch, "everything") for switch in SWITCHES),
        # Optax's own schedules mix their types under strict promotion.
        *((switch, "schedules") for switch in ("disable_jit", "check_tracer_leaks")),
        *((switch, "schedules") for switch in ("enable_x64", "an explicit mesh")),
        *((switch, "one byte") for switch in ("disable_jit", "an explicit mesh")),
    ],
)
def test_switches(switch, name):
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
    on = mesh_of_four()
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
