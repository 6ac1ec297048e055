"""
Stop what is hopeless: successive halving
=========================================

Stop what is hopeless: successive halving of the main job's grid, around ``sweep``.

All points train for a tenth of the epochs, the best third of them for a third, the best
ninth for all. Each rung begins again from the start; together they take a third of the
whole grid's steps. The number of epochs is one more hyperparameter, a Python value, so
all rungs are one store, each of them one program, and what was killed goes on.

Li et al., Hyperband, https://arxiv.org/abs/1603.06560, 2018
"""

import matplotlib.pyplot as plt
import numpy as np
from common import arguments, save
from gamma_sweep import GRID, problem, training

from jax_rmsprop import sweep

RUNGS = (2, 7, 20)


def halving(train, points, seeds, rungs, keep=1 / 3, store=None):
    """Successive halving: each rung trains the best of the one before, for longer.

    Args:
      train: a function of a point, a seed and `epochs` to a loss.
      points: for each hyperparameter, its values at the points.
      seeds: over which the loss is averaged.
      rungs: the epochs of each rung.
      keep: which part of the points goes on.
      store: where all of them are kept.

    Returns:
      For each rung its points and their losses, best first.
    """
    found = []
    for epochs in rungs:
        count = len(next(iter(points.values())))
        members = {name: np.repeat(x, len(seeds)) for name, x in points.items()}
        members |= {
            "seed": np.tile(seeds, count),
            "epochs": np.full(count * len(seeds), epochs, object),
        }
        curves = sweep(train, members, zipped=True, store=store)
        loss = curves.loss.where(~curves.diverged, np.inf).values
        loss = loss.reshape(count, len(seeds)).mean(1)
        order = np.argsort(loss)
        points = {name: x[order] for name, x in points.items()}
        found.append((points, loss[order]))
        points = {name: x[: round(count * keep)] for name, x in points.items()}
    return found


def main():
    """Halve, and compare with the whole grid."""
    parser = arguments(__doc__, "successive_halving.png")
    parser.add_argument("--store", help="a folder to go on from, and to keep it in")
    options = parser.parse_args()
    chosen = problem("digits")

    def train(gamma, learning_rate, seed, epochs):
        outputs = training(chosen._replace(epochs=epochs))(gamma, learning_rate, seed)
        return {"loss": outputs["loss"]}

    seeds = list(GRID["seed"])
    gamma, rate = np.meshgrid(GRID["gamma"], GRID["learning_rate"], indexing="ij")
    points = {"gamma": gamma.ravel(), "learning_rate": rate.ravel()}
    rungs = halving(train, points, seeds, RUNGS, store=options.store)
    whole = sweep(
        train,
        GRID | {"epochs": np.array([RUNGS[-1]], object)},
        store=options.store,
    ).isel(epochs=0)

    spent = sum(e * len(loss) for e, (_, loss) in zip(RUNGS, rungs, strict=True))
    share = spent / (RUNGS[-1] * gamma.size)
    losses = whole.loss.where(~whole.diverged, np.inf)
    best = losses.mean("seed")
    at = best.argmin(...)
    spread = losses.isel(at)
    points, loss = rungs[-1]
    print(f"\n{share:.0%} of the grid's steps")
    print(
        f"halving: loss {loss[0]:.4f} at gamma {points['gamma'][0]:.6g}, learning rate "
        f"{points['learning_rate'][0]:g}"
    )
    print(
        f"the grid: loss {best.isel(at).item():.4f} ({spread.min().item():.4f} to "
        f"{spread.max().item():.4f} over {len(seeds)} seeds) at gamma "
        f"{best.isel(at).gamma.item():.6g}, learning rate "
        f"{best.isel(at).learning_rate.item():g}"
    )

    figure, ax = plt.subplots(figsize=(7, 5))
    for epochs, (points, loss), size in zip(RUNGS, rungs, (15, 70, 220), strict=True):
        good = np.isfinite(loss)
        dots = ax.scatter(
            1 - points["gamma"][good],
            points["learning_rate"][good],
            c=loss[good],
            s=size,
            norm="log",
            vmin=float(best.min()),
            vmax=2.5,
            cmap="viridis_r",
            edgecolors="white",
            label=f"{len(loss)} points for {epochs} epochs",
        )
    ax.set(xscale="log", yscale="log", xlabel="gamma", ylabel="learning rate")
    ticks = [0, 0.9, 0.99, 0.999, 0.9999]
    ax.set_xticks([1 - x for x in ticks], [f"{x:g}" for x in ticks])
    ax.set_xticks([], minor=True)
    ax.invert_xaxis()
    ax.set_title(f"{share:.0%} of the steps of the whole grid")
    figure.colorbar(dots, label="test loss (nats per example), mean of the seeds")
    figure.legend(loc="outside lower center", ncols=3, fontsize=9)
    save(figure, options.output)


if __name__ == "__main__":
    main()
