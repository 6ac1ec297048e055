"""
Which gamma? A sweep, and what to read from it
==============================================

The main job: which gamma? 17 of them, 7 learning rates, 3 seeds: 357 trainings.

``sweep`` runs them as one compiled program, the optimizer being built inside it, on
every device there is. The gammas are spaced evenly in the logarithm of the steps that
the average looks back over, 1/(1 - gamma), from 1 to 10,000.
"""

import functools
import time
from typing import NamedTuple

import jax
import matplotlib.pyplot as plt
from common import (
    airfoil,
    arguments,
    batches,
    cross_entropy,
    digits,
    linear,
    logits,
    network,
    save,
    squared_loss,
    train_step,
)

from jax_rmsprop import log_one_minus, plotting, rmsprop, summary, sweep, to_dataframe

GRID = {
    "gamma": log_one_minus(0, 0.9999, 17),
    "learning_rate": [0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3],
    "seed": range(3),
}


class Problem(NamedTuple):
    """What to train on what."""

    title: str
    train: object
    test: object
    init: object
    loss: object
    batch: int
    epochs: int
    judge: str
    unit: str


def problem(data):
    """The problem of that name."""
    if data == "airfoil":
        train = airfoil()
        init = functools.partial(linear, inputs=train.x.shape[1])
        return Problem(
            "airfoil noise, linear regression",
            train,
            train,
            init,
            squared_loss,
            10,
            5,
            "final loss",
            "half the mean square",
        )
    train, test = digits()
    init = functools.partial(network, inputs=train.x.shape[1])
    return Problem(
        "handwritten digits, one hidden layer",
        train,
        test,
        init,
        cross_entropy,
        30,
        20,
        "test loss",
        "nats per example",
    )


def training(problem):
    """A training as a function of what is swept."""

    def train(gamma, learning_rate, seed):
        optimizer = rmsprop(learning_rate, gamma)
        step = train_step(problem.loss, optimizer)
        key = jax.random.key(seed)

        def epoch(carry, number):
            shuffled = batches(
                jax.random.fold_in(key, number), problem.train, problem.batch
            )
            carry, losses = jax.lax.scan(step, carry, shuffled)
            return carry, losses.mean()

        params = problem.init(key)
        (params, _), losses = jax.lax.scan(
            epoch, (params, optimizer.init(params)), jax.numpy.arange(problem.epochs)
        )
        found = {"train_loss": losses, "loss": problem.loss(params, problem.test)}
        if problem.loss is cross_entropy:
            right = logits(params, problem.test.x).argmax(-1) == problem.test.y
            found["accuracy"] = right.mean()
        return found

    return train


def main():
    """Sweep, print what was best, and draw it."""
    parser = arguments(__doc__, "gamma_sweep.png")
    parser.add_argument(
        "--data", choices=["digits", "airfoil"], default="digits", help="what to learn"
    )
    parser.add_argument("--store", help="a folder to go on from, and to keep it in")
    options = parser.parse_args()
    chosen = problem(options.data)

    began = time.perf_counter()
    curves = sweep(training(chosen), GRID, store=options.store)
    seconds = time.perf_counter() - began
    curves.loss.attrs["long_name"] = chosen.judge
    curves.loss.attrs["units"] = curves.train_loss.attrs["units"] = chosen.unit
    curves.train_loss.attrs["long_name"] = "training loss"

    print(f"\n{chosen.title}; judged by the {chosen.judge}, mean of 3 seeds")
    best = summary(curves, "loss")
    print(best)
    table = to_dataframe(curves)
    table = table[table.learning_rate == best.best["learning_rate"]]
    table.insert(1, "steps back", 1 / (1 - table.gamma))
    rows = table.drop(columns=["seed", "finished"]).groupby("gamma").mean()
    print(f"\nat learning rate {best.best['learning_rate']:g}, means of the seeds:")
    print(rows.drop(columns="learning_rate").to_string(float_format="{:.4f}".format))
    print(
        f"\nbest gamma: {best.best['gamma']:.5f}; {curves.diverged.size} trainings in "
        f"{seconds:.1f} s, of which {curves.compile_seconds:.1f} s compiling; "
        f"{curves.batch_size} at once on each of {curves.devices} device(s)"
    )
    save(draw(chosen, curves), options.output)


def draw(chosen, curves):
    """The four pictures of a sweep."""
    figure, axes = plt.subplots(2, 2, figsize=(12, 9))
    plotting.loss_against_gamma(curves, ax=axes[0, 0])
    plotting.heatmap(curves, ax=axes[0, 1])
    plotting.sensitivity(curves, ax=axes[1, 0])
    plotting.best_curves(curves, "train_loss", top_k=5, ax=axes[1, 1])
    axes[1, 1].set_xlabel("epoch")
    figure.suptitle(chosen.title)
    return figure


if __name__ == "__main__":
    main()
