"""Any argument either works or raises an error of one line that names it."""

import contextlib
import inspect
import re

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_rmsprop import (
    Training,
    conventions,
    diagnose,
    linear,
    load_sweep,
    log,
    log_one_minus,
    plotting,
    points,
    rmsprop,
    scale_by_rmsprop,
    successive_halving,
    summary,
    sweep,
    to_dataframe,
)
from jax_rmsprop.quantization import quantize_state, uint8

pytestmark = pytest.mark.usefixtures("standard_promotion")


class Odd:
    """An object with a repr of several lines, like a pandas table."""

    def __repr__(self):
        return "an odd\nobject\n" + "x" * 200


ODD = [
    None,
    True,
    "fast",
    "",
    b"0.1",
    Odd(),
    [],
    [0.1],
    {},
    {"a": 1},
    (0.5, 0.9),
    float("nan"),
    float("inf"),
    -1.0,
    -1,
    0,
    1,
    0.5,
    10**400,
    1j,
    np.float32(0.5),
    np.nan,
    np.array(0.5),
    np.array([0.5]),
    np.array("a"),
    np.array(None, object),
    np.zeros((2, 0)),
    np.datetime64("2020-01-01"),
    jnp.float32(0.5),
    jnp.ones(2),
    jnp.array(True),
    jax.ShapeDtypeStruct((), "float32"),
    abs,
    lambda step: "a",
    lambda: 0.1,
    range(3),
    set(),
    Exception("raised"),
    type,
]
odd = st.sampled_from(ODD)


@contextlib.contextmanager
def in_one_line(*names):
    """Check that an error inside is one line that names one of the arguments."""
    try:
        yield
    except (TypeError, ValueError, RuntimeError, OSError, ImportError) as error:
        # JAX adds its own lines to errors raised inside a jit.
        message = str(error).split("\n--------------------\n")[0].strip()
        assert "\n" not in message, message
        assert len(message) < 600, message
        assert not names or any(f"`{name}`" in message for name in names), message


def arguments(function):
    return list(inspect.signature(function).parameters)


MAKERS = {
    "scale_by_rmsprop": scale_by_rmsprop,
    "rmsprop": rmsprop,
    **{
        name: getattr(conventions, name)
        for name in sorted({*conventions.CONVENTIONS, *conventions.RECIPES})
    },
}


def traced(function):
    """Trace a function as in a jit, without compiling."""
    jax.eval_shape(lambda: [function(), jnp.zeros(())][1])


@pytest.mark.parametrize("maker", MAKERS)
@given(data=st.data())
def test_arguments_of_an_optimizer(maker, data):
    """Accepted arguments can take a step."""
    make = MAKERS[maker]
    names = arguments(make)
    name = data.draw(st.sampled_from(names))
    value = data.draw(odd)
    needed = {
        n: 0.1
        for n, p in inspect.signature(make).parameters.items()
        if p.default is p.empty and n != name
    }
    if name == "mask" and callable(value):
        return  # errors of the user's function are theirs
    x = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
    with in_one_line(name, *names):
        optimizer = make(**(needed | {name: value}))
        traced(lambda: optimizer.update(x, optimizer.init(x), x))


