"""Shared helpers: tolerances, options and their combinations, optimizers."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import socket

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType

from jax_rmsprop import conventions, rmsprop, scale_by_rmsprop
from jax_rmsprop.quantization import bfloat16, int8, quantize_state, uint8


def tolerance(dtype, roundings=1.0):
    """The largest relative error of this number of roundings of a dtype.

    One rounding is half the spacing eps of the dtype's numbers; a complex number has
    the precision of its parts.
    """
    return float(roundings * jnp.finfo(dtype).eps / 2)


# Combinations of options.


def axis(name, *values):
    """One option's values, each as keywords."""
    return [{name: value} for value in values]


def every(*axes):
    """Every combination of one choice from each axis."""
    return [
        functools.reduce(dict.__or__, choice) for choice in itertools.product(*axes)
    ]


def pairs(*axes):
    """A subset of combinations that still has every pair of choices of two axes.

    Greedy: repeatedly take the combination with the most new pairs.
    """
    wanted = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(range(len(axes)), 2)
        for i, j in itertools.product(range(len(axes[a])), range(len(axes[b])))
    }
    rows = list(itertools.product(*(range(len(axis)) for axis in axes)))

    def new(row):
        return wanted.intersection(itertools.combinations(enumerate(row), 2))

    chosen = []
    while wanted or not chosen:
        best = max(rows, key=lambda row: len(new(row)))
        wanted -= new(best)
        chosen.append(best)
    return [
        functools.reduce(dict.__or__, (axes[a][i] for a, i in enumerate(row)))
        for row in chosen
    ]


# `make test` runs a few of the `combinations`, the weekly run all.
few_or_all = pytest.mark.parametrize(
    "combinations",
    [
        pytest.param(pairs, id="pairs"),
        pytest.param(every, id="all", marks=pytest.mark.exhaustive),
    ],
)


# Optimizers, one of each kind.

CODECS = {"nu": uint8(0), "mu": bfloat16(), "momentum": int8(0)}
SCHEDULES = (
    optax.cosine_decay_schedule(0.1, 100),
    optax.linear_schedule(0.5, 0.99, 100),
)
OPTIMIZERS = {
    "scale_by_rmsprop": scale_by_rmsprop(),
    "schedules": rmsprop(
        *SCHEDULES,
        momentum=optax.linear_schedule(0.5, 0.9, 100),
        weight_decay=optax.constant_schedule(0.01),
    ),
    "corrected": rmsprop(0.01, bias_correction=True),
    "everything": rmsprop(
        0.01, 0.99, centered=True, momentum=0.9, nesterov=True, weight_decay=0.1
    ),
    "in fewer bits": quantize_state(rmsprop(0.01, centered=True, momentum=0.9), CODECS),
    "one byte": quantize_state(rmsprop(0.01), {"nu": uint8(0)}),
    "a convention": conventions.pytorch(0.01, momentum=0.9, weight_decay=0.1),
}


TWO = {name: OPTIMIZERS[name] for name in ("everything", "in fewer bits")}
two_or_each = pytest.mark.parametrize(
    "optimizers",
    [
        pytest.param(TWO, id="two"),
        pytest.param(OPTIMIZERS, id="each", marks=pytest.mark.slow),
    ],
)


def each(function, optimizers=OPTIMIZERS):
    """The results of a function for each of the optimizers, by name."""
    return {name: function(optimizer) for name, optimizer in optimizers.items()}


def states_of(params, optimizers=OPTIMIZERS):
    """The initial state of each of the optimizers, by name, from one program."""
    return jax.jit(lambda x: each(lambda o: o.init(x), optimizers))(params)


def params(dtype="float32"):
    """Parameters of two shapes and a scalar, some of them negative."""
    return {
        "w": jnp.arange(6, dtype=dtype).reshape(2, 3) - 2,
        "b": [jnp.ones(3, dtype), jnp.asarray(-0.5, dtype)],
    }


