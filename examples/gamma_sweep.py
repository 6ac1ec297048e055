"""The main job: which gamma? A sweep over 33 of them, three seeds each, at once.

Every training is the same jitted, scanned program; `jax.vmap` runs all of them as one,
the optimizer being built inside it. The gammas are spaced evenly in the number of steps
that the average looks back over, 1/(1 - gamma), from 1 to 10,000.
"""

import functools
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from common import (
    COLOURS,
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
from tqdm import tqdm

from jax_rmsprop import rmsprop

GAMMAS = 1 - np.logspace(0, -4, 33)
SEEDS = np.arange(3)


class Problem(NamedTuple):
    """What to train on what."""

    title: str
    train: object
    test: object
    init: object
    loss: object
    batch: int
    epochs: int
    learning_rate: float


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
            0.01,
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
        0.01,
    )


def sweep(problem, gammas, seeds, learning_rate, progress=True):
    """Train one member for each gamma and seed.

    Returns the training losses [gammas, seeds, epochs] (the mean over each epoch) and
    the trained parameters, with leading axes [gammas, seeds].
    """

    def start(gamma, seed):
        params = problem.init(jax.random.key(seed))
        return params, rmsprop(learning_rate, gamma).init(params)

    def epoch(carry, gamma, seed, number):
        key = jax.random.fold_in(jax.random.key(seed), number)
        step = train_step(problem.loss, rmsprop(learning_rate, gamma))
        carry, losses = jax.lax.scan(
            step, carry, batches(key, problem.train, problem.batch)
        )
        return carry, losses.mean()

    # The inner vmap runs over seeds, the outer one over gammas.
    start = jax.vmap(jax.vmap(start, (None, 0)), (0, None))
    run = jax.jit(jax.vmap(jax.vmap(epoch, (0, None, 0, None)), (0, 0, None, None)))
    gammas, seeds = jnp.asarray(gammas, "float32"), jnp.asarray(seeds)
    carry = jax.jit(start)(gammas, seeds)
    curves = []
    members = len(gammas) * len(seeds)
    with tqdm(
        total=problem.epochs,
        desc=f"{members} trainings at once",
        unit="epoch",
        disable=not progress,
    ) as bar:
        for number in range(problem.epochs):
            carry, losses = run(carry, gammas, seeds, number)
            curves.append(np.asarray(losses))
            bar.update()
    return np.stack(curves, axis=-1), carry[0]


def evaluate(problem, params):
    """Test losses and, for digits, accuracies, of shape [gammas, seeds]."""

    def accuracy(p):
        return (logits(p, problem.test.x).argmax(-1) == problem.test.y).mean()

    def over_all(f):
        return np.asarray(jax.jit(jax.vmap(jax.vmap(f)))(params))

    losses = over_all(lambda p: problem.loss(p, problem.test))
    return losses, None if problem.loss is squared_loss else over_all(accuracy)


def main():
    """Sweep, print the table and the best gamma, and draw both."""
    parser = arguments(__doc__, "gamma_sweep.png")
    parser.add_argument(
        "--data", choices=["digits", "airfoil"], default="digits", help="what to learn"
    )
    parser.add_argument("--learning-rate", type=float, help="of every member")
    options = parser.parse_args()
    chosen = problem(options.data)
    rate = options.learning_rate or chosen.learning_rate

    began = time.perf_counter()
    curves, params = sweep(chosen, GAMMAS, SEEDS, rate)
    seconds = time.perf_counter() - began
    losses, accuracy = evaluate(chosen, params)
    train = curves[..., -1]

    score = losses.mean(1)
    best = int(np.nanargmin(score))
    where = "test" if accuracy is not None else "final"
    print(f"\n{chosen.title}, learning rate {rate:g}, {len(SEEDS)} seeds")
    heads = ["gamma", "steps back", "train loss", f"{where} loss", "+- seeds"]
    heads += [] if accuracy is None else ["accuracy"]
    print("  ".join(f"{h:>10}" for h in heads))
    for i, gamma in enumerate(GAMMAS):
        row = [f"{gamma:.5f}", f"{1 / (1 - gamma):.1f}", f"{train[i].mean():.4f}"]
        row += [f"{score[i]:.4f}", f"{losses[i].std():.4f}"]
        row += [] if accuracy is None else [f"{accuracy[i].mean():.3f}"]
        mark = "  <- best" if i == best else ""
        print("  ".join(f"{cell:>10}" for cell in row) + mark)
    print(
        f"best gamma: {GAMMAS[best]:.5f} ({where} loss {score[best]:.4f}); "
        f"{curves.shape[0] * curves.shape[1]} trainings in {seconds:.1f} s, "
        "compiling included"
    )
    save(draw(chosen, rate, curves, losses, best, where), options.output)


def draw(chosen, rate, curves, losses, best, where):
    """Loss against gamma with the spread over seeds, and a few loss curves."""

    def scale(values):
        return "log" if values.max() > 10 * values.min() else "linear"

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    back = 1 / (1 - GAMMAS)
    left.fill_between(
        back,
        losses.min(1),
        losses.max(1),
        color=COLOURS[0],
        alpha=0.25,
        linewidth=0,
        label=f"range over {len(SEEDS)} seeds",
    )
    left.plot(back, losses.mean(1), "o-", markersize=3.5, label="mean")
    left.plot(
        back[best],
        losses[best].mean(),
        "*",
        color=COLOURS[1],
        markersize=15,
        label=f"best: gamma = {GAMMAS[best]:.4g}",
    )
    left.set(
        xscale="log",
        yscale=scale(losses),
        ylabel=f"{where} loss",
        xlabel="steps the average looks back over, 1/(1 - gamma)",
        title=f"Loss against gamma, learning rate {rate:g}",
    )
    left.legend()
    top = left.secondary_xaxis("top")
    top.set_xticks([1, 10, 100, 1000, 10_000], ["0", "0.9", "0.99", "0.999", "0.9999"])
    top.set_xlabel("gamma")

    epochs = np.arange(1, curves.shape[-1] + 1)
    shown = sorted({0, best, 8, 16, 24, 32})
    for i, colour in zip(shown, COLOURS, strict=False):
        label = f"{GAMMAS[i]:.4g}" + (" (best)" if i == best else "")
        right.plot(epochs, curves[i].mean(0), ".-", color=colour, label=label)
    right.set(
        yscale=scale(curves),
        xlabel="epoch",
        ylabel="training loss, mean over the epoch",
        title="Loss curves, mean of seeds",
        xticks=epochs[:: max(1, len(epochs) // 5)],
    )
    right.legend(title="gamma", ncols=2)
    figure.suptitle(chosen.title)
    return figure


if __name__ == "__main__":
    main()
