"""
Early stopping: successive halving
==================================

Most points of a grid are hopeless, and a few epochs show it. ``successive_halving``
trains all of them a little, the best third longer, and the best ninth to the end. It
finds the grid's best point with a quarter of its steps.

Jamieson and Talwalkar, https://arxiv.org/abs/1502.07943, 2016
"""

# %%
# A training that can be continued
# --------------------------------
#
# A ``Training`` has an ``init``, which makes what the training carries from step to
# step, and a ``step``. Here a step is an epoch, and the carry holds a random key, the
# parameters and the optimizer's state. The network is that of :doc:`gamma_sweep`.

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import sklearn.datasets

from jax_rmsprop import (
    Training,
    log_one_minus,
    rmsprop,
    successive_halving,
    summary,
    sweep,
)

x, y = sklearn.datasets.load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(x))
x, y = jnp.asarray(x[order] / 16, "float32"), jnp.asarray(y[order], "int32")
TEST = jnp.arange(1500, len(x))


def cross_entropy(p, rows):
    """The mean loss, in nats per example."""
    logits = jax.nn.relu(x[rows] @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y[rows]).mean()


def init(gamma, learning_rate, seed):
    """An untrained network."""
    key = jax.random.key(seed)
    first, second = jax.random.split(key)
    w1 = jax.random.normal(first, (64 * 32,)).reshape(64, 32) * (2 / 64) ** 0.5
    w2 = jax.random.normal(second, (32 * 10,)).reshape(32, 10) * (1 / 32) ** 0.5
    p = {"w1": w1, "b1": jnp.zeros(32), "w2": w2, "b2": jnp.zeros(10)}
    return key, p, rmsprop(learning_rate, gamma).init(p)


def epoch(carry, gamma, learning_rate, seed):
    """Fifty batches of 30, and the test loss after them."""
    key, p, state = carry
    key, shuffle = jax.random.split(key)
    optimizer = rmsprop(learning_rate, gamma)

    def step(carry, rows):
        p, state = carry
        updates, state = optimizer.update(jax.grad(cross_entropy)(p, rows), state, p)
        return (optax.apply_updates(p, updates), state), None

    rows = jax.random.permutation(shuffle, 1500).reshape(50, 30)
    (p, state), _ = jax.lax.scan(step, (p, state), rows)
    return (key, p, state), {"loss": cross_entropy(p, TEST)}


# %%
# Halving
# -------
#
# 119 points with three seeds each: two epochs for all, seven for the best 40, twenty
# for the best 14. A rung continues from where the one before ended. The seeds of a
# point stay together, and their mean decides.

GRID = {
    "gamma": log_one_minus(0, 0.9999, 17),
    "learning_rate": [0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3],
    "seed": range(3),
}
RUNGS = (2, 7, 20)
training = Training(init, epoch)
found = successive_halving(training, GRID, steps=RUNGS)
spent = int(found.steps.sum())
print(summary(found))

# %%
# Was it right?
# -------------
#
# To compare, the whole grid for all epochs.

whole = sweep(training, GRID, steps=RUNGS[-1])
share = spent / (RUNGS[-1] * whole.finished.size)
print(f"{share:.0%} of the grid's steps")
for name, curves in (("halving", found), ("the grid", whole)):
    best = summary(curves)
    print(
        f"{name}: loss {best.value:.4f} ({best.low:.4f} to {best.high:.4f} over "
        f"{best.seeds} seeds) at gamma {best.best['gamma']:.6g}, learning rate "
        f"{best.best['learning_rate']:g}"
    )

# %%
# It was. What two epochs rule out are rates that are too small or too large; they do
# not have to tell good points from each other.

figure, ax = plt.subplots(figsize=(7, 5), layout="constrained")
rung = found.rung.max("seed")
points = np.meshgrid(1 - found.gamma, found.learning_rate, indexing="ij")
for number, (epochs, size) in enumerate(zip(RUNGS, (15, 70, 220), strict=True)):
    loss = found.loss.isel(step=epochs - 1).mean("seed", skipna=False)
    here = (rung == number).values & np.isfinite(loss.values)
    dots = ax.scatter(
        *(values[here] for values in points),
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
ax.set_xticks([1 - tick for tick in ticks], [f"{tick:g}" for tick in ticks])
ax.set_xticks([], minor=True)
ax.invert_xaxis()
ax.set_title(f"How long each point trained: {share:.0%} of the grid's steps")
figure.colorbar(dots, label="test loss (nats per example), mean of the seeds")
legend = figure.legend(loc="outside lower center", ncols=3, fontsize=9)
for handle in legend.legend_handles:  # whose sizes count, not their colours
    handle.set_array(None)
    handle.set_facecolor("0.5")
plt.show()

# %%
# What to do next
# ---------------
#
# - Choose the first rung so long that a good rate is ahead of a bad one; that is far
#   sooner than the best gamma is ahead of the second best.
# - With ``store=`` a killed search resumes, and a sweep in the same store continues
#   from where the rungs ended.
# - To change hyperparameters instead of stopping: :doc:`population_based_training`.
