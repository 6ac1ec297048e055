"""Bad input: one line that names the argument, the value and what is allowed."""

import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_rmsprop import rmsprop, scale_by_rmsprop

NAN = float("nan")
RATE = "a finite number >= 0 or a schedule (a function from step to number)"
GAMMA = "in [0, 1] or a schedule (a function from step to number)"
MASK = "`mask` must be a tree of bools, or a function from the parameters to one"
WRONG = [
    ({"learning_rate": "0.1"}, TypeError, f"`learning_rate` must be {RATE}, got '0.1'"),
    ({"learning_rate": None}, TypeError, f"`learning_rate` must be {RATE}, got None"),
    ({"learning_rate": True}, TypeError, f"`learning_rate` must be {RATE}, got True"),
    ({"learning_rate": -0.1}, ValueError, f"`learning_rate` must be {RATE}, got -0.1"),
    ({"learning_rate": NAN}, ValueError, f"`learning_rate` must be {RATE}, got nan"),
    ({"gamma": 1.5}, ValueError, f"`gamma` must be {GAMMA}, got 1.5"),
    ({"gamma": -0.1}, ValueError, f"`gamma` must be {GAMMA}, got -0.1"),
    ({"gamma": NAN}, ValueError, f"`gamma` must be {GAMMA}, got nan"),
    ({"gamma": np.float16(2)}, ValueError, f"`gamma` must be {GAMMA}, got 2.0"),
    ({"gamma": jnp.asarray(2)}, ValueError, f"`gamma` must be {GAMMA}, got 2.0"),
    ({"gamma": 0.9j}, TypeError, f"`gamma` must be {GAMMA}, got 0.9j"),
    ({"eps": -1e-8}, ValueError, "`eps` must be a finite number >= 0, got -1e-08"),
    ({"eps": NAN}, ValueError, "`eps` must be a finite number >= 0, got nan"),
    ({"eps": float("inf")}, ValueError, "`eps` must be a finite number >= 0, got inf"),
    (
        {"initial_scale": -1},
        ValueError,
        "`initial_scale` must be a finite number >= 0, got -1.0",
    ),
    (
        {"momentum": 1.1},
        ValueError,
        "`momentum` must be in [0, 1] or a schedule (a function from step to number), "
        "got 1.1",
    ),
    (
        {"weight_decay": -1.0},
        ValueError,
        "`weight_decay` must be a finite number >= 0 or a schedule (a function from "
        "step to number), got -1.0",
    ),
    (
        {"gamma": jnp.array([0.9, 0.99])},
        TypeError,
        "`gamma` must be a scalar, got an array of shape (2,); to run several values "
        "at once, use jax.vmap",
    ),
    ({"centered": 1}, TypeError, "`centered` must be True or False, got 1"),
    ({"eps_in_sqrt": "no"}, TypeError, "`eps_in_sqrt` must be True or False, got 'no'"),
    (
        {"centered": True, "bias_correction": True},
        ValueError,
        "`bias_correction` must be False if `centered` is True, got True: the variance "
        "after the first step is zero by construction",
    ),
    ({"mask": {"w": 1}}, TypeError, f"{MASK}, got 1"),
    (
        {"mask": np.array([True, False])},
        TypeError,
        f"{MASK}, got array([ True, False])",
    ),
    (
        {"nesterov": True},
        ValueError,
        "`nesterov` must be False if `momentum` is None, got True",
    ),
]


@pytest.mark.parametrize(("arguments", "error", "message"), WRONG, ids=str)
def test_wrong_arguments(arguments, error, message):
    assert "\n" not in message
    message = f"^{re.escape(message)}$"
    with pytest.raises(error, match=message):
        rmsprop(**{"learning_rate": 0.1} | arguments)
    if arguments.keys() <= inspect.signature(scale_by_rmsprop).parameters.keys():
        with pytest.raises(error, match=message):
            scale_by_rmsprop(**arguments)


def test_traced_values_are_not_checked_but_their_shape_is():
    g = jnp.ones(3)

    @jax.jit
    def first_update(gamma):
        optimizer = scale_by_rmsprop(gamma)
        return optimizer.update(g, optimizer.init(g))[0]

    assert jnp.isfinite(first_update(0.5)).all()
    first_update(2.0)
    with pytest.raises(TypeError, match="must be a scalar, got an array of shape"):
        first_update(jnp.ones(2))


@pytest.mark.parametrize("make", [scale_by_rmsprop, functools.partial(rmsprop, 0.1)])
@pytest.mark.parametrize(
    ("leaf", "dtype"),
    [(np.arange(3), "int32"), (7, "int32"), (True, "bool"), (np.uint8(1), "uint8")],
)
def test_leaves_that_are_not_floating_point(make, leaf, dtype):
    message = (
        f"RMSProp needs floating-point or complex leaves, but ['a'][1] is {dtype}; "
        "leave it out with optax.masked or by filtering the tree"
    )
    with pytest.raises(TypeError) as raised:
        make().init({"a": [jnp.ones(2), leaf]})
    assert str(raised.value) == message


START = "the gradient does not match the optimizer state"
MISMATCHES = [
    (
        {"w": jnp.ones((2, 2)), "b": jnp.ones(3)},
        f"{START} at ['w']: the gradient has shape (2, 2), the state has shape (2,)",
    ),
    (
        {"w": jnp.ones(()), "b": jnp.ones(3)},
        f"{START} at ['w']: the gradient has shape (), the state has shape (2,)",
    ),
    (
        {"w": jnp.ones(2)},
        f"{START} at ['b']: the gradient has no such leaf, the state has one of shape "
        "(3,)",
    ),
    (
        {"w": jnp.ones(2), "b": None},
        f"{START} at ['b']: the gradient has no such leaf, the state has one of shape "
        "(3,)",
    ),
    (
        {"w": jnp.ones(2), "b": jnp.ones(3), "c": jnp.ones(4)},
        f"{START} at ['c']: the gradient has shape (4,), the state has no such leaf",
    ),
    (
        {"w": jnp.ones(2), "b": jnp.ones(3), "c": ()},
        f"{START}: the leaves agree, but the containers do not; the gradient is "
        "PyTreeDef({'b': *, 'c': (), 'w': *}), the state is "
        "PyTreeDef({'b': *, 'w': *})",
    ),
]


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
    "make",
    [scale_by_rmsprop, functools.partial(rmsprop, 0.1, momentum=0.9, centered=True)],
)
@pytest.mark.parametrize(("gradient", "message"), MISMATCHES)
def test_a_gradient_that_does_not_match_the_state(make, gradient, message, jit):
    optimizer = make()
    state = optimizer.init({"w": jnp.ones(2), "b": jnp.ones(3)})
    update = jax.jit(optimizer.update) if jit else optimizer.update
    with pytest.raises(ValueError, match="gradient") as raised:
        update(gradient, state)
    assert str(raised.value) == message


def test_a_single_array_has_a_name_too():
    optimizer = scale_by_rmsprop()
    with pytest.raises(ValueError, match=r"state at the root: the gradient has shape"):
        optimizer.update(jnp.ones(3), optimizer.init(jnp.ones(2)))


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("mask", [None, True])
def test_decay_without_parameters(decoupled, mask):
    optimizer = rmsprop(
        0.1, weight_decay=0.1, decoupled_weight_decay=decoupled, mask=mask
    )
    message = (
        "`params` must be passed to `update` when `weight_decay` is not 0, got None"
    )
    with pytest.raises(ValueError, match="params") as raised:
        optimizer.update(jnp.ones(2), optimizer.init(jnp.ones(2)))
    assert str(raised.value) == message
