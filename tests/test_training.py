"""Tracing a training: its outputs, errors and fingerprint."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_rmsprop.sweeps import _training
from tests.helpers import flag
from tests.sweeps import quiet, raises, square

ROOT = Path(__file__).parents[1]


def test_train_is_traced_once():
    calls = []

    def train(x):
        calls.append(x)
        return {"loss": x}

    quiet(train, {"x": range(50)}, batch_size=3)
    assert len(calls) == 1


def test_train_without_the_axis_name():
    raises(
        TypeError,
        "`train` must take the axes by name: it has no 'gamma'; its arguments are (x), "
        "the axes gamma",
        square,
        {"gamma": [0.9]},
    )
    raises(
        TypeError,
        "`train` must take the axes by name: no axis is called 'learning_rate'; its "
        "arguments are (gamma, learning_rate), the axes gamma",
        lambda gamma, learning_rate: gamma,
        {"gamma": [0.9]},
    )


def test_train_that_returns_no_arrays():
    def returning(value):
        return lambda x: value

    grid = {"x": [1.0]}
    must = "`train` must return an array or a tree of arrays, {}"
    for value, message in (
        ({"loss": 0.5}, "but loss is 0.5"),
        ({"a": {"b": None}}, "but a.b is None"),
        (None, "got None"),
        ({}, "got {}"),
    ):
        raises(TypeError, must.format(message), returning(value), grid)
    raises(
        ValueError,
        "`train` must return arrays with elements, but loss has shape (0,)",
        returning({"loss": jnp.ones(0)}),
        grid,
    )
    raises(
        TypeError,
        "`train` must return numbers, but value is key<fry>; "
        "jax.random.key_data makes numbers of random keys",
        lambda x: jax.random.key(0),
        grid,
    )


def test_train_that_cannot_be_traced():
    def branches(x):
        return {"loss": x if x > 0 else -x}

    line = branches.__code__.co_firstlineno + 1
    raises(
        TypeError,
        "`train` cannot be traced: TracerBoolConversionError at "
        f"test_training.py:{line}; a hyperparameter that decides shapes or branches "
        "must be an axis of Python values (an array of dtype object)",
        branches,
        {"x": [1.0]},
    )


def test_train_that_asks_for_a_number():
    """No other kind of axis would help."""

    def asks(x):
        return {"loss": jnp.float32(float(x))}

    def converts(x):
        return {"loss": jnp.asarray(np.asarray(x))}

    for train in (asks, converts):
        line = train.__code__.co_firstlineno + 1
        raises(
            TypeError,
            f"`train` cannot be traced: at test_training.py:{line} a number is asked "
            "for (float, item, np.array), which is not known while the program is "
            "made; return the array",
            train,
            {"x": [1.0]},
        )


def test_train_whose_shapes_are_swept():
    def wide(rate, width):
        return {"loss": rate * jnp.ones(width).sum()}

    line = wide.__code__.co_firstlineno + 1
    raises(
        TypeError,
        f"`train` cannot be traced: a shape is not known at test_training.py:{line}; "
        "make width an axis of Python values, such as np.array([16, 32], object)",
        wide,
        {"rate": [0.1], "width": [16, 32]},
    )


def test_the_line_is_in_the_callers_own_file():
    """It is not in a library that the caller uses."""

    def train(x):
        return {"loss": optax.cosine_decay_schedule(1.0, -1)(x)}

    line = train.__code__.co_firstlineno + 1
    with pytest.raises(RuntimeError, match=f"raised ValueError at .*.py:{line}: "):
        quiet(train, {"x": [1.0]})


def test_train_that_raises():
    def fails(x):
        raise KeyError("no such file\nand more")

    line = fails.__code__.co_firstlineno + 1
    raises(
        RuntimeError,
        f"`train` raised KeyError at test_training.py:{line}: "
        "'no such file\\nand more'",
        fails,
        {"x": [1.0]},
    )


def in_shard_map(f, data):
    mesh = jax.make_mesh((1,), ("d",))
    one = jax.sharding.PartitionSpec()
    inner = jax.shard_map(
        lambda x: f(x, data), mesh=mesh, in_specs=one, out_specs=one, check_vma=False
    )
    return lambda x: inner(x)


def in_custom_vjp(f, data):
    @jax.custom_vjp
    def inner(x):
        return x

    inner.defvjp(lambda x: (x, x), lambda x, g: (f(x, data) * g,))
    return jax.grad(inner)


def in_custom_jvp(f, data):
    @jax.custom_jvp
    def inner(x):
        return x

    inner.defjvp(lambda x, t: (x[0], f(x[0], data) * t[0]))
    return jax.grad(inner)


def in_pallas(f, data):
    from jax.experimental import pallas as pl

    def kernel(data, x, out):
        out[...] = f(x[...], data[...])

    def inner(x):
        shape = jax.ShapeDtypeStruct((), jnp.float32)
        return pl.pallas_call(kernel, out_shape=shape, interpret=True)(data, x)

    return jax.jit(inner)


# Places where a training may close over an array. In nested functions, JAX stores it
# outside the training's own jaxpr, or as the value of an operand.
PLACES = {
    "open": lambda f, data: lambda x: f(x, data),
    "jit": lambda f, data: jax.jit(lambda x: f(x, data)),
    "jit in jit": lambda f, data: jax.jit(lambda x: jax.jit(lambda y: f(y, data))(x)),
    "vmap": lambda f, data: lambda x: jax.vmap(lambda y: f(y, data))(x[None])[0],
    "scan": lambda f, data: (
        lambda x: jax.lax.scan(lambda y, _: (f(y, data), None), x, length=2)[0]
    ),
    "while": lambda f, data: (
        lambda x: jax.lax.while_loop(lambda y: y < f(y, data), lambda y: y + 1, x)
    ),
    "jit in a loop": lambda f, data: (
        lambda x: jax.lax.fori_loop(0, 3, lambda _, y: jax.jit(f)(y, data), x)
    ),
    "cond": lambda f, data: (
        lambda x: jax.lax.cond(x > 0, lambda y: f(y, data), lambda y: y, x)
    ),
    "checkpoint": lambda f, data: jax.grad(jax.checkpoint(lambda x: f(x, data))),
    "custom_vjp": in_custom_vjp,
    "custom_jvp": in_custom_jvp,
    "shard_map": in_shard_map,
    "pallas": in_pallas,
}


KINDS = {
    "jax": lambda scale: scale * jnp.arange(1000.0),
    "numpy": lambda scale: np.float32(scale) * np.arange(1000, dtype="float32"),
    "scalar": lambda scale: jnp.float32(scale),
    "key": lambda scale: jax.random.key(int(scale)),
}


def fingerprint(train):
    return _training.fingerprint(_training.trace(train, {}, {"x": np.dtype("float32")}))


def product(x, data):
    return (x * jnp.sum(data * data)).astype(jnp.float32)


@pytest.mark.parametrize(
    ("place", "kind"),
    [
        pytest.param(
            place,
            kind,
            marks=() if "jax" == kind or "open" == place else pytest.mark.exhaustive,
        )
        for place in PLACES
        for kind in KINDS
        if (place, kind) != ("pallas", "key")  # Pallas does not accept keys
    ],
)
def test_the_fingerprint_is_of_what_a_training_closes_over(place, kind):
    def of(scale):
        f = product
        data = KINDS[kind](scale)
        if kind == "key":
            f = lambda x, key: product(x, jax.random.normal(key))  # noqa: E731
        inner = PLACES[place](f, data)
        return fingerprint(lambda x: {"loss": inner(x)})

    assert of(1.0) == of(1.0)
    assert of(1.0) != of(2.0)


def test_the_fingerprint_where_jax_makes_arguments_of_constants():
    name = "jax_use_simplified_jaxpr_constants"
    if not hasattr(jax.config, name):
        pytest.skip("JAX 0.8 has no such option")

    def of(scale):
        data = scale * jnp.arange(1000.0)
        inner = jax.jit(lambda x: product(x, data))
        return fingerprint(lambda x: {"loss": inner(x)})

    with flag(name, True):
        assert of(1.0) == of(1.0)
        assert of(1.0) != of(2.0)


@pytest.mark.slow
def test_the_fingerprint_is_the_same_in_every_process(capsys, standard_promotion):
    code = (
        "import numpy as np;"
        "from tests.sweeps import called_back, named_residuals, network;"
        "from jax_rmsprop.sweeps import _training; d = np.dtype('float32');"
        "n = dict(gamma=d, learning_rate=d, seed=np.dtype('int32'));"
        "print([_training.fingerprint(_training.trace(train, {}, n)) for train in"
        " (network, named_residuals, called_back)])"
    )
    other = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    exec(code, {})
    assert capsys.readouterr().out == other