def describe(tree):
    """All that makes two arrays interchangeable, except their values."""
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type, x.sharding), tree)


def square(tree):
    """The sum of all elements' squares, a loss whose gradient is twice the tree."""
    return sum((leaf**2).sum() for leaf in jax.tree.leaves(tree))


def updates_of(optimizers, gradients, params=None):
    """All updates and the last state of each optimizer, from one compiled scan.

    Args:
      optimizers: by name.
      gradients: a tree with a leading axis of steps.
      params: constant parameters for all steps; None for the first gradients.
    """

    @jax.jit
    def scan(gradients, params):
        def body(states, g):
            steps = {n: o.update(g, states[n], params) for n, o in optimizers.items()}
            return {n: s for n, (_, s) in steps.items()}, {
                n: u for n, (u, _) in steps.items()
            }

        states = {name: o.init(params) for name, o in optimizers.items()}
        return jax.lax.scan(body, states, gradients)[::-1]

    gradients = jax.tree.map(jnp.asarray, gradients)
    if params is None:
        params = jax.tree.map(lambda g: g[0], gradients)
    updates, states = scan(gradients, jax.tree.map(jnp.asarray, params))
    return {name: (updates[name], states[name]) for name in optimizers}


def train_each(optimizers, params, gradients, states=None):
    """The parameters after every step and the last state of each optimizer.

    Args:
      optimizers: by name.
      params: one tree for all, or with `states` one for each name.
      gradients: a tree with a leading axis of steps, shared by all.
      states: the initial states by name; None for those of `init`.
    """
    if states is None:
        params = dict.fromkeys(optimizers, params)

    @jax.jit
    def scan(params, states, gradients):
        if states is None:
            states = {name: o.init(params[name]) for name, o in optimizers.items()}

        def step(optimizer, g, x, state):
            updates, state = optimizer.update(g, state, x)
            return optax.apply_updates(x, updates), state

        def body(carry, g):
            new = {n: step(o, g, *carry[n]) for n, o in optimizers.items()}
            return new, {name: x for name, (x, _) in new.items()}

        return jax.lax.scan(
            body, {n: (params[n], states[n]) for n in optimizers}, gradients
        )

    last, trajectories = scan(params, states, gradients)
    trajectories = jax.device_get(trajectories)
    return {name: (trajectories[name], last[name][1]) for name in optimizers}


# JAX's options and places.


@contextlib.contextmanager
def flag(name, value):
    """Set one of JAX's options inside the context."""
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        yield
    finally:
        jax.config.update(name, before)


def mesh_of_four(kind=AxisType.Auto):
    """Four devices along an axis "d": CPUs, or as many GPUs if the machine has them."""
    if jax.device_count() < 4:
        pytest.skip(f"four devices are needed, there are {jax.device_count()}")
    return jax.make_mesh((4,), ("d",), (kind,))


# JAX's global switches, which people set for whole programs.
SWITCHES = {
    "disable_jit": jax.disable_jit,
    "debug_nans": lambda: jax.debug_nans(True),
    "debug_infs": lambda: jax.debug_infs(True),
    "check_tracer_leaks": jax.checking_leaks,
    "strict promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "matmul precision": lambda: jax.default_matmul_precision("float32"),
    "enable_x64": lambda: flag("jax_enable_x64", True),
    "an automatic mesh": lambda: jax.set_mesh(mesh_of_four(AxisType.Auto)),
    "an explicit mesh": lambda: jax.set_mesh(mesh_of_four(AxisType.Explicit)),
}


# Optional requirements.


def require(module):
    """Import a library that is optional, except when `.ci/run` compares with all."""
    if os.environ.get("REQUIRE_FRAMEWORKS"):
        __import__(module)
    return pytest.importorskip(module)


def airfoil_or_skip():
    """Skip a test if the airfoil data are unavailable; CI has them."""
    from common import airfoil

    try:
        airfoil()
    except SystemExit as missing:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(missing))


def free_port():
    """An unused port of this machine."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