leaves = st.sampled_from(
    [
        jnp.ones(2),
        jnp.ones((2, 0)),
        jnp.ones(2, "int32"),
        jnp.ones(2, "bfloat16"),
        jnp.ones(2, bool),
        jnp.ones(2, "complex64"),
        np.ones(2),
        np.ones(2, object),
        np.array(["a", "b"]),
        jax.random.key(0),
        jax.ShapeDtypeStruct((2,), "float32"),
        1.0,
        1,
        "text",
        None,
        abs,
        Odd(),
    ]
)
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["w", "b", "ä\n"]), inner, max_size=3),
        st.tuples(inner, inner),
    ),
    max_leaves=4,
)
OPTIMIZERS = {
    "plain": rmsprop(0.1),
    "everything": rmsprop(0.1, centered=True, momentum=0.9, weight_decay=0.1),
    "in one byte": quantize_state(rmsprop(0.1, momentum=0.9), {"nu": uint8(0)}),
    "a convention": conventions.pytorch(0.1, momentum=0.9, weight_decay=0.1),
    "laprop": conventions.laprop(0.1, weight_decay=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@given(tree=trees, gradient=trees)
def test_trees_of_an_optimizer(name, tree, gradient):
    optimizer = OPTIMIZERS[name]

    def all_of_it():
        state = optimizer.init(tree)
        for call in (
            lambda: optimizer.update(tree, state, tree),
            lambda: optimizer.update(gradient, state, gradient),
            lambda: optimizer.update(tree, state),
            lambda: diagnose(optimizer, state, gradient),
        ):
            with in_one_line():
                call()

    with in_one_line():
        traced(all_of_it)


def train(x):
    return {"loss": x * jnp.ones(3)}


axes = st.one_of(
    odd,
    st.lists(
        st.one_of(odd, st.floats(), st.integers(), st.text(max_size=2)), max_size=3
    ),
    st.lists(st.floats(0, 1), max_size=4).map(np.array),
    st.lists(st.integers(-(2**70), 2**70), max_size=3),
)


@given(axis=axes, zipped=st.booleans())
def test_axes_of_a_sweep(axis, zipped):
    with in_one_line("axes", "train", "x", "batch_size"):
        curves = sweep(train, {"x": axis}, zipped=zipped, progress=False)
        for call in (summary, to_dataframe):
            with in_one_line():
                call(curves)
        for draw in (plotting.best_curves, plotting.loss_against_gamma):
            with in_one_line():
                draw(curves)
            plt.close("all")


OF_A_SWEEP = [
    name for name in arguments(sweep) if name not in ("progress", "wait", "save_every")
]


@given(name=st.sampled_from(OF_A_SWEEP), x=odd, steps=st.booleans())
def test_arguments_of_a_sweep(name, x, steps, tmp_path_factory):
    values = {"train": train, "axes": {"x": [1.0]}, "progress": False}
    if steps:
        values |= {"train": Training(train, lambda carry, x: (carry, x)), "steps": 2}
    if name == "store" and isinstance(x, str | bytes):
        return  # a name is a folder of that name
    if name in ("client", "labels", "on_step") and x is None:
        return  # none
    # A user's function raises its own errors.
    step = name == "on_step" and callable(x)
    with (
        contextlib.suppress(Exception)
        if step
        else in_one_line(name, "axes", "train", "step", "init", "a")
    ):
        sweep(**(values | {name: x}))


@given(name=st.sampled_from(["steps", "by", "keep", "over", "maximize"]), x=odd)
def test_arguments_of_successive_halving(name, x):
    training = Training(train, lambda carry, x: (carry, {"loss": x}))
    values = {"steps": [1, 2], "progress": False}
    with in_one_line(name, "by", "maximize"):
        successive_halving(training, {"x": [1.0, 2.0]}, **(values | {name: x}))


@given(x=odd)
def test_arguments_of_a_loaded_sweep(x):
    if not isinstance(x, str | bytes):
        with in_one_line("store"):
            load_sweep(x)


@given(low=odd, high=odd, num=odd)
def test_arguments_of_ranges(low, high, num):
    for make in (linear, log, log_one_minus):
        with in_one_line():
            make(low, high, num)


@given(
    space=st.one_of(odd, st.dictionaries(st.sampled_from(["gamma", "x"]), axes)),
    n=odd,
    method=odd,
    seed=odd,
)
def test_arguments_of_points(space, n, method, seed):
    with in_one_line():
        points(space, 4)
    for arguments in ({"n": n}, {"method": method}, {"seed": seed}):
        with in_one_line():
            points({"x": linear(0, 1)}, **({"n": 4} | arguments))


@given(kept=st.one_of(odd, st.dictionaries(st.sampled_from(["nu", "mü", 1]), odd)))
def test_codecs(kept):
    with in_one_line("codecs"):
        optimizer = quantize_state(rmsprop(0.1), kept)
        optimizer.init(jnp.ones(2))
    with in_one_line("min_size"):
        uint8(kept)


def train_that(what):
    def train(x):
        if isinstance(what, Exception):
            raise what
        return what

    return train


@given(what=st.one_of(odd, trees))
def test_what_a_training_returns(what):
    with in_one_line("train"):
        sweep(train_that(what), {"x": [1.0, 2.0]}, progress=False)


def test_the_check_itself():
    """`in_one_line` fails for bad errors."""
    with pytest.raises(AssertionError), in_one_line("x"):
        raise ValueError("`x` must be\nsomething")
    with pytest.raises(AssertionError), in_one_line("x"):
        raise ValueError("`y` must be something")
    assert re.search("\n", repr(Odd()))
