"""Use with Flax, Equinox, Haiku, Orbax, gymnax and rlax."""

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

from jax_rmsprop import rmsprop, sweep
from jax_rmsprop.quantization import quantize_state, stochastic_rounding, uint8
from tests.frameworks import quietly
from tests.helpers import (
    OPTIMIZERS,
    each,
    mesh_of_four,
    params,
    square,
    states_of,
    tolerance,
    train_each,
    two_or_each,
)

with warnings.catch_warnings():
    # The Flax of JAX 0.8's time asks for a name that JAX had just deprecated.
    warnings.simplefilter("ignore", DeprecationWarning)
    import flax.serialization
    from flax import nnx

pytestmark = pytest.mark.usefixtures("standard_promotion")

FEW = {name: OPTIMIZERS[name] for name in ("everything", "schedules", "in fewer bits")}


# Flax.


def linear(tx):
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


def nnx_step(pairs):
    """One step of each of these models by its own optimizer."""
    for model, optimizer in pairs.values():
        g = nnx.grad(lambda m: (m(jnp.ones((2, 3))) ** 2).mean())(model)
        optimizer.update(model, g)


@two_or_each
def test_nnx(optimizers):
    """Compiled and not, it equals a manual loop; its graph splits and merges."""
    model, _ = linear(OPTIMIZERS["everything"])
    x = {"kernel": model.kernel[...], "bias": model.bias[...]}

    def loss(x):
        return ((jnp.ones((2, 3)) @ x["kernel"] + x["bias"]) ** 2).mean()

    @jax.jit
    def by_hand(x):
        def trained(optimizer, x=x):
            state = optimizer.init(x)
            for _ in range(3):
                updates, state = optimizer.update(jax.grad(loss)(x), state, x)
                x = optax.apply_updates(x, updates)
            return x["kernel"]

        return each(trained, optimizers)

    expected = by_hand(x)
    for step, names in ((nnx.jit(nnx_step), optimizers), (nnx_step, ["everything"])):
        pairs = {name: linear(OPTIMIZERS[name]) for name in names}
        for _ in range(3):
            step(pairs)
        for name, (model, optimizer) in pairs.items():
            nnx.merge(*nnx.split(optimizer))
            # In one byte, a gradient rounded differently may get another code.
            bits = 2**18 if name == "in fewer bits" else 64
            np.testing.assert_allclose(
                model.kernel[...], expected[name], tolerance("float32", bits)
            )


def test_nnx_with_a_part_of_the_model():
    def masked(tx):
        return optax.chain(
            optax.masked(tx, nnx.State({"kernel": True, "bias": False})),
            optax.masked(
                optax.set_to_zero(), nnx.State({"kernel": False, "bias": True})
            ),
        )

    def partition(tx):
        labels = nnx.State({"kernel": "ours", "bias": "rest"})
        return optax.partition({"ours": tx, "rest": optax.set_to_zero()}, labels)

    pairs = {
        (name, how.__name__): linear(how(tx))
        for name, tx in FEW.items()
        for how in (masked, partition)
    }
    model, _ = linear(OPTIMIZERS["everything"])
    step = nnx.jit(nnx_step)
    for _ in range(3):
        step(pairs)
    for trained, _ in pairs.values():
        assert (trained.kernel[...] != model.kernel[...]).any()
        np.testing.assert_array_equal(trained.bias[...], model.bias[...])


def test_nnx_of_an_abstract_model():
    for tx in OPTIMIZERS.values():
        model = nnx.eval_shape(lambda: nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
        nnx.Optimizer(model, tx, wrt=nnx.Param)


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


X, LABELS = jnp.linspace(-1, 1, 8).reshape(4, 2), jnp.array([0, 1, 2, 0])


def test_linen_train_state():
    """With its checkpoint, by Flax's own serialization."""
    from flax import linen
    from flax.training.train_state import TrainState

    model = linen.Dense(3)
    start = model.init(jax.random.key(0), X)
    trains = {
        name: TrainState.create(apply_fn=model.apply, params=start, tx=tx)
        for name, tx in FEW.items()
    }

    def step(train):
        def loss(params):
            return cross_entropy(train.apply_fn(params, X), LABELS)

        value, g = jax.value_and_grad(loss)(train.params)
        return train.apply_gradients(grads=g), value

    @jax.jit
    def steps(trains):
        found = {name: step(train) for name, train in trains.items()}
        return {n: t for n, (t, _) in found.items()}, {
            n: v for n, (_, v) in found.items()
        }

    trains, first = steps(trains)
    for _ in range(30):
        trains, last = steps(trains)
    for name, train in trains.items():
        assert last[name] < first[name]
        saved = flax.serialization.to_bytes(train)
        again = flax.serialization.from_bytes(train, saved)
        chex.assert_trees_all_equal(again.opt_state, train.opt_state)


# Others.


def test_haiku():
    hk = quietly("haiku")
    model = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([8, 3])(x)))
    params = model.init(jax.random.key(0), X)

    def loss(p):
        return cross_entropy(model.apply(p, X), LABELS)

    @jax.jit
    def train(params):
        def trained(optimizer):
            def step(carry, _):
                params, state = carry
                updates, state = optimizer.update(jax.grad(loss)(params), state, params)
                return (optax.apply_updates(params, updates), state), None

            carry = params, optimizer.init(params)
            return loss(jax.lax.scan(step, carry, length=30)[0][0])

        return each(trained, FEW)

    assert all(found < loss(params) for found in train(params).values())


