"""
Stop what is hopeless: successive halving
=========================================

Stop what is hopeless: ``successive_halving`` of the main job's grid.

All points train for a tenth of the epochs, the best third of them go on to a third of
the epochs, the best ninth to the end. A rung continues where the one before has ended,
so together they take a quarter of the whole grid's steps.

Jamieson and Talwalkar, https://arxiv.org/abs/1502.07943, 2016
"""

import jax
import matplotlib.pyplot as plt
import numpy as np
from common import arguments, batches, save, train_step
from gamma_sweep import GRID, problem

from jax_rmsprop import Training, rmsprop, successive_halving, summary, sweep

RUNGS = (2, 7, 20)


def training(problem):
    """A training whose step is an epoch."""

    def init(gamma, learning_rate, seed):
        key = jax.random.key(seed)
        params = problem.init(key)
        return key, params, rmsprop(learning_rate, gamma).init(params)

    def step(carry, gamma, learning_rate, seed):
        key, params, state = carry
        key, shuffle = jax.random.split(key)
        update = train_step(problem.loss, rmsprop(learning_rate, gamma))
        data = batches(shuffle, problem.train, problem.batch)
        (params, state), _ = jax.lax.scan(update, (params, state), data)
        return (key, params, state), {"loss": problem.loss(params, problem.test)}

    return Training(init, step)


def main():
    """Halve, and compare with the whole grid."""
    parser = arguments(__doc__, "successive_halving.png")
    parser.add_argument("--store", help="a folder to go on from, and to keep it in")
    options = parser.parse_args()
    chosen = training(problem("digits"))

    found = successive_halving(chosen, GRID, steps=RUNGS, store=options.store)
    spent = int(found.steps.sum())
    # In the same store the grid goes on from where the rungs have ended.
    whole = sweep(chosen, GRID, steps=RUNGS[-1], store=options.store)
    share = spent / (RUNGS[-1] * whole.finished.size)
    print(f"\n{share:.0%} of the grid's steps")
    for name, curves in (("halving", found), ("the grid", whole)):
        best = summary(curves)
        print(
            f"{name}: loss {best.value:.4f} ({best.low:.4f} to {best.high:.4f} over "
            f"{best.seeds} seeds) at gamma {best.best['gamma']:.6g}, learning rate "
            f"{best.best['learning_rate']:g}"
        )
    save(draw(found, share), options.output)


def draw(found, share):
    """Each point as large as it came far."""
    figure, ax = plt.subplots(figsize=(7, 5))
    rung = found.rung.max("seed")
    x, y = np.meshgrid(1 - found.gamma, found.learning_rate, indexing="ij")
    for number, (epochs, size) in enumerate(zip(RUNGS, (15, 70, 220), strict=True)):
        loss = found.loss.isel(step=epochs - 1).mean("seed", skipna=False)
        here = (rung == number).values & np.isfinite(loss.values)
        dots = ax.scatter(
            x[here],
            y[here],
            c=loss.values[here],
            s=size,
            norm="log",
            vmin=float(found.loss.min()),
            vmax=2.5,
            cmap="viridis_r",
            edgecolors="white",
            label=f"{int((rung == number).sum())} points for {epochs} epochs",
        )
    ax.set(xscale="log", yscale="log", xlabel="gamma", ylabel="learning rate")
    ticks = [0, 0.9, 0.99, 0.999, 0.9999]
    ax.set_xticks([1 - x for x in ticks], [f"{x:g}" for x in ticks])
    ax.set_xticks([], minor=True)
    ax.invert_xaxis()
    ax.set_title(f"{share:.0%} of the steps of the whole grid")
    figure.colorbar(dots, label="test loss (nats per example), mean of the seeds")
    figure.legend(loc="outside lower center", ncols=3, fontsize=9)
    return figure


if __name__ == "__main__":
    main()
