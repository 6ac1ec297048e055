"""
Change the learning rate while it trains: a population
======================================================

Population-based training on handwritten digits: 16 members train side by side, and
after every two epochs the worst quarter copies a member of the best quarter, with a
learning rate and a gamma a little up or down.

A rung is a ``sweep`` over the members: its ``init`` takes their parents' carries, which
``load_carry`` has read from the rung before. The picture shows the lineages, and which
learning rates have survived.

Jaderberg et al., https://arxiv.org/abs/1711.09846, 2017
"""

import tempfile

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from common import COLOURS, arguments, save
from gamma_sweep import problem
from successive_halving import training as from_start

from jax_rmsprop import Training, load_carry, log, log_one_minus, points, sweep

MEMBERS, RUNGS, EPOCHS = 16, 6, 2


def training(problem, parents):
    """Epochs of members that go on from these carries, or from the start."""
    alone = from_start(problem)

    def init(number, gamma, learning_rate):
        if parents is None:
            return alone.init(gamma, learning_rate, number)
        return jax.tree.map(lambda x: x[number], parents)

    def step(carry, number, gamma, learning_rate):
        return alone.step(carry, gamma, learning_rate, number)

    return Training(init, step)


def exploit_and_explore(loss, values, random):
    """Who is whose child, and the numbers of each; the worst quarter is replaced."""
    order, quarter = np.argsort(np.where(np.isfinite(loss), loss, np.inf)), MEMBERS // 4
    parent = np.arange(MEMBERS)
    parent[order[-quarter:]] = random.choice(order[:quarter], quarter)
    moved = parent != np.arange(MEMBERS)
    rate, gamma = values["learning_rate"][parent], values["gamma"][parent]
    rate = np.where(moved, rate * random.choice([0.8, 1.25], MEMBERS), rate)
    short = np.where(moved, (1 - gamma) * random.choice([0.5, 2.0], MEMBERS), 1 - gamma)
    return parent, {"learning_rate": rate, "gamma": 1 - np.clip(short, 1e-4, 1.0)}


def main():
    """Train the population, print how it went, and draw it."""
    parser = arguments(__doc__, "population_based_training.png")
    options = parser.parse_args()
    chosen, random = problem("digits"), np.random.default_rng(0)
    space = {"learning_rate": log(1e-4, 0.3), "gamma": log_one_minus(0.0, 0.999)}
    values = {name: np.asarray(x) for name, x in points(space, MEMBERS).items()}
    members, parents, history = np.arange(MEMBERS), None, []
    for rung in range(RUNGS):
        with tempfile.TemporaryDirectory() as folder:
            this, store = training(chosen, parents), f"{folder}/rung.zarr"
            axes = {"number": members} | values
            how = {"zipped": True, "steps": EPOCHS, "batch_size": MEMBERS}
            curves = sweep(this, axes, store=store, progress=False, **how)
            loss = curves.loss.values[:, -1]
            parent, new = exploit_and_explore(loss, values, random)
            carries = [
                load_carry(this, store, {name: x[i] for name, x in axes.items()})
                for i in parent
            ]
        parents = jax.tree.map(lambda *x: jnp.stack(x), *carries)
        print(
            f"after {EPOCHS * (rung + 1):2} epochs: best loss {np.nanmin(loss):.4f}, "
            f"median {np.nanmedian(loss):.4f}; {(parent != members).sum()} replaced"
        )
        history.append((loss, parent, values))
        values = new
    save(draw(history), options.output)


def draw(history):
    """The lineages: the loss of each member, and the learning rate that it has."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6))
    epochs = EPOCHS * np.arange(1, len(history) + 1)
    shown = [
        np.stack([loss for loss, _, _ in history]),
        np.stack([values["learning_rate"] for _, _, values in history]),
    ]
    best = int(np.nanargmin(shown[0][-1]))
    ancestors = [best]
    for _, parent, _ in history[-2::-1]:
        ancestors.insert(0, int(parent[ancestors[0]]))
    labels = "test loss (nats per example)", "learning rate"
    for ax, values, label in zip(axes, shown, labels, strict=True):
        for rung in range(len(history) - 1):
            parent = history[rung][1]
            for child in range(MEMBERS):
                ends = values[rung, parent[child]], values[rung + 1, child]
                copied = parent[child] != child
                colour = COLOURS[1] if copied else "0.75"
                ax.plot(epochs[rung : rung + 2], ends, color=colour, linewidth=1)
        line = values[np.arange(len(history)), ancestors]
        ax.plot(epochs, line, "o-", color=COLOURS[0], linewidth=2.5)
        ax.set(xlabel="epochs", ylabel=label, yscale="log")
    axes[0].plot([], [], color="0.75", label="goes on")
    axes[0].plot([], [], color=COLOURS[1], label="copies a better one")
    axes[0].plot([], [], "o-", color=COLOURS[0], label="the best one's lineage")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


if __name__ == "__main__":
    main()