class Model(eqx.Module):
    """A model with functions, a name and a number next to its arrays."""

    layer: eqx.nn.MLP
    scale: jax.Array
    activation: object = jnp.tanh
    name: str = eqx.field(static=True, default="a model")

    def __call__(self, x):
        return self.activation(self.layer(x)) * self.scale


def test_an_equinox_model():
    start = Model(eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(0)), jnp.ones(()))

    def loss(model):
        return ((jax.vmap(model)(X)[:, 0] - 1) ** 2).mean()

    @eqx.filter_jit
    def steps(carries):
        new = {}
        for name, (model, state) in carries.items():
            g = eqx.filter_grad(loss)(model)
            trained = eqx.filter(model, eqx.is_inexact_array)
            updates, state = FEW[name].update(g, state, trained)
            new[name] = eqx.apply_updates(model, updates), state
        return new

    arrays = eqx.filter(start, eqx.is_inexact_array)
    carries = {name: (start, optimizer.init(arrays)) for name, optimizer in FEW.items()}
    for _ in range(50):
        carries = steps(carries)
    for model, _ in carries.values():
        assert loss(model) < loss(start)
        assert model.name == "a model"


# Parameters in bfloat16, rounded stochastically.

HALF = stochastic_rounding(quantize_state(rmsprop(0.01), {"nu": uint8(0)}))


def test_nnx_in_half_precision():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0), param_dtype="bfloat16")
    optimizer = nnx.Optimizer(model, HALF, wrt=nnx.Param)

    def loss(model):
        return cross_entropy(model(X), LABELS)

    @nnx.jit
    def step(model, optimizer):
        value, g = nnx.value_and_grad(loss)(model)
        optimizer.update(model, g)
        return value

    first = step(model, optimizer)
    for _ in range(30):
        last = step(model, optimizer)
    assert last < first
    assert model.kernel[...].dtype == model.bias[...].dtype == "bfloat16"


@pytest.mark.slow
def test_linen_in_half_precision():
    from flax import linen
    from flax.training.train_state import TrainState

    model = linen.Dense(3, param_dtype="bfloat16")
    start = model.init(jax.random.key(0), X)
    train = TrainState.create(apply_fn=model.apply, params=start, tx=HALF)

    @jax.jit
    def step(train):
        def loss(params):
            return cross_entropy(train.apply_fn(params, X), LABELS)

        value, g = jax.value_and_grad(loss)(train.params)
        return train.apply_gradients(grads=g), value

    train, first = step(train)
    for _ in range(30):
        train, last = step(train)
    assert last < first
    assert {p.dtype.name for p in jax.tree.leaves(train.params)} == {"bfloat16"}


@pytest.mark.slow
def test_equinox_in_half_precision():
    """Its own `apply_updates` promotes; Optax's, on the arrays alone, does not."""
    mlp = eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(0), dtype="bfloat16")
    start = model = Model(mlp, jnp.ones((), "bfloat16"))

    def loss(model):
        return ((jax.vmap(model)(X.astype("bfloat16"))[:, 0] - 1) ** 2).mean()

    @eqx.filter_jit
    def step(model, state):
        g = eqx.filter_grad(loss)(model)
        trained = eqx.filter(model, eqx.is_inexact_array)
        updates, state = HALF.update(g, state, trained)
        promoted = eqx.apply_updates(model, updates)
        return (
            eqx.combine(optax.apply_updates(trained, updates), model),
            state,
            promoted,
        )

    state = HALF.init(eqx.filter(start, eqx.is_inexact_array))
    for _ in range(50):
        model, state, promoted = step(model, state)
    assert loss(model) < loss(start)
    assert (model.name, model.activation) == ("a model", jnp.tanh)
    arrays = jax.tree.leaves(eqx.filter(model, eqx.is_array))
    assert {a.dtype.name for a in arrays} == {"bfloat16"}
    assert promoted.scale.dtype == "float32"


