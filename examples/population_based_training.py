"""
Population-based training (PBT)
===============================

Sixteen networks train side by side. After every two epochs the worst quarter copies a
network of the best quarter, with a learning rate and a gamma a little up or down: the
hyperparameters change while the network trains, as a schedule that nobody wrote.

Jaderberg et al., https://arxiv.org/abs/1711.09846, 2017
"""

# %%
# One network
# -----------
#
# A ``Training`` whose step is an epoch, as in :doc:`successive_halving`. Members differ
# in their number, which is also their seed, in gamma and in the learning rate. They
# start from scratch or from the carries of their parents.

import tempfile

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import sklearn.datasets

from jax_rmsprop import (
    Training,
    load_carry,
    log,
    log_one_minus,
    points,
    rmsprop,
    sweep,
)

MEMBERS, RUNGS, EPOCHS = 16, 6, 2
x, y = sklearn.datasets.load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(x))
x, y = jnp.asarray(x[order] / 16, "float32"), jnp.asarray(y[order], "int32")
TEST = jnp.arange(1500, len(x))


def cross_entropy(p, rows):
    """The mean loss, in nats per example."""
    logits = jax.nn.relu(x[rows] @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y[rows]).mean()


def from_scratch(number):
    """A network that knows nothing."""
    key = jax.random.key(number)
    first, second = jax.random.split(key)
    w1 = jax.random.normal(first, (64 * 32,)).reshape(64, 32) * (2 / 64) ** 0.5
    w2 = jax.random.normal(second, (32 * 10,)).reshape(32, 10) * (1 / 32) ** 0.5
    p = {"w1": w1, "b1": jnp.zeros(32), "w2": w2, "b2": jnp.zeros(10)}
    return key, p, rmsprop(0.0).init(p)


def training(parents):
    """Epochs of members that continue from these carries, or start from scratch."""

    def init(number, gamma, learning_rate):
        if parents is None:
            return from_scratch(number)
        return jax.tree.map(lambda leaf: leaf[number], parents)

    def epoch(carry, number, gamma, learning_rate):
        key, p, state = carry
        key, shuffle = jax.random.split(key)
        optimizer = rmsprop(learning_rate, gamma)

        def step(carry, rows):
            p, state = carry
            gradient = jax.grad(cross_entropy)(p, rows)
            updates, state = optimizer.update(gradient, state, p)
            return (optax.apply_updates(p, updates), state), None

        rows = jax.random.permutation(shuffle, 1500).reshape(50, 30)
        (p, state), _ = jax.lax.scan(step, (p, state), rows)
        return (key, p, state), {"loss": cross_entropy(p, TEST)}

    return Training(init, epoch)


# %%
# Exploit and explore
# -------------------
#
# The worst quarter gets a parent from the best quarter, and hyperparameters near its
# parent's.


def next_generation(loss, values, random):
    """The parent of each member, and the members' new hyperparameters."""
    order, quarter = np.argsort(np.where(np.isfinite(loss), loss, np.inf)), MEMBERS // 4
    parent = np.arange(MEMBERS)
    parent[order[-quarter:]] = random.choice(order[:quarter], quarter)
    moved = parent != np.arange(MEMBERS)
    rate, gamma = values["learning_rate"][parent], values["gamma"][parent]
    rate = np.where(moved, rate * random.choice([0.8, 1.25], MEMBERS), rate)
    short = np.where(moved, (1 - gamma) * random.choice([0.5, 2.0], MEMBERS), 1 - gamma)
    return parent, {"learning_rate": rate, "gamma": 1 - np.clip(short, 1e-4, 1.0)}


# %%
# The population
# --------------
#
# Each rung is a sweep over the members. ``load_carry`` reads what a parent has learned
# from the store of its rung.

random = np.random.default_rng(0)
space = {"learning_rate": log(1e-4, 0.3), "gamma": log_one_minus(0.0, 0.999)}
values = {name: np.asarray(axis) for name, axis in points(space, MEMBERS).items()}
members, parents, history = np.arange(MEMBERS), None, []
for rung in range(RUNGS):
    this, axes = training(parents), {"number": members} | values
    with tempfile.TemporaryDirectory() as folder:
        store = f"{folder}/rung.zarr"
        curves = sweep(
            this,
            axes,
            zipped=True,
            steps=EPOCHS,
            batch_size=MEMBERS,
            store=store,
            progress=False,
        )
        loss = curves.loss.values[:, -1]
        parent, new = next_generation(loss, values, random)
        carries = [
            load_carry(this, store, {name: axis[i] for name, axis in axes.items()})
            for i in parent
        ]
    parents = jax.tree.map(lambda *leaves: jnp.stack(leaves), *carries)
    print(
        f"after {EPOCHS * (rung + 1):2} epochs: best loss {np.nanmin(loss):.4f}, "
        f"median {np.nanmedian(loss):.4f}; {(parent != members).sum()} replaced"
    )
    history.append((loss, parent, values))
    values = new

# %%
# Who became the best?
# --------------------
#
# Each line is a member. Orange ones have copied a better one, and the thick line
# follows the best of the end back through its ancestors.

losses = np.stack([loss for loss, _, _ in history])
rates = np.stack([values["learning_rate"] for _, _, values in history])
ancestors = [int(np.nanargmin(losses[-1]))]
for _, parent, _ in history[-2::-1]:
    ancestors.insert(0, int(parent[ancestors[0]]))
copies = sum(a != b for a, b in zip(ancestors, ancestors[1:], strict=False))
print(f"the best one's ancestors: {ancestors}, {copies} of them copied")
print(f"spread of the learning rates: {rates[0].max() / rates[0].min():.0f} times")
print(f"at the end: {rates[-1].max() / rates[-1].min():.0f} times")

figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
epochs = EPOCHS * np.arange(1, RUNGS + 1)
for ax, shown in zip(axes, (losses, rates), strict=True):
    for rung in range(RUNGS - 1):
        parent = history[rung][1]
        for child in range(MEMBERS):
            ends = shown[rung, parent[child]], shown[rung + 1, child]
            colour = "0.75" if parent[child] == child else "C1"
            ax.plot(epochs[rung : rung + 2], ends, color=colour, linewidth=1)
    ax.plot(epochs, shown[np.arange(RUNGS), ancestors], "o-", color="C0", linewidth=2.5)
    ax.set(xlabel="epochs", yscale="log")
axes[0].set(ylabel="test loss (nats per example)", title="The losses fall together")
axes[1].set(ylabel="learning rate", title="The rates that survive")
axes[0].plot([], [], color="0.75", label="continues")
axes[0].plot([], [], color="C1", label="copies a better one")
axes[0].plot([], [], "o-", color="C0", label="the best one's ancestors")
figure.legend(loc="outside lower center", ncols=3)
plt.show()

# %%
# The best network of the end is no lone survivor: its line has moved to better
# hyperparameters by copying. The rates, at first a factor of two thousand apart, end
# within a factor of ten, and the median falls with the best.
#
# If you only want the best point of a fixed grid, :doc:`successive_halving` takes fewer
# steps.
