"""Sweeps compared to a loop of jitted trainings, one vmap, PyTorch and hyperoptax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.airfoil import airfoil, regression, torch, torch_loop
from benchmarks.timing import medians_of, on_cpu, table, timed
from jax_rmsprop import rmsprop, sweep

# On the examples' path, which benchmarks.airfoil adds.
from common import (  # isort: skip
    batches,
    cross_entropy,
    digits,
    linear,
    network,
    squared_loss,
    train_step,
)

MEMBERS = 128  # a batch of what "auto" runs at most on a CPU


def conv_network(key):
    """Two convolutions and a linear layer, for 8 x 8 pixels and ten classes."""
    first, second, third = jax.random.split(key, 3)
    return {
        "first": 0.3 * jax.random.normal(first, (3, 3, 1, 8)),
        "second": 0.15 * jax.random.normal(second, (3, 3, 8, 16)),
        "w": 0.1 * jax.random.normal(third, (64, 10)),
        "b": jnp.zeros(10),
    }


def conv_loss(p, data):
    """The mean cross entropy of the network, in nats."""
    x = data.x.reshape(-1, 8, 8, 1)
    for kernel in (p["first"], p["second"]):
        x = jax.lax.conv_general_dilated(
            x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x)
    outputs = x.reshape(len(x), -1) @ p["w"] + p["b"]
    return optax.softmax_cross_entropy_with_integer_labels(outputs, data.y).mean()


def training(data, init, loss, batch, epochs):
    """A training as a function of gamma and seed."""

    def train(gamma, seed):
        optimizer = rmsprop(0.01, gamma)
        step = train_step(loss, optimizer)
        key = jax.random.key(seed)

        def epoch(carry, key):
            carry, losses = jax.lax.scan(step, carry, batches(key, data, batch))
            return carry, losses.mean()

        params = init(key)
        _, losses = jax.lax.scan(
            epoch, (params, optimizer.init(params)), jax.random.split(key, epochs)
        )
        return {"loss": losses}

    return train


def problems():
    """Linear regression, a dense network, a convolutional network."""
    train, _ = digits()
    return {
        "linear regression, airfoil": training(
            airfoil(), functools.partial(linear, inputs=5), squared_loss, 10, 5
        ),
        "network, digits": training(
            train, functools.partial(network, inputs=64), cross_entropy, 30, 8
        ),
        "convolutional network, digits": training(
            train, conv_network, conv_loss, 30, 2
        ),
    }


def grid(members=MEMBERS):
    """`members` gammas, each with its own seed."""
    return {
        "gamma": np.linspace(0.5, 0.999, members, dtype="float32"),
        "seed": np.arange(members, dtype="int32"),
    }


def here():
    """The device to measure, if JAX has several."""
    return [jax.config.jax_default_device or jax.devices()[0]]


def swept(train, points, **options):
    """A sweep as a function that returns its run time in seconds."""
    options |= {"zipped": True, "progress": False, "devices": here()}

    def seconds():
        curves = sweep(train, points, **options)
        return curves.run_seconds

    return seconds


def against_loop_and_vmap():
    """Members per second without compiling, for each of the three problems."""
    rows = []
    for name, train in problems().items():
        # Enough to take a second: a tenth is mostly the first call's overhead.
        members = 4 * MEMBERS if "linear" in name else MEMBERS
        points = grid(members)
        alone, together = jax.jit(train), jax.jit(jax.vmap(train))

        jax.block_until_ready(
            (alone(points["gamma"][0], points["seed"][0]), together(**points))
        )  # compiled

        def loop(alone=alone, points=points):
            for gamma, seed in zip(*points.values(), strict=True):
                np.asarray(alone(gamma, seed)["loss"])

        def vmap(together=together, points=points):
            np.asarray(together(**points)["loss"])

        seconds = medians_of(
            {
                "loop": timed(loop),
                "vmap": timed(vmap),
                "auto": swept(train, points),
                "1": swept(train, points, batch_size=1),
            },
            rounds=5,
            warm=0,
        )
        better = min(seconds["loop"], seconds["vmap"])
        rows += [
            (
                f"{name}: members a second / the better of loop and vmap",
                f"{better / seconds['auto']:.2f}",
                ">= 0.95",
            ),
            (
                "members a second: sweep, loop, vmap",
                ", ".join(
                    f"{members / seconds[x]:.0f}" for x in ("auto", "loop", "vmap")
                ),
                "",
            ),
            (
                "the same with batch_size 1 / loop",
                f"{seconds['loop'] / seconds['1']:.2f}",
                "",
            ),
        ]
    return table(
        f"A sweep of {MEMBERS} members ({4 * MEMBERS} for the regression), running",
        rows,
    )


def textbook():
    """The training of the textbook's chapter."""
    data = airfoil()

    def train(gamma, seed):
        return {"loss": regression(seed, data, rmsprop(0.01, gamma))}

    return train