def states(optimizers):
    """The optimizers' states after three steps, and their initial states."""
    x = params()
    found = train_each(optimizers, x, jax.tree.map(lambda p: jnp.stack([p] * 3), x))
    begun = states_of(x, optimizers)
    return {name: state for name, (_, state) in found.items()}, begun


@two_or_each
def test_flaxs_and_equinoxs_serialization(optimizers):
    after, begun = states(optimizers)
    for name, state in after.items():
        by_flax = flax.serialization.from_bytes(
            begun[name], flax.serialization.to_bytes(state)
        )
        file = io.BytesIO()
        eqx.tree_serialise_leaves(file, state)
        file.seek(0)
        by_equinox = eqx.tree_deserialise_leaves(file, begun[name])
        for again in (by_flax, by_equinox):
            assert jax.tree.structure(again) == jax.tree.structure(state)
            chex.assert_trees_all_equal(again, state)


@two_or_each
def test_orbax_onto_another_sharding(optimizers, tmp_path):
    mesh = mesh_of_four()
    where = NamedSharding(mesh, PartitionSpec("d"))
    x = {"w": jnp.arange(24.0).reshape(8, 3)}
    found = train_each(optimizers, x, jax.tree.map(lambda p: jnp.stack([p] * 3), x))
    after = {name: state for name, (_, state) in found.items()}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", after)
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(
                s.shape,
                s.dtype,
                sharding=where if s.ndim == 2 else NamedSharding(mesh, PartitionSpec()),
            ),
            after,
        )
        again = checkpointer.restore(tmp_path / "state", abstract)
    chex.assert_trees_all_equal(again, after)

    @jax.jit
    def updates(states):
        return {n: o.update(x, states[n], x)[0] for n, o in optimizers.items()}

    for state in again.values():
        nu = optax.tree.get(state, "nu")["w"]
        assert nu.sharding.is_equivalent_to(where, 2)
    chex.assert_trees_all_close(updates(again), updates(after), rtol=1e-5)


def agent(gamma, learning_rate, seed, make=rmsprop):
    """A Q-network on gymnax's Catch, one step for each environment step."""
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
    """A member is a whole training with its environment, in gymnax and rlax."""
    quietly("gymnax")
    quietly("rlax")
    grid = {"gamma": [0.9, 0.99], "learning_rate": [0.001, 0.01], "seed": range(2)}
    curves = sweep(agent, grid, progress=False, batch_size=8)
    assert curves.rewards.sizes["rewards_dim_0"] == 200
    assert not curves.diverged.any()
    # Catch gives -1 or 1 at the end of each game of nine steps.
    assert (np.abs(curves.rewards).sum("rewards_dim_0") == 200 // 9).all()


@pytest.mark.slow
def test_every_option_in_a_sweep():
    """A row equals the single training up to rounding."""

    def train(learning_rate, gamma):
        def trained(tx):
            def step(carry, _):
                x, state = carry
                updates, state = tx.update(x, state, x)
                return (optax.apply_updates(x, updates), state), square(x)

            x = {"w": jnp.arange(1.0, 7).reshape(2, 3)}
            return jax.lax.scan(step, (x, tx.init(x)), length=5)[1]

        swept = {
            "swept": rmsprop(learning_rate, gamma, centered=True, momentum=0.9),
            **{n: optax.chain(o, optax.scale(learning_rate)) for n, o in FEW.items()},
        }
        return {name: trained(tx) for name, tx in swept.items()}

    rates, gammas = [0.5, 1.0, 2.0], [0.9, 0.99]
    grid = {"learning_rate": rates, "gamma": gammas}
    curves = sweep(train, grid, progress=False)
    single = jax.jit(train)
    for rate in rates:
        for gamma in gammas:
            for name, alone in single(np.float32(rate), np.float32(gamma)).items():
                row = curves[name].sel(learning_rate=rate, gamma=gamma)
                bits = 2**18 if name == "in fewer bits" else 2**8
                np.testing.assert_allclose(row, alone, tolerance("float32", bits))