# Members at once; on a GPU, more for what is small.
ON_A_CPU = (1, 4, 16, 64, 128)
ON_A_GPU = (1024, 4096, 16_384, 65_536)


def sizes():
    """Members per second at fixed batch sizes, and at what "auto" chooses."""
    rows = []
    for name, train in (problems() | {"the textbook's training": textbook()}).items():
        if on_cpu():  # as above, at least a few tenths of a second
            at_once, members = ON_A_CPU, MEMBERS if "network" in name else 8 * MEMBERS
        else:
            at_once = ON_A_GPU[: 2 if "convolutional" in name else None]
            members = at_once[-1]
        points = grid(members)
        fixed = {n: swept(train, points, batch_size=n) for n in at_once}
        seconds = medians_of(fixed | {"auto": swept(train, points)}, rounds=3, warm=0)
        best = min(fixed, key=lambda n: seconds[n])
        rows += [
            (
                f"{name}: time of auto / of the best fixed size, {best}",
                f"{seconds['auto'] / seconds[best]:.2f}",
                "<= 1.1",
            ),
            (
                f"members a second of {members:,}, "
                f"{', '.join(map(str, fixed))} at once, auto",
                ", ".join(f"{members / seconds[n]:,.0f}" for n in [*fixed, "auto"]),
                "",
            ),
        ]
    return table('batch_size="auto", running', rows)


def against_torch(members=512):
    """The textbook's training: a sweep, and a loop of PyTorch trainings."""
    if torch is None:
        return table("Against PyTorch", [("PyTorch is not installed", "", "")])
    data, train = airfoil(), textbook()
    seconds = medians_of(
        {
            "torch": timed(lambda: torch_loop(data)),
            "sweep": swept(train, grid(members)),
            "all": timed(swept(train, grid(members))),
        },
        rounds=3,
    )
    rows = [
        (
            f"times faster than PyTorch's loop, {members} members, running",
            f"{seconds['torch'] * members / seconds['sweep']:.0f}",
            ">= 100",
        ),
        (
            "the same with tracing and compiling",
            f"{seconds['torch'] * members / seconds['all']:.0f}",
            "",
        ),
    ]
    return table("A sweep of the textbook's training on airfoil noise", rows)


def against_hyperoptax(members=MEMBERS):
    """Hyperoptax's GridSearch on the same function and grid, compiling included."""
    import hyperoptax  # only this benchmark needs it

    gammas = np.linspace(0.5, 0.999, members, dtype="float32")
    rows = []
    for name, train in problems().items():

        def function(key, params, train=train):
            del key
            return train(params["gamma"], 0)["loss"][-1]

        def search(parallel, function=function):
            space = {"gamma": hyperoptax.DiscreteSpace(list(gammas))}
            state, optimizer = hyperoptax.GridSearch.init(space, n_parallel=parallel)
            _, (_, found) = optimizer.optimize_scan(
                state, jax.random.key(0), function, n_iterations=members // parallel
            )
            return np.asarray(found).ravel()

        def ours(train=train):
            curves = sweep(
                lambda gamma: train(gamma, 0),
                {"gamma": gammas},
                devices=here(),
                progress=False,
            )
            return curves.loss[:, -1].values

        parallel = (8, 32)  # one scan needs at least two iterations
        seconds = medians_of(
            {n: timed(functools.partial(search, n)) for n in parallel}
            | {"sweep": timed(ours)},
            rounds=2,
            warm=0,
        )
        best = min(parallel, key=lambda n: seconds[n])
        apart = np.abs(search(best) / ours() - 1).max()
        rows += [
            (
                f"{name}: times faster than GridSearch, {best} in parallel",
                f"{seconds[best] / seconds['sweep']:.2f}",
                ">= 1",
            ),
            ("results apart, relative", f"{apart:.0e}", "the same"),
        ]
    return table(f"{members} members with tracing and compiling", rows)
